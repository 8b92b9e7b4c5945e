"""Readers of single files, by kind: each yields structures, and what it cannot read, one by one.

Nothing here executes what it reads: JSON of pymatgen is taken as plain data, not decoded into the
classes it names, and pickled LMDBs go through the unpickler of data/.
"""

import bz2
import gzip
import io
import itertools
import json
import lzma
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeAlias

import ase.db
import ase.io
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ase import Atoms
from ase.io.trajectory import TrajectoryReader

from atomeq.data.oc20 import open_frames
from atomeq.graph.occupation import partly_occupied_site
from atomeq.screening.json_structures import structures_of_document, structures_of_lines

_LARGEST_JSON = 2 * 2**30  # bytes; a document is in memory at once, lines are not


class Unreadable(NamedTuple):
    """Something in a file that is no structure, and why; ``info`` is what else the file says."""

    reason: str
    info: dict[str, Any] | None = None

    @classmethod
    def of(cls, error: Exception) -> "Unreadable":
        """Say what a reader raised."""
        return cls(" ".join(f"{type(error).__name__}: {error}".split()))


Reader: TypeAlias = Callable[[Path], Iterator[Atoms | Unreadable]]


def read_extxyz(path: Path) -> Iterator[Atoms | Unreadable]:
    """Read extended XYZ frame by frame; a frame with nonsense in it does not hide the next."""
    with open_text(path) as stream:
        yield from _extxyz_frames(stream)


def read_zip(path: Path) -> Iterator[Atoms | Unreadable]:
    """Read the extended XYZ files of a zip archive, in its order, without unpacking it."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.lower().endswith((".extxyz", ".xyz")):
                with archive.open(name) as member:
                    yield from _extxyz_frames(io.TextIOWrapper(member, encoding="utf-8"))


def read_cif(path: Path) -> Iterator[Atoms | Unreadable]:
    """Read the blocks of a CIF; sites that several elements share, or that are vacant, are told."""
    with open_text(path) as stream:
        text = stream.read()
    yield from _cif(text)


def read_poscar(path: Path) -> Iterator[Atoms | Unreadable]:
    """Read a POSCAR or CONTCAR."""
    with open_text(path) as stream:
        text = stream.read()
    return _frames(io.StringIO(text), "vasp")


def read_trajectory(path: Path) -> Iterator[Atoms | Unreadable]:
    """Read ASE's trajectory."""
    with TrajectoryReader(path) as frames:
        for index in range(len(frames)):
            try:
                atoms = frames[index]
                assert isinstance(atoms, Atoms)
                yield atoms
            except Exception as error:  # ASE's readers raise anything on damaged files
                yield Unreadable.of(error)


def read_database(path: Path) -> Iterator[Atoms | Unreadable]:
    """Read an ASE database."""
    database = ase.db.connect(path)
    for row in database.select():
        try:
            atoms = row.toatoms()
            atoms.info.update({"id": row.id, **row.key_value_pairs})
            yield atoms
        except Exception as error:  # ASE's readers raise anything on damaged files
            yield Unreadable.of(error)


def read_lmdb(path: Path) -> Iterator[Atoms | Unreadable]:
    """Read LMDBs, of ASE or of OC20's pickled records."""
    frames = open_frames(path)
    for index in range(len(frames)):
        try:
            yield frames[index].to_atoms()
        except ValueError as error:
            yield Unreadable.of(error)


def read_parquet(path: Path) -> Iterator[Atoms | Unreadable]:
    """Read Parquet: columns numbers, positions (flat or by atom), cell and pbc.

    ``atomic_numbers``, ``pos`` and ``lattice`` are known too. Where there are none, a column
    ``structure``, ``cif``, ``final_structure`` or ``initial_structure`` holds the text of a CIF or
    JSON of pymatgen. Parts of a screening are read as their structures. Other columns of plain
    values are kept with each structure.
    """
    with path.open("rb") as stream, pq.ParquetFile(stream) as file:  # whatever the file's name
        there = file.schema_arrow.names
        columns = [next((n for n in names if n in there), None) for names in _PARQUET_COLUMNS]
        document = next((name for name in _DOCUMENTS if name in there), None)
        if None not in columns[:2]:
            document = None
        elif document is None:
            raise ValueError(
                f"{path} has neither columns numbers and positions nor one of "
                f"{', '.join(_DOCUMENTS)}; it has {', '.join(there)}"
            )
        used = [name for name in (columns if document is None else [document]) if name is not None]
        plain = [f.name for f in file.schema_arrow if _is_plain(f.type) and f.name not in used]
        for batch in file.iter_batches(batch_size=256, columns=[*used, *plain]):
            for row in batch.to_pylist():
                values = [None if column is None else row[column] for column in columns]
                item = _atoms_of_document(row[document]) if document else _atoms_of_row(*values)
                about = {name: row[name] for name in plain}
                if isinstance(item, Unreadable):
                    yield item._replace(info=about)
                    continue
                item.info.update(about)
                yield item


def read_json(path: Path) -> Iterator[Atoms | Unreadable]:
    """Read a JSON document of pymatgen's structures or an OPTIMADE response."""
    with open_text(path) as stream:
        text = stream.read(_LARGEST_JSON + 1)
    if len(text) > _LARGEST_JSON:
        yield Unreadable("the document is larger than 2 GiB; write one structure per line (.jsonl)")
        return
    for item in structures_of_document(json.loads(text)):
        yield Unreadable.of(item) if isinstance(item, Exception) else item


def read_json_lines(path: Path) -> Iterator[Atoms | Unreadable]:
    """Read one JSON structure per line, of pymatgen or OPTIMADE."""
    with open_text(path) as stream:
        for item in structures_of_lines(stream):
            yield Unreadable.of(item) if isinstance(item, Exception) else item


#: Reader by kind.
KINDS: dict[str, Reader] = {
    "extxyz": read_extxyz,
    "zip of extxyz": read_zip,
    "CIF": read_cif,
    "POSCAR": read_poscar,
    "traj": read_trajectory,
    "ase.db": read_database,
    "LMDB": read_lmdb,
    "Parquet": read_parquet,
    "JSON": read_json,
    "JSON lines": read_json_lines,
}

#: How many structures there are in a file, for the kinds that tell at once.
COUNTERS: dict[str, Callable[[Path], int]] = {
    "extxyz": lambda path: _count_extxyz(path),
    "CIF": lambda path: 1,  # as good as always
    "POSCAR": lambda path: 1,
    "traj": lambda path: len(TrajectoryReader(path)),
    "ase.db": lambda path: ase.db.connect(path).count(),
    "LMDB": lambda path: len(open_frames(path)),
    "Parquet": lambda path: pq.read_metadata(path).num_rows,
}

_SUFFIXES = {
    ".extxyz": "extxyz",
    ".xyz": "extxyz",
    ".cif": "CIF",
    ".vasp": "POSCAR",
    ".poscar": "POSCAR",
    ".traj": "traj",
    ".db": "ase.db",
    ".lmdb": "LMDB",
    ".aselmdb": "LMDB",
    ".parquet": "Parquet",
    ".json": "JSON",
    ".jsonl": "JSON lines",
    ".zip": "zip of extxyz",
}
_TEXT = ("extxyz", "CIF", "POSCAR", "JSON", "JSON lines")
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_DOCUMENTS = ("structure", "cif", "final_structure", "initial_structure")
_PARQUET_COLUMNS = (
    ("numbers", "atomic_numbers"),
    ("positions", "pos"),
    ("cell", "lattice"),
    ("pbc",),
)


def kind_of(path: Path) -> str | None:
    """Return the kind of a file by its name; None where it is not known."""
    packed = path.suffix.lower() in _OPENERS
    name = path.with_suffix("").name if packed else path.name
    kind = _SUFFIXES.get(Path(name).suffix.lower())
    if kind is None and name.upper().startswith(("POSCAR", "CONTCAR")):
        kind = "POSCAR"
    return kind if not packed or kind in _TEXT else None


def open_text(path: Path) -> TextIO:
    """Open a text that may be compressed, by its suffix."""
    opener = _OPENERS.get(path.suffix.lower(), open)
    return opener(path, "rt", encoding="utf-8")


def _next_line(stream: TextIO) -> str:
    """Return the next line that is not blank, or nothing at the end."""
    return next((line for line in stream if line.strip()), "")


def _extxyz_frames(stream: TextIO) -> Iterator[Atoms | Unreadable]:
    while header := _next_line(stream):
        try:
            n_atoms = int(header)
        except ValueError:
            yield Unreadable(f"{header.strip()[:40]!r} stands where a number of atoms should")
            return  # where the next frame begins nobody knows
        lines = list(itertools.islice(stream, n_atoms + 1))
        if len(lines) < n_atoms + 1:
            yield Unreadable(f"a frame of {n_atoms} atoms is cut short")
            return
        yield from _attempt(io.StringIO(header + "".join(lines)), "extxyz")


def _frames(stream: TextIO, file_format: str) -> Iterator[Atoms | Unreadable]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of details of the format
        frames: Any = ase.io.read(stream, index=":", format=file_format)
    yield from frames


def _attempt(stream: TextIO, file_format: str) -> Iterator[Atoms | Unreadable]:
    try:
        yield from _frames(stream, file_format)
    except Exception as error:  # ASE's readers raise anything on damaged files
        yield Unreadable.of(error)


def _count_extxyz(path: Path) -> int:
    count = 0
    with open_text(path) as stream:
        while (header := _next_line(stream)) and header.strip().isdigit():
            next(itertools.islice(stream, int(header), None), None)
            count += 1
    return count


def _is_plain(kind: pa.DataType) -> bool:
    """Tell whether a column holds numbers, flags or texts; those repeated in every row do not."""
    texts = (pa.types.is_string, pa.types.is_large_string)
    return pa.types.is_primitive(kind) or any(is_text(kind) for is_text in texts)


def _atoms_of_document(value: Any) -> Atoms | Unreadable:
    """Return the structure of a cell: the text of a CIF, or pymatgen's JSON as text or columns."""
    if not value:
        return Unreadable("the row holds no structure")
    try:
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            found = list(_cif(value))
        else:
            document = json.loads(value) if isinstance(value, str) else value
            items = structures_of_document(document)
            found = [Unreadable.of(i) if isinstance(i, Exception) else i for i in items]
    except Exception as error:  # ASE's readers raise anything on damaged files
        return Unreadable.of(error)
    if len(found) != 1:
        return Unreadable(f"the row holds {len(found)} structures, not one")
    return found[0]


def _cif(text: str) -> Iterator[Atoms | Unreadable]:
    for frame in _frames(io.StringIO(text), "cif"):
        why = partly_occupied_site(frame.info) if isinstance(frame, Atoms) else ""
        yield Unreadable(why) if why else frame


def _atoms_of_row(numbers: Any, positions: Any, cell: Any, pbc: Any) -> Atoms | Unreadable:
    if not numbers:
        return Unreadable("the row holds no atoms")
    try:
        matrix = np.zeros((3, 3)) if cell is None else np.reshape(np.asarray(cell, float), (3, 3))
        return Atoms(
            numbers=np.asarray(numbers),
            positions=np.reshape(np.asarray(positions, float), (len(numbers), 3)),
            cell=matrix,
            pbc=np.abs(matrix).sum() > 0 if pbc is None else pbc,
        )
    except (ValueError, TypeError) as error:
        return Unreadable.of(error)
