"""Structures in one HDF5 file or Zarr store, for sets larger than memory: those wanted are read.

Fields of atoms and of structures stand in one data set each, one structure after another, under the
names of :class:`~atomeq.graph.atom_graph.AtomGraph` and in its units: ``pos`` (n_atoms, 3) Å,
``atomic_numbers``, ``cell`` (n_structures, 3, 3) Å, ``pbc``, ``natoms``, labels ``energy`` eV,
``forces`` eV/Å, ``stress`` eV/Å³ in ASE's sign, ``scalar``, ``weight``, and whatever else the
structures had. NaN marks a label that is not known.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import torch
from ase import Atoms
from numpy.typing import ArrayLike, NDArray

from atomeq.data.ase_files import LABEL_WEIGHTS, DataError, other_labels
from atomeq.data.batching import LABELS, DatasetOnDisk
from atomeq.data.molecule_files import STORED_FORMATS
from atomeq.data.zarr_files import add_array, create_zarr, open_zarr
from atomeq.files import write_atomically, write_folder_atomically
from atomeq.graph.atom_graph import UNKNOWN, AtomGraph
from atomeq.graph.builders import GraphBuilder
from atomeq.graph.convert import from_ase
from atomeq.graph.to_structures import to_ase

# h5py's own types tell groups from data sets at run time alone, and zarr may be absent.
_File: TypeAlias = Any
_Fields: TypeAlias = dict[str, Any]
_FORMAT = "atomeq structures"
_AT_ONCE = 1000  # structures written together
_CHUNK = 1024  # rows that are compressed together, and read together


def write_stored(
    path: str | os.PathLike[str],
    structures: Iterator[Atoms],
    *,
    report: Callable[[int], None] | None = None,
) -> int:
    """Write structures with their labels into one file.

    Args:
        path: ``.h5`` or ``.hdf5``, or ``.zarr``, a folder.
        structures: As :func:`~atomeq.data.ase_files.read_structures` yields them.
        report: Called with the number of structures done.

    Returns:
        How many there are.

    Raises:
        DataError: The suffix is another, or there are no structures.
    """
    if Path(path).suffix not in STORED_FORMATS:
        raise DataError(f"cannot write {path}: give it a suffix of {', '.join(STORED_FORMATS)}")
    n_done = 0
    with _created(Path(path)) as file:
        file.attrs.update({"format": _FORMAT, "version": 1})
        while some := list(itertools.islice(structures, _AT_ONCE)):
            graph = AtomGraph.concatenate([_labelled(atoms) for atoms in some])
            _append(file, graph.replace(batch=None), n_done)
            n_done += len(some)
            if report is not None:
                report(n_done)
        if not n_done:
            raise DataError(f"there are no structures to write into {path}")
    return n_done


@contextmanager
def _created(path: Path) -> Iterator[_File]:
    if STORED_FORMATS[path.suffix] == "zarr":
        if path.exists() and not (path / "zarr.json").is_file():
            raise DataError(f"{path} exists and is no Zarr store: it is not replaced")
        with write_folder_atomically(path) as partial, create_zarr(partial) as group:
            yield group
    else:
        with write_atomically(path) as partial, h5py.File(partial, "w") as file:
            yield file


def _labelled(atoms: Atoms) -> AtomGraph:
    graph = from_ase(atoms)
    given = {key: atoms.info[key] for key in LABEL_WEIGHTS if key in atoms.info}
    weights = {k: torch.tensor([v], dtype=torch.float64) for k, v in given.items()}
    return graph.replace(**weights, **other_labels(atoms))


def _append(file: _File, graph: AtomGraph, n_before: int) -> None:
    """Add structures; a field that only some have holds for the others what says that it lacks."""
    n_atoms_before = file["pos"].shape[0] if "pos" in file else 0
    for name in dict.fromkeys([*graph.keys(), *file]):
        n_rows = graph.n_atoms if _of_atoms(name, graph, file) else graph.n_graphs
        start = n_atoms_before if n_rows == graph.n_atoms else n_before
        if name not in file:
            _add(file, name, graph[name].numpy(), start)
            file[name].attrs["of"] = "atoms" if n_rows == graph.n_atoms else "structures"
        data: Any = file[name]
        data.resize((start + n_rows, *data.shape[1:]))
        data[start:] = graph[name].numpy() if name in graph else UNKNOWN.get(name, 0)


def _add(file: _File, name: str, values: NDArray[Any], n_rows: int) -> None:
    """Add rows that lack a field, before those that have it."""
    fill = UNKNOWN.get(name, 0)
    if not isinstance(file, h5py.File):
        return add_array(file, name, values, n_rows, _CHUNK, fill)
    file.create_dataset(
        name,
        shape=(n_rows, *values.shape[1:]),
        maxshape=(None, *values.shape[1:]),
        dtype=values.dtype,
        chunks=(_CHUNK, *values.shape[1:]),
        fillvalue=fill,
        compression="gzip",
        shuffle=True,
    )


def _of_atoms(name: str, graph: AtomGraph, file: _File) -> bool:
    if name in file:
        return file[name].attrs["of"] == "atoms"
    return graph.level(name) == "atom"


class StoredStructures(Sequence[AtomGraph]):
    """Structures of such files, one after another, or some of them; each is read when asked for.

    Every process opens the files for itself: a handle must not pass a fork.

    Args:
        paths: The files.
        chosen: Numbers of the structures that count, all by default.

    Raises:
        DataError: A file is missing or is not of this format.
    """

    def __init__(
        self, paths: Sequence[str | os.PathLike[str]], chosen: ArrayLike | None = None
    ) -> None:
        self.paths = [Path(path) for path in paths]
        self._handles: tuple[int, list[_Fields]] = (-1, [])
        sizes = [np.asarray(file["natoms"]) for file in self._files()]
        self._first = [np.concatenate(([0], np.cumsum(some))) for some in sizes]
        self._ends = np.cumsum([len(some) for some in sizes])
        self._sizes = np.concatenate(sizes).astype(np.int64)
        self._chosen = np.arange(len(self._sizes)) if chosen is None else np.asarray(chosen)

    def subset(self, chosen: ArrayLike) -> "StoredStructures":
        """Return some of these, by their numbers here."""
        return StoredStructures(self.paths, self._chosen[np.asarray(chosen, dtype=np.int64)])

    @property
    def n_atoms(self) -> NDArray[np.int64]:
        """Atoms of each structure."""
        return self._sizes[self._chosen]

    @cached_property
    def elements(self) -> list[int]:
        """The atomic numbers that occur in the files, ascending."""
        found = [np.unique(file["atomic_numbers"]) for file in self._files()]
        return np.unique(np.concatenate(found)).tolist()

    @cached_property
    def labels(self) -> set[str]:
        """The labels that at least one structure of the files has."""
        return {name for name in LABELS if any(_known(file, name) for file in self._files())}

    def place(self, index: int) -> str:
        """Return where a structure stands: file and frame."""
        part, frame = self._locate(index)
        return f"{self.paths[part]}, frame {frame}"

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: Any) -> Any:
        """Return a structure without edges; the labels of the files are all there, perhaps NaN."""
        if not 0 <= index < len(self):
            raise IndexError(f"structure {index} of {len(self)}")
        part, frame = self._locate(index)
        atoms = slice(self._first[part][frame], self._first[part][frame + 1])
        fields: dict[str, torch.Tensor] = {}
        for name, data in self._files()[part].items():
            rows = atoms if data.attrs["of"] == "atoms" else slice(frame, frame + 1)
            fields[name] = torch.from_numpy(np.asarray(data[rows]))
        return AtomGraph(**fields)

    def _locate(self, index: int) -> tuple[int, int]:
        number = int(self._chosen[index])
        part = int(np.searchsorted(self._ends, number, side="right"))
        return part, number - (int(self._ends[part - 1]) if part else 0)

    def _files(self) -> list[_Fields]:
        if self._handles[0] != os.getpid():
            self._handles = os.getpid(), [_open(path) for path in self.paths]
        return self._handles[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": (-1, [])}


class StoredDataset(DatasetOnDisk):
    """Structures of such files as graphs; the edges of a batch are built when it is asked for.

    Args:
        structures: Which.
        builder: Makes the edges.
        name: What errors call this set.
    """

    structures_of = "structures on disk"

    def __init__(
        self, structures: StoredStructures, builder: GraphBuilder, *, name: str = "data"
    ) -> None:
        self.structures = structures
        self.builder = builder
        self.name = name

    def __len__(self) -> int:
        return len(self.structures)

    def _batch(self, indices: Sequence[int]) -> AtomGraph:
        graph = AtomGraph.concatenate([self.structures[index] for index in indices])
        if "weight" not in graph:
            graph = graph.replace(weight=torch.ones(graph.n_graphs, dtype=torch.float64))
        return self._with_edges(graph, ", ".join(map(self.place, indices)))

    def place(self, index: int) -> str:
        """Return file and frame of a structure."""
        return self.structures.place(index)

    @property
    def labels(self) -> set[str]:
        """The labels that at least one of the structures has."""
        return self.structures.labels

    @property
    def n_atoms(self) -> NDArray[np.int64]:
        """Atoms of each structure."""
        return self.structures.n_atoms

    @property
    def elements(self) -> list[int]:
        """The atomic numbers that occur."""
        return self.structures.elements

    def sample(self) -> Sequence[AtomGraph]:
        """Return up to 1,000 structures, evenly spread, with their edges."""
        return [self._batch([k]) for k in self._sampled()]


def read_stored(path: Path) -> Iterator[Atoms]:
    """Yield the structures of a file with their labels, as ASE's Atoms.

    Args:
        path: Of a file of :func:`write_stored`.
    """
    for graph in StoredStructures([path]):
        (atoms,) = to_ase(graph)
        if "scalar" in graph and bool(torch.isfinite(graph["scalar"]).all()):
            atoms.info["scalar"] = float(graph["scalar"][0])
        yield atoms


def _open(path: Path) -> _Fields:
    """Return the fields by name; those of HDF5 keep their file open."""
    kind = "Zarr" if path.suffix == ".zarr" else "HDF5"
    if kind == "Zarr":
        attributes, fields = open_zarr(path)
    else:
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise DataError(f"{path} is no HDF5 file, or is cut short ({error})") from error
        attributes, fields = file.attrs, dict(file.items())
    if attributes.get("format") != _FORMAT:
        raise DataError(
            f"{path} is {kind} of another layout; `atomeq data convert SOURCE {path.name}` writes "
            "ours from any structures that ASE reads"
        )
    return fields


def _known(file: _Fields, name: str) -> bool:
    if name not in file:
        return False
    data: Any = file[name]
    starts = range(0, data.shape[0], 100 * _CHUNK)
    return any(np.isfinite(data[start : start + 100 * _CHUNK]).any() for start in starts)
