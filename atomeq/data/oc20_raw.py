"""Raw S2EF: text in extended XYZ, as OC20 distributes its training and validation sets."""

import io
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase.constraints import FixAtoms
from ase.io.extxyz import read_xyz
from numpy.typing import NDArray

from atomeq.data.ase_files import DataError
from atomeq.data.oc20_frame import OC20Frame, Shards, frame_of_record

# Bytes of one decompressed file; the largest of OC20, 5,000 frames, have 100 MB.
_MAX_TEXT = 2 * 2**30


class RawS2EF(Shards):
    """S2EF as it is distributed: text in extended XYZ with a list of references beside each file.

    Compressed files can only be read from their beginning, so the last one used is kept
    decompressed: read them in order, or convert them (``atomeq data convert``) to train on them.

    Args:
        files: ``<k>.extxyz.xz`` or ``<k>.extxyz``, each with ``<k>.txt.xz`` or ``<k>.txt``.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._identities = [_identities(file) for file in files]
        self._text: tuple[int, bytes, NDArray[np.int64]] | None = None
        super().__init__(files, [len(lines) for lines in self._identities])

    def _frame(self, shard: int, k: int) -> OC20Frame:
        if self._text is None or self._text[0] != shard:
            self._text = None  # before the next is read: they are large
            text = _read_text(self.files[shard])
            self._text = shard, text, _frame_starts(text)
        _, text, starts = self._text
        if len(starts) - 1 != len(self._identities[shard]):
            raise DataError(
                f"the file has {len(starts) - 1} frames, but {len(self._identities[shard])} lines "
                "of references are beside it"
            )
        return _raw_frame(text[starts[k] : starts[k + 1]], self._identities[shard][k])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_text": None}


def _raw_frame(text: bytes, identity: str) -> OC20Frame:
    try:
        atoms = next(read_xyz(io.StringIO(text.decode("utf-8")), 0))
    except Exception as error:  # ASE's parser raises anything, from KeyError to XYZError
        raise DataError(f"cannot be read ({type(error).__name__}: {error})") from error
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms):
            fixed[constraint.index] = True
    results = atoms.calc.results if atoms.calc is not None else {}
    sid, fid, *reference = identity.split(",")
    record = {
        "pos": atoms.positions,
        "atomic_numbers": atoms.numbers,
        "cell": atoms.cell.array,
        "tags": atoms.get_tags(),
        "fixed": fixed,
        "pbc": atoms.pbc,
        "sid": sid,
        "fid": fid,
        **{key: results[key] for key in ("energy", "forces") if key in results},
    }
    if reference:
        try:
            record["ref_energy"] = float(reference[0])
        except ValueError as error:
            raise DataError(f"its reference energy is {reference[0]!r}") from error
    return frame_of_record(record)


def _identities(file: Path) -> list[str]:
    """Return the lines ``random<sid>,frame<fid>,<reference energy>`` that belong to a raw file."""
    stem = file.name.removesuffix(".xz").removesuffix(".extxyz")
    candidates = [file.with_name(f"{stem}{suffix}") for suffix in (".txt.xz", ".txt")]
    beside = next((path for path in candidates if path.is_file()), None)
    if beside is None:
        raise DataError(f"{file} has no {stem}.txt[.xz] beside it, which names its frames")
    lines = _read_text(beside).decode("utf-8", "replace").split()
    wrong = [line for line in lines if line.count(",") not in (1, 2)]
    if wrong:
        raise DataError(f"{beside} has the line {wrong[0]!r}, not random<sid>,frame<fid>,<energy>")
    return lines


def _read_text(path: Path) -> bytes:
    opener = lzma.open if path.suffix == ".xz" else open
    try:
        with opener(path, "rb") as stream:
            text = stream.read(_MAX_TEXT + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path} is damaged or cut short ({error})") from error
    if len(text) > _MAX_TEXT:
        raise DataError(f"{path} holds more than {_MAX_TEXT} bytes, which no file of OC20 does")
    return text


def _frame_starts(text: bytes) -> NDArray[np.int64]:
    """Return where each frame of an extended XYZ file begins, and where the last one ends."""
    starts, position = [0], 0
    while position < len(text):
        end = text.find(b"\n", position)
        try:
            n_atoms = int(text[position:end])
        except ValueError as error:
            raise DataError("the file is not extended XYZ, or damaged") from error
        for _ in range(n_atoms + 2):
            position = text.find(b"\n", position) + 1
            if position == 0:
                raise DataError(f"the file ends within frame {len(starts) - 1}")
        starts.append(position)
    return np.array(starts, dtype=np.int64)
