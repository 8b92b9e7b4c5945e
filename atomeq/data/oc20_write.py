"""Writes OC20 frames as LMDB, ASE-LMDB or raw files that the field's other tools read as well.

A folder of shards gets a ``metadata.npz`` with the number of atoms of each frame, by which batches
are balanced, and the elements that occur.
"""

import hashlib
import io
import itertools
import lzma
import os
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import lmdb
import numpy as np
import torch
from ase.io.extxyz import write_extxyz
from ase.io.jsonio import encode
from torch_geometric.data import Data

from atomeq.data.ase_files import DataError
from atomeq.data.oc20 import Frames, open_frames
from atomeq.data.oc20_frame import EnergyKind, OC20Frame
from atomeq.files import write_atomically

FileFormat: TypeAlias = Literal["lmdb", "aselmdb", "raw"]
METADATA = "metadata.npz"

# Bytes a shard may grow to; the file is sparse and takes only what is written.
_MAP_SIZE = 2**40
_COMMIT_EVERY = 1000
_RAW_COLUMNS = ["symbols", "positions", "move_mask", "tags", "forces"]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    file_format: FileFormat,
    energy: EnergyKind = "stored",
    frames_per_file: int = 50_000,
    report: Callable[[int, int], None] | None = None,
) -> int:
    """Rewrite OC20 data in another format, with its ``metadata.npz``.

    Args:
        source: Anything :func:`~atomeq.data.oc20.open_frames` opens.
        target: Folder to write; created, and must not hold data yet.
        file_format: ``lmdb`` (pickled records, one energy), ``aselmdb`` (total energy and
            reference, S2EF and IS2RE) or ``raw`` (S2EF only; needs total energy and reference).
        energy: The energy an LMDB gets; the other formats keep both.
        frames_per_file: Frames in one shard.
        report: Called with the number of frames done and to do.

    Returns:
        The number of frames.

    Raises:
        DataError: The source is damaged or lacks what the format needs, or the target is not empty.

    Example:
        >>> convert("s2ef_200K", "lmdb_200K", file_format="lmdb")  # doctest: +SKIP
    """
    if frames_per_file < 1:
        raise DataError(f"frames_per_file must be at least 1, not {frames_per_file}")
    frames = open_frames(source)
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise DataError(f"{folder} is not empty; give a new folder")
    suffixes = {"lmdb": "data.{:04d}.lmdb", "aselmdb": "data.{:04d}.aselmdb", "raw": "{}.extxyz.xz"}
    n_atoms: list[int] = []
    elements: set[int] = set()
    stream = iter(frames)
    for shard in itertools.count():
        piece = itertools.islice(stream, frames_per_file)
        first = next(piece, None)
        if first is None:
            break
        counted = _counted(itertools.chain([first], piece), n_atoms, elements, len(frames), report)
        path = folder / suffixes[file_format].format(shard)
        if file_format == "lmdb":
            write_lmdb(path, counted, energy)
        elif file_format == "aselmdb":
            _write_aselmdb(path, counted)
        else:
            write_raw(path, counted)
    _save_metadata(folder / METADATA, n_atoms, elements)
    return len(n_atoms)


def write_metadata(
    path: str | os.PathLike[str], *, report: Callable[[int, int], None] | None = None
) -> Path:
    """Read all frames once and write ``metadata.npz`` beside them.

    Args:
        path: A folder of shards, or a file.
        report: Called with the number of frames done and to do.

    Returns:
        The file.
    """
    path = Path(path)
    frames = open_frames(path)
    n_atoms: list[int] = []
    elements: set[int] = set()
    for _ in _counted(frames, n_atoms, elements, len(frames), report):
        pass
    file = metadata_file(path)
    _save_metadata(file, n_atoms, elements)
    return file


def metadata_file(path: str | os.PathLike[str]) -> Path:
    """Return where the metadata of a folder or file of data belongs."""
    path = Path(path)
    return (path if path.is_dir() else path.parent) / METADATA


def _counted(
    frames: Iterable[OC20Frame] | Frames,
    n_atoms: list[int],
    elements: set[int],
    n_frames: int,
    report: Callable[[int, int], None] | None,
) -> Iterator[OC20Frame]:
    for frame in frames:
        n_atoms.append(frame.n_atoms)
        elements.update(np.unique(frame.numbers).tolist())
        if report is not None:
            report(len(n_atoms), n_frames)
        yield frame


def _save_metadata(file: Path, n_atoms: list[int], elements: set[int]) -> None:
    with write_atomically(file) as partial:
        np.savez_compressed(
            partial,
            natoms=np.array(n_atoms, dtype=np.int32),
            elements=np.array(sorted(elements), dtype=np.int32),
        )


@contextmanager
def _shard(path: Path) -> Iterator[Callable[[str, bytes], None]]:
    """Give a function that puts key and value; the file takes its name when all is written."""
    with write_atomically(path) as partial:
        environment = lmdb.open(
            str(partial), map_size=_MAP_SIZE, subdir=False, lock=False, meminit=False, sync=False
        )
        transaction = environment.begin(write=True)
        n_put = 0

        def put(key: str, value: bytes) -> None:
            nonlocal transaction, n_put
            transaction.put(key.encode("ascii"), value)
            n_put += 1
            if n_put % _COMMIT_EVERY == 0:  # bounds what is held in memory
                transaction.commit()
                transaction = environment.begin(write=True)

        try:
            yield put
            transaction.commit()
            environment.sync(True)
        finally:
            environment.close()


def write_lmdb(path: Path, frames: Iterable[OC20Frame], energy: EnergyKind = "stored") -> None:
    """Write one shard of pickled records.

    Args:
        path: The file.
        frames: What is in it.
        energy: Which energy it gets.
    """
    n_frames = 0
    with _shard(path) as put:
        for frame in frames:
            put(str(n_frames), pickle.dumps(_record(frame, energy), protocol=-1))
            n_frames += 1
        put("length", pickle.dumps(n_frames, protocol=-1))


def _record(frame: OC20Frame, energy: EnergyKind) -> Data:
    """Return what OC20's own preprocessing pickles: the same names and dtypes."""
    fields: dict[str, Any] = {
        "pos": torch.from_numpy(frame.positions).to(torch.float32),
        "cell": torch.from_numpy(frame.cell).to(torch.float32)[None],
        "atomic_numbers": torch.from_numpy(frame.numbers).to(torch.uint8),
        "natoms": frame.n_atoms,
        "tags": torch.from_numpy(frame.tags),
        "fixed": torch.from_numpy(frame.fixed).to(torch.int32),
        "sid": frame.sid,
        "fid": frame.fid,
        "y_init": frame.initial_energy,
        "y_relaxed": frame.relaxed_energy,
    }
    if frame.relaxed_energy is None:
        fields["energy"] = frame.target(energy)
    for name, array in (("forces", frame.forces), ("pos_relaxed", frame.relaxed_positions)):
        if array is not None:
            fields[name] = torch.from_numpy(array).to(torch.float32)
    return Data(**{name: value for name, value in fields.items() if value is not None})


def _write_aselmdb(path: Path, frames: Iterable[OC20Frame]) -> None:
    n_frames = 0
    with _shard(path) as put:
        for frame in frames:
            n_frames += 1
            put(str(n_frames), _json(_row(frame, n_frames)))
        put("nextid", _json(n_frames + 1))
        put("metadata", _json({}))


def _json(value: Any) -> bytes:
    return zlib.compress(encode(value).encode("utf-8"))


def _row(frame: OC20Frame, index: int) -> dict[str, Any]:
    data: dict[str, Any] = {
        "sid": None if frame.sid is None else f"random{frame.sid}",
        "fid": frame.fid,
        "ref_energy": frame.reference_energy,
        "initial_energy": frame.initial_energy,
        "relaxed_energy": frame.relaxed_energy,
        "relaxed_positions": frame.relaxed_positions,
    }
    row: dict[str, Any] = {
        "numbers": frame.numbers,
        "positions": frame.positions,
        "cell": frame.cell,
        "pbc": np.array(frame.pbc),
        "tags": frame.tags,
        "unique_id": hashlib.sha256(f"{frame.sid}/{frame.fid}/{index}".encode()).hexdigest()[:32],
        "ctime": 0.0,  # the same frames give the same file
        "mtime": 0.0,
        "user": None,
        "data": {name: value for name, value in data.items() if value is not None},
    }
    if frame.fixed.any():
        indices = np.flatnonzero(frame.fixed).tolist()
        row["constraints"] = [{"name": "FixAtoms", "kwargs": {"indices": indices}}]
    if frame.energy is not None:
        row.update(calculator="unknown", calculator_parameters={}, energy=frame.energy)
    if frame.forces is not None:
        row["forces"] = frame.forces
    return row


def write_raw(path: Path, frames: Iterable[OC20Frame]) -> None:
    """Write structures, and their identities and references in the file beside.

    Args:
        path: ``<name>.extxyz.xz``; ``<name>.txt.xz`` stands beside it.
        frames: With total energy, reference and forces.

    Raises:
        DataError: A frame lacks one of them.
    """
    beside = path.with_name(path.name.replace(".extxyz", ".txt"))
    with (
        write_atomically(path) as partial,
        write_atomically(beside) as partial_beside,
        lzma.open(partial, "wt", encoding="utf-8") as structures,
        lzma.open(partial_beside, "wt", encoding="utf-8") as references,
    ):
        for frame in frames:
            missing = [
                name
                for name in ("energy", "forces", "reference_energy", "sid", "fid")
                if getattr(frame, name) is None
            ]
            if missing:
                raise DataError(
                    f"raw S2EF files need total energy and reference, but a frame has no "
                    f"{missing[0]}; write aselmdb, or start from data that has both"
                )
            atoms = frame.to_atoms()
            atoms.info.clear()  # the identity stands in the file beside
            text = io.StringIO()
            write_extxyz(text, [atoms], columns=_RAW_COLUMNS)
            structures.write(text.getvalue())
            references.write(f"random{frame.sid},frame{frame.fid},{frame.reference_energy!r}\n")
