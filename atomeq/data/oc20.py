"""OC20 (arXiv:2010.09990) in every form it is distributed in, frame by frame and in any order.

Raw S2EF files, the pickled LMDBs of S2EF and IS2RE, and ASE-LMDB all give :class:`OC20Frame`;
oc20_write.py turns frames into files, oc20_datamodule.py into batches of graphs.
"""

import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from atomeq.data.ase_files import DataError
from atomeq.data.lmdb_files import LmdbFile
from atomeq.data.oc20_frame import OC20Frame, Shards, frame_of_record
from atomeq.data.oc20_raw import RawS2EF
from atomeq.data.pickled_records import read_count, read_record

# Bytes; a row of 225 atoms has 50 KB, and as many zeros as one likes compress to a few bytes.
_MAX_ROW = 64 * 2**20


class Frames(Protocol):
    """Frames in a file or folder: any of them by its index, in any process."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def __iter__(self) -> Iterator[OC20Frame]:
        """Yield all of them in order, which is the fastest way to read compressed files."""
        ...

    def __getitem__(self, index: int) -> OC20Frame:
        """Return one of them.

        Raises:
            DataError: It is damaged; the message names file and frame.
        """
        ...


def open_frames(path: str | os.PathLike[str]) -> Frames:
    """Open OC20 data of any format.

    Args:
        path: A file, or a folder of one kind of files: ``*.lmdb``, ``*.aselmdb``, or
            ``<k>.extxyz[.xz]`` with ``<k>.txt[.xz]`` beside it.

    Returns:
        A sequence of frames, read when they are asked for.

    Raises:
        DataError: There is none of these, or more than one kind.

    Example:
        >>> frames = open_frames("s2ef_train_200K/")  # doctest: +SKIP
        >>> frames[1000].target("referenced")  # doctest: +SKIP
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"there is no file or folder {path}")
    # The distributed archives unpack into s2ef_train_200K/s2ef_train_200K/.
    if path.is_dir() and (path / path.name).is_dir():
        path = path / path.name
    kinds: dict[str, tuple[type, list[Path]]] = {
        "LMDB": (PickledLmdb, _files(path, ".lmdb")),
        "ASE-LMDB": (AseLmdb, _files(path, ".aselmdb")),
        "raw S2EF": (RawS2EF, _files(path, ".extxyz") + _files(path, ".extxyz.xz")),
    }
    found = {name: (opener, files) for name, (opener, files) in kinds.items() if files}
    if len(found) != 1:
        raise DataError(
            f"{path} holds {' and '.join(found) or 'no OC20 data'}; give one kind of *.lmdb, "
            "*.aselmdb or *.extxyz[.xz]"
        )
    opener, files = next(iter(found.values()))
    return opener(sorted(files, key=_shard_order))


def _files(path: Path, suffix: str) -> list[Path]:
    if path.is_file():
        return [path] if path.name.endswith(suffix) else []
    return list(path.glob(f"*{suffix}"))


def _shard_order(path: Path) -> tuple[Path, list[int], str]:
    return path.parent, [int(number) for number in re.findall(r"\d+", path.name)], path.name


class PickledLmdb(Shards):
    """S2EF and IS2RE as LMDBs of pickled records, read without executing anything.

    Args:
        files: The shards, in order.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._lmdbs = [LmdbFile(file) for file in files]
        super().__init__(files, [self._length(file) for file in self._lmdbs])

    @staticmethod
    def _length(file: LmdbFile) -> int:
        stored = file.get("length")
        if stored is None:  # IS2RE files hold records only
            return file.n_entries
        try:
            return read_count(stored)
        except DataError as error:
            raise DataError(f"{file.path}, key 'length': {error}") from error

    def _frame(self, shard: int, k: int) -> OC20Frame:
        stored = self._lmdbs[shard].get(str(k))
        if stored is None:
            raise DataError("is missing; the file is not an OC20 LMDB, or damaged")
        return frame_of_record(read_record(stored))


class AseLmdb(Shards):
    """ASE databases in LMDB files, ``*.aselmdb``: compressed JSON.

    Args:
        files: The shards, in order.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._lmdbs = [LmdbFile(file) for file in files]
        self._ids = [self._rows(file) for file in self._lmdbs]
        super().__init__(files, [len(ids) for ids in self._ids])

    @staticmethod
    def _rows(file: LmdbFile) -> Sequence[int]:
        def number_of(key: str, otherwise: Any) -> Any:
            stored = file.get(key)
            try:
                return otherwise if stored is None else _decompress(stored)
            except DataError as error:
                raise DataError(f"{file.path}, key {key!r}: {error}") from error

        following, deleted = number_of("nextid", 1), number_of("deleted_ids", [])
        if not isinstance(following, int) or not isinstance(deleted, list):
            raise DataError(f"{file.path} does not say which rows it holds; it is damaged")
        ids = range(1, following)
        return ids if not deleted else sorted(set(ids).difference(deleted))

    def _frame(self, shard: int, k: int) -> OC20Frame:
        stored = self._lmdbs[shard].get(str(self._ids[shard][k]))
        if stored is None:
            raise DataError(f"row {self._ids[shard][k]} is missing; the file is damaged")
        row = _decompress(stored)
        if not isinstance(row, dict) or "numbers" not in row or "positions" not in row:
            raise DataError("is not a row of an ASE database")
        return _frame_of_row({key: _decode(value) for key, value in row.items()})


def _decompress(stored: bytes) -> Any:
    decompressor = zlib.decompressobj()
    try:
        text = decompressor.decompress(stored, _MAX_ROW)
        if decompressor.unconsumed_tail:
            raise DataError(f"decompresses to more than {_MAX_ROW} bytes, which no row of OC20 has")
        return orjson.loads(text + decompressor.flush())
    except (zlib.error, orjson.JSONDecodeError) as error:
        raise DataError(f"is not compressed JSON ({error}); the file is damaged") from error


def _decode(value: Any) -> Any:
    """Turn ASE's ``{"__ndarray__": [shape, dtype, flat]}`` into arrays, at any depth."""
    if not isinstance(value, dict):
        return value
    if "__ndarray__" not in value:
        return {key: _decode(item) for key, item in value.items()}
    try:
        shape, dtype, flat = value["__ndarray__"]
        if dtype not in ("float64", "float32", "int64", "int32", "bool", "uint8"):
            raise ValueError(f"dtype {dtype!r}")
        return np.array(flat, dtype).reshape(shape)
    except (ValueError, TypeError) as error:
        raise DataError(f"has an array that is none ({error})") from error


def _frame_of_row(row: dict[str, Any]) -> OC20Frame:
    data = row.get("data") if isinstance(row.get("data"), dict) else {}
    identity = {**row.get("key_value_pairs", {}), **(data or {})}
    n_atoms = len(row["numbers"])
    record = {
        "pos": row["positions"],
        "atomic_numbers": row["numbers"],
        "cell": row.get("cell", np.zeros((3, 3))),
        "tags": row.get("tags", np.zeros(n_atoms)),
        "fixed": _fixed(row.get("constraints", []), n_atoms),
        "pbc": row.get("pbc", [True] * 3),
        **{key: row[key] for key in ("energy", "forces") if row.get(key) is not None},
        **{key: identity[key] for key in ("sid", "fid", "ref_energy") if key in identity},
        **{
            name: identity[key]
            for name, key in (
                ("y_relaxed", "relaxed_energy"),
                ("y_init", "initial_energy"),
                ("pos_relaxed", "relaxed_positions"),
            )
            if key in identity
        },
    }
    return frame_of_record(record)


def _fixed(constraints: Any, n_atoms: int) -> NDArray[np.int64]:
    fixed = np.zeros(n_atoms, np.int64)
    for constraint in constraints if isinstance(constraints, list) else []:
        if constraint.get("name") == "FixAtoms":
            indices = np.asarray(constraint.get("kwargs", {}).get("indices", []), dtype=np.int64)
            if indices.size and not (indices.min() >= 0 and indices.max() < n_atoms):
                raise DataError(f"fixes atom {indices.max()} of {n_atoms}")
            fixed[indices] = 1
    return fixed
