"""Sources: files and folders of any kind become a stream of structures, never a list in memory.

What cannot be read is yielded too, with its reason: it becomes a row in quarantine. Readers of
single formats are in readers.py.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ase import Atoms

from atomeq.graph.electrons import ELECTRON_KEYS
from atomeq.graph.hyperedges import INFO_KEY
from atomeq.screening.readers import COUNTERS, KINDS, Reader, Unreadable, kind_of


class Found(NamedTuple):
    """A structure of a source, or why there is none.

    Attributes:
        locator: ``file#index``, the file as the source was given, the index from 0.
        atoms: The structure, without calculator; None where it cannot be read.
        error: Why not.
        info: What the source says of it beside, such as its id; by default ``atoms.info``.
    """

    locator: str
    atoms: Atoms | None
    error: str = ""
    info: Mapping[str, Any] | None = None

    @property
    def about(self) -> Mapping[str, Any]:
        """What the source says of it."""
        return self.info if self.info is not None else getattr(self.atoms, "info", None) or {}


def read_sources(
    sources: Iterable[str | Path], *, working_directory: str | Path = "."
) -> Iterator[Found]:
    """Yield the structures of files and folders, in an order that is always the same.

    In folders, at any depth, files of known names are read: CIF, POSCAR, extxyz and zips of it,
    traj, ASE databases, ASE-LMDB, LMDB of OC20, Parquet and JSON of pymatgen or OPTIMADE; others
    are passed over, and so are names that begin with a dot.

    Args:
        sources: Paths.
        working_directory: What relative paths are relative to.

    Yields:
        Structures, and what cannot be read.

    Raises:
        FileNotFoundError: There is no such file or folder; found before the first structure.
        ValueError: A folder holds no file of a known kind, or a file is of no known kind.
    """
    root = Path(working_directory)
    given = [Path(source) for source in sources]
    for path in given:
        _refuse(root / path)
    return (found for path in given for found in _read(root, path))


def count_structures(sources: Iterable[str | Path]) -> int | None:
    """Return how many structures sources hold, without building them; None where that is not known.

    JSON documents do not tell before they are read.

    Args:
        sources: Files and folders.
    """
    total = 0
    for source in map(Path, sources):
        for file in _files(source) if source.is_dir() else [source]:
            counter = COUNTERS.get(kind_of(file) or "")
            if counter is None:
                return None
            try:
                total += counter(file)
            except Exception:  # a damaged file, which ASE's readers meet with anything, is one row
                total += 1
    return total


def _refuse(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    known = ", ".join(KINDS)
    if path.is_dir():
        if next(_files(path), None) is None:
            raise ValueError(f"{path} holds no structure file; known kinds are {known}")
    elif kind_of(path) is None:
        raise ValueError(f"{path} is of no known kind; known are {known}")


def _read(root: Path, path: Path) -> Iterator[Found]:
    whole = root / path
    files = _files(whole) if whole.is_dir() else iter([whole])
    for file in files:
        shown = str(path if file == whole else path / file.relative_to(whole))
        yield from _read_file(file, shown)


def _files(folder: Path) -> Iterator[Path]:
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(directory, name)
            if not name.startswith(".") and kind_of(path) is not None:
                yield path


def _read_file(file: Path, shown: str) -> Iterator[Found]:
    kind = kind_of(file)
    assert kind is not None
    for index, item in enumerate(_whole(KINDS[kind], file)):
        locator = f"{shown}#{index}"
        if isinstance(item, Unreadable):
            yield Found(locator, None, item.reason, item.info)
            continue
        # Labels of the file are not those of the potential; what perceives bonds reads INFO_KEY.
        about, item.calc = item.info, None
        item.info = {key: about[key] for key in (INFO_KEY, *ELECTRON_KEYS) if key in about}
        yield Found(locator, item, info=about)


def _whole(reader: Reader, file: Path) -> Iterator[Atoms | Unreadable]:
    """Yield what a reader yields, and what ends it; an empty file too is told."""
    empty = True
    try:
        for item in reader(file):
            empty = False
            yield item
    except Exception as error:  # readers of ASE raise anything from IndexError to XMLSyntaxError
        yield Unreadable.of(error)
        return
    if empty:
        yield Unreadable("the file holds no structure: it is empty or cut short")
