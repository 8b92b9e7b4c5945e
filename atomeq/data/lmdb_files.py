"""LMDB files opened for reading: once per process, never shared over a fork, random access."""

import os
import weakref
from pathlib import Path

import lmdb

from atomeq.data.ase_files import DataError

# py-lmdb refuses to open a file twice in one process, but training and validation may share one.
_OPEN: weakref.WeakValueDictionary[tuple[int, Path], lmdb.Environment] = (
    weakref.WeakValueDictionary()
)


class LmdbFile:
    """One LMDB file, read only.

    A data-loader worker that was forked or spawned opens the file for itself: a map of the parent
    must not be used there. Copies and pickles hold the path alone.

    Args:
        path: The file (not a folder with ``data.mdb`` in it).

    Raises:
        DataError: There is no such file, or it is no LMDB.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).resolve()
        self._environment: lmdb.Environment | None = None
        self._pid = -1
        self.environment()

    def environment(self) -> lmdb.Environment:
        """Return this process's environment."""
        if self._environment is not None and self._pid == os.getpid():
            return self._environment
        if self._environment is not None:
            self._environment.close()  # the parent's map, inherited; the parent keeps its own
        self._pid = os.getpid()
        self._environment = _OPEN.get((self._pid, self.path)) or self._open()
        _OPEN[self._pid, self.path] = self._environment
        return self._environment

    def get(self, key: str) -> bytes | None:
        """Return the value of a key, or None.

        Raises:
            DataError: The file is damaged.
        """
        try:
            with self.environment().begin() as transaction:
                return transaction.get(key.encode("ascii"))
        except lmdb.Error as error:
            raise DataError(f"{self.path}: cannot read {key!r} ({error}); it is damaged") from error

    @property
    def n_entries(self) -> int:
        """Number of keys of any kind."""
        return self.environment().stat()["entries"]

    def _open(self) -> lmdb.Environment:
        if not self.path.is_file():
            raise DataError(f"there is no LMDB file {self.path}")
        try:
            return lmdb.open(
                str(self.path),
                subdir=False,
                readonly=True,
                lock=False,  # published files may lie in folders nobody can write to
                readahead=False,  # shuffled access would read pages it never needs
                meminit=False,
                max_spare_txns=1,
            )
        except lmdb.Error as error:
            raise DataError(
                f"{self.path} is not an LMDB, or is cut short ({error}); fetch or write it anew"
            ) from error

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.path = state["path"]
        self._environment = None
        self._pid = -1
