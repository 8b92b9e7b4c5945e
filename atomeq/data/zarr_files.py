"""Zarr stores of plain numbers: what a store is made of is looked at before Zarr opens it.

The format leaves open what types and codecs there are, and asks registries for them; here numbers
are read, through codecs that only pack bytes, of format 3. Whatever is missing would read as
fill values: a store lacks no chunk, or it is refused.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atomeq.data.ase_files import DataError

_TYPES = {"bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))}
_TYPES |= {"float32", "float64"}
_CODECS = {"bytes", "transpose", "sharding_indexed", "blosc", "zstd", "gzip", "crc32c"}
_SHARD = 64  # chunks in a file
_KEPT = 64  # chunks in memory, of each field


@contextmanager
def create_zarr(path: Path) -> Iterator[Any]:
    """Yield the group of a new store, in which every chunk is written, those of fill values too."""
    with _zarr().config.set({"array.write_empty_chunks": True}):
        yield _zarr().open_group(path, mode="w", zarr_format=3)


def add_array(group: Any, name: str, values: Any, n_rows: int, chunk: int, fill: Any) -> None:
    """Add an array of ``n_rows`` rows of ``fill``, like values (n, ...), to a group.

    Args:
        group: From :func:`create_zarr`.
        name: Of the array.
        values: What will be written behind these rows.
        n_rows: How many come before.
        chunk: Rows that are compressed together.
        fill: What rows hold until they are written.
    """
    from zarr.codecs import BloscCodec

    array = group.create_array(
        name,
        shape=(n_rows, *values.shape[1:]),
        dtype=values.dtype,
        chunks=(chunk, *values.shape[1:]),
        shards=(_SHARD * chunk, *values.shape[1:]),
        compressors=BloscCodec(cname="zstd", shuffle="shuffle", typesize=values.dtype.itemsize),
        fill_value=fill,
    )
    for start in range(0, n_rows, _SHARD * chunk):
        array[start : start + _SHARD * chunk] = fill


class Rows:
    """Rows of an array; the chunks that were read last are kept, as HDF5 does by itself.

    Args:
        array: Of Zarr.
    """

    def __init__(self, array: Any) -> None:
        self.attrs, self.shape, self._array = dict(array.attrs), array.shape, array
        self._size = int(array.chunks[0])
        self._chunk = lru_cache(_KEPT)(self._read)

    def _read(self, k: int) -> NDArray[Any]:
        return self._array[k * self._size : (k + 1) * self._size]

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """Return a copy of some rows in a row."""
        start, stop, _ = rows.indices(self.shape[0])
        chunks = range(start // self._size, -(-stop // self._size))
        starts = [k * self._size for k in chunks]
        parts = zip(map(self._chunk, chunks), starts, strict=True)
        return np.concatenate([some[max(start - at, 0) : stop - at] for some, at in parts])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return all rows, which are not kept."""
        return np.asarray(self._array[:], dtype)


def open_zarr(path: Path) -> tuple[dict[str, Any], dict[str, Rows]]:
    """Return the attributes and the arrays of a store.

    Raises:
        DataError: It is no Zarr store, holds other things than numbers, or lacks some of them.
    """
    root = _document(path, "group")
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
    for folder in folders:
        _check(folder, _document(folder, "array"))
    store = _zarr().storage.LocalStore(path, read_only=True)
    arrays = [_zarr().open_array(store, path=folder.name, zarr_format=3) for folder in folders]
    rows = {folder.name: Rows(one) for folder, one in zip(folders, arrays, strict=True)}
    return root.get("attributes", {}), rows


def _document(folder: Path, node: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))
        if (found["zarr_format"], found["node_type"]) == (3, node):
            return found
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder} is no Zarr {node} of format 3 ({error!r})") from error
    raise DataError(f"{folder} is no Zarr {node} of format 3")


def _check(folder: Path, array: dict[str, Any]) -> None:
    try:
        foreign = {str(array["data_type"])} - _TYPES or set(_codecs(array["codecs"])) - _CODECS
        sizes = array["chunk_grid"]["configuration"]["chunk_shape"]
        whole = math.prod(-(-n // size) for n, size in zip(array["shape"], sizes, strict=True))
    except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise DataError(f"{folder} is no Zarr array of format 3 ({error!r})") from error
    if foreign or array.get("storage_transformers"):
        raise DataError(
            f"{folder} is stored as {', '.join(sorted(foreign)) or 'something transformed'}; only "
            f"numbers are read, packed by {', '.join(sorted(_CODECS))}"
        )
    there = sum(file.is_file() and file.name != "zarr.json" for file in folder.rglob("*"))
    if there != whole:
        raise DataError(f"{folder} has {there} of its {whole} chunks: copy the store again, whole")


def _codecs(codecs: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the names of codecs, and of those within codecs."""
    for codec in codecs:
        yield str(codec["name"])
        inner = codec.get("configuration", {})
        for key in ("codecs", "index_codecs"):
            yield from _codecs(inner.get(key, []))


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ImportError("data in .zarr need Zarr: pip install atomeq[zarr]") from error
    return zarr
