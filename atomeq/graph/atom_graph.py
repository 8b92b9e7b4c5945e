"""AtomGraph: one or many structures with their edges, the only thing that models are fed.

It is always a batch; a single structure is a batch of one. Builders make it, models unpack it once.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from atomeq.traces import known_to_the_host
from atomeq.typing import (
    OF_STRUCTURES,
    AtomicNumbers,
    BatchIndex,
    CellOffsets,
    Cells,
    EdgeIndex,
    EdgeVectors,
    Energies,
    Forces,
    GraphCounts,
    Periodicity,
    Positions,
    Strain,
    Stress,
    Volumes,
)

#: Å³; a cell with less has no volume: its stress is not defined, and it can not relax.
MIN_VOLUME = 1e-6

Level = Literal["atom", "edge", "graph", "hyperedge", "incidence"]

#: What a graph without the field holds for it once it stands in a batch with graphs that have it.
#: A label that nobody computed is NaN, so that it cannot pass for a number.
UNKNOWN: dict[str, float | bool] = {
    "tags": 0,
    "fixed": False,
    "velocities": 0.0,
    "charge": 0,
    "multiplicity": 0,
    "num_hyperedges": 0,
    **dict.fromkeys(("weight", "energy_weight", "forces_weight", "stress_weight"), 1.0),
    **dict.fromkeys(("masses", "forces", "forces_uncertainty", *OF_STRUCTURES), float("nan")),
    "born_effective_charges": float("nan"),
}
# In float32 the total of a large structure loses its meV.
_ALWAYS_DOUBLE = ("energy", "scalar")
_FIELDS: dict[Level, str] = {
    "atom": (
        "pos atomic_numbers batch tags fixed velocities masses forces forces_uncertainty "
        "born_effective_charges"
    ),
    "graph": (
        "cell pbc natoms energy energy_uncertainty stress scalar weight head charge multiplicity "
        "energy_weight forces_weight stress_weight "
        "num_hyperedges dipole quadrupole polarizability"
    ),
    "edge": "edge_index cell_offsets",
    "incidence": "hyperedge_index",
    "hyperedge": "hyperedge_type",
}
_LEVELS: dict[str, Level] = {
    name: level for level, names in _FIELDS.items() for name in names.split()
}


class AtomGraph:
    """Structures and their edges, concatenated.

    ``edge_index[0]`` is the source or neighbour j, ``edge_index[1]`` the target or centre i, and
    the edge vector ``pos[j] - pos[i] + cell_offsets @ cell`` points from i to the image of j. Edges
    are sorted by i, then j, then offset. Fields are attributes; reading an absent one is an
    AttributeError, or gives None for ``pos``, ``edge_index`` and ``batch``; ``"energy" in graph``
    tells.

    Args:
        pos: (n_atoms, 3), Å; without it the graph is empty, to be filled by its maker.
        atomic_numbers: (n_atoms,).
        cell: (n_graphs, 3, 3), Å, rows are lattice vectors; zeros where there is no cell.
        pbc: (n_graphs, 3); not periodic by default.
        edge_index: (2, n_edges).
        cell_offsets: (n_edges, 3), the image of j in lattice vectors.
        natoms: (n_graphs,) atoms of each structure; all atoms are one structure by default.
        batch: (n_atoms,) structure of each atom, ascending; follows from ``natoms``.
        kwargs: ``tags`` (n_atoms,), ``fixed`` (n_atoms,) bool, ``velocities`` (n_atoms, 3) Å/fs,
            ``masses`` (n_atoms,) amu, labels ``energy`` (n_graphs,) eV, ``forces`` (n_atoms, 3)
            eV/Å, ``stress`` (n_graphs, 3, 3) eV/Å³, ``dipole`` (n_graphs, 3) e·Å, ``quadrupole``
            and ``polarizability`` (n_graphs, 3, 3), ``born_effective_charges`` (n_atoms, 3, 3) e,
            ``scalar`` (n_graphs,) in the unit of the
            property that is learned, ``weight`` (n_graphs,), ``charge`` (n_graphs,) e and
            ``multiplicity`` (n_graphs,), 0 where nobody said, ``head`` (n_graphs,) which of the
            heads of a potential it is of, ``hyperedge_index``
            (2, n_incidences) with ``num_hyperedges`` (n_graphs,) and ``hyperedge_type``
            (n_hyperedges,), and any other tensor: it belongs to the edges if its name starts with
            ``edge_``, else to the atoms or structures by its length.

    PyTorch's DataLoader joins graphs with ``collate_fn=AtomGraph.concatenate``; for PyG's Batch and
    DataLoader there is :mod:`atomeq.graph.pyg`.

    Raises:
        ValueError: The shapes contradict each other.

    Example:
        >>> water = AtomGraph(torch.rand(3, 3), torch.tensor([8, 1, 1]))
        >>> AtomGraph.concatenate([water, water]).natoms
        tensor([3, 3])
    """

    if TYPE_CHECKING:
        pos: Positions
        batch: BatchIndex
        edge_index: EdgeIndex
        atomic_numbers: AtomicNumbers
        cell: Cells
        pbc: Periodicity
        natoms: GraphCounts
        cell_offsets: CellOffsets
        energy: Energies
        forces: Forces
        stress: Stress

        def __getattr__(self, name: str) -> Any: ...
    else:
        pos = batch = edge_index = None

    def __init__(
        self,
        pos: Positions | None = None,
        atomic_numbers: AtomicNumbers | None = None,
        *,
        cell: Cells | None = None,
        pbc: Periodicity | None = None,
        edge_index: EdgeIndex | None = None,
        cell_offsets: CellOffsets | None = None,
        natoms: GraphCounts | None = None,
        batch: BatchIndex | None = None,
        **kwargs: Tensor | None,
    ) -> None:
        if pos is None:
            return
        if natoms is None and batch is not None:
            natoms = torch.bincount(batch)
        if natoms is None:
            natoms = torch.tensor([pos.shape[0]], device=pos.device)
            batch = torch.zeros(pos.shape[0], dtype=torch.int64, device=pos.device)
        n_graphs = natoms.shape[0]
        if batch is None:
            batch = torch.arange(n_graphs, device=pos.device).repeat_interleave(natoms)
        if cell is None:
            cell = pos.new_zeros(n_graphs, 3, 3)
        if pbc is None:
            pbc = torch.zeros(n_graphs, 3, dtype=torch.bool, device=pos.device)
        _check_shapes(pos, atomic_numbers, cell, pbc, natoms, batch)
        given = {
            "pos": pos,
            "atomic_numbers": atomic_numbers,
            "cell": cell,
            "pbc": pbc,
            "natoms": natoms,
            "batch": batch,
            "edge_index": edge_index,
            "cell_offsets": cell_offsets,
            **kwargs,
        }
        for name, value in given.items():
            if value is not None:
                self[name] = value

    def __getitem__(self, name: str) -> Tensor:
        """Return a field by its name."""
        return self.__dict__[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        """Set a field by its name; ValueError for one that would hide a method."""
        if name not in _LEVELS and hasattr(AtomGraph, name):
            raise ValueError(f"a field cannot be named {name!r}: AtomGraph.{name} is taken")
        self.__dict__[name] = value

    def __contains__(self, name: str) -> bool:
        """Whether the graph has a field."""
        return name in self.__dict__

    def __repr__(self) -> str:
        """Name the fields and their shapes."""
        shapes = (f"{name}={list(value.shape)}" for name, value in self.__dict__.items())
        return f"AtomGraph({', '.join(shapes)})"

    def keys(self) -> list[str]:
        """Return the names of the fields."""
        return list(self.__dict__)

    def to_dict(self) -> dict[str, Tensor]:
        """Return the fields by name."""
        return dict(self.__dict__)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the field ``name``, or ``default`` where there is none."""
        return self.__dict__.get(name, default)

    @property
    def n_atoms(self) -> int:
        """Number of atoms in all structures."""
        return self.pos.shape[0]

    @property
    def n_graphs(self) -> int:
        """Number of structures."""
        return self.natoms.shape[0]

    @property
    def n_edges(self) -> int:
        """Number of directed edges; 0 before a builder made them."""
        return 0 if self.edge_index is None else self.edge_index.shape[1]

    def edge_vectors(self) -> EdgeVectors:
        """Return the vectors from each target to its source's image.

        Returns:
            (n_edges, 3), Å; differentiable in ``pos`` and ``cell``.

        Raises:
            ValueError: The graph has no edges yet.
        """
        if self.edge_index is None:
            raise ValueError(
                "this AtomGraph has no edges yet; make them with a builder, "
                "for example RadiusGraph(cutoff=5.0)(graph)"
            )
        source, target = self.edge_index
        # index_select, for the gradient of plain indexing is a much slower scatter on CPUs.
        vectors = self.pos.index_select(0, source) - self.pos.index_select(0, target)
        if self._without_images():
            return vectors
        offsets = self.cell_offsets.to(vectors.dtype)[:, None, :]  # (n_edges, 1, 3)
        cells = self.cell.index_select(0, self.batch.index_select(0, target))
        return vectors + torch.bmm(offsets, cells)[:, 0]

    def _without_images(self) -> bool:
        """Tell whether no edge can reach into another cell, where looking costs next to nothing.

        A GPU would have to be waited for, and a trace, whose tensors are of another class, must
        serve crystals too.
        """
        return known_to_the_host(self.cell_offsets) and not bool(self.cell_offsets.any())

    def strained(self, strain: Strain) -> "AtomGraph":
        """Return a shallow copy deformed homogeneously by I + (strain + strainᵀ) / 2.

        Only the symmetric part acts: a rotation changes no energy, and keeping it would make the
        derivative, the stress, depend on how the strain is parametrised.

        Args:
            strain: (n_graphs, 3, 3), without unit.
        """
        symmetric = (strain + strain.transpose(-1, -2)) / 2
        displacement = torch.bmm(self.pos[:, None, :], symmetric[self.batch])[:, 0]
        return self.replace(
            pos=self.pos + displacement, cell=self.cell + torch.bmm(self.cell, symmetric)
        )

    def replace(self, **fields: Tensor | None) -> "AtomGraph":
        """Return a shallow copy with some ``fields`` exchanged; None leaves a field out."""
        copy = AtomGraph()
        copy.__dict__.update(self.__dict__)
        for name, value in fields.items():
            if value is not None:
                copy[name] = value
            else:
                copy.__dict__.pop(name, None)
        return copy

    def volume(self) -> Volumes:
        """Return the volume of each cell: (n_graphs,), Å³; 0 where there is no full cell."""
        return torch.linalg.det(self.cell).abs()

    @classmethod
    def concatenate(cls, graphs: "Sequence[AtomGraph]") -> "AtomGraph":
        """Return ``graphs``, each of one or many structures, joined in their order.

        A field that only some of them have is filled in for the others: tags and velocities with
        zeros, ``weight`` with one, labels with NaN, which means unknown.

        Raises:
            ValueError: No graphs, or a field that some lack and that has no neutral value.
        """
        if not graphs:
            raise ValueError("cannot concatenate an empty list of graphs")
        if len(graphs) == 1:
            return graphs[0].replace()
        names = dict.fromkeys(name for graph in graphs for name in graph.__dict__)
        joined = cls()
        for name in names:
            values = [_field(graph, name, graphs) for graph in graphs]
            dim = _joined_along(name)
            value = torch.cat(values, dim=dim)
            if name in ("edge_index", "hyperedge_index", "batch"):
                value += _increments(graphs, name, [part.shape[dim] for part in values])
            joined[name] = value
        return joined

    def graph(self, k: int) -> "AtomGraph":
        """Return structure k alone, as a graph of one; negative k counts from the end.

        Raises:
            IndexError: There is no such structure.
        """
        if not -self.n_graphs <= k < self.n_graphs:
            raise IndexError(f"structure {k} of a graph with {self.n_graphs} structures")
        return self._select([k % self.n_graphs])[0]

    def take(self, systems: Tensor) -> "AtomGraph":
        """Return some of the structures, in the order that is asked for.

        Where neither edges nor hyperedges have to be renumbered it costs one indexing per field,
        however many structures there are.

        Args:
            systems: Their numbers, (n_taken,).
        """
        levels = {name: self.level(name) for name, value in self.__dict__.items()}
        if not set(levels.values()) <= {"atom", "graph"}:
            return AtomGraph.concatenate(self._select(systems.tolist()))
        rows = atom_rows(self.natoms, systems)
        copy = AtomGraph()
        for name, value in self.__dict__.items():
            copy[name] = value[rows if levels[name] == "atom" else systems]
        numbers = torch.arange(len(systems), device=systems.device)
        copy["batch"] = numbers.repeat_interleave(copy.natoms)
        return copy

    def to_list(self) -> "list[AtomGraph]":
        """Return the structures one by one; :meth:`concatenate` undoes it."""
        return self._select(range(self.n_graphs))

    def _select(self, numbers: Sequence[int]) -> "list[AtomGraph]":
        first_atom = _starts(self.natoms)
        pieces: dict[str, tuple[Tensor, list[int]]] = {}
        for name, value in self.__dict__.items():
            level = self.level(name)
            if level == "graph":
                pieces[name] = value, list(range(self.n_graphs + 1))
            elif level == "atom":
                pieces[name] = value, first_atom
            elif level == "hyperedge":
                pieces[name] = value, _starts(self.num_hyperedges)
            else:
                pieces[name] = self._split_by_graph(name, value, level)
        first_hyperedge = _starts(self.num_hyperedges) if "num_hyperedges" in self else [0]
        singles = []
        for k in numbers:
            single = AtomGraph()
            for name, (value, starts) in pieces.items():
                part = value.narrow(_joined_along(name), starts[k], starts[k + 1] - starts[k])
                if name in ("edge_index", "batch"):
                    part = part - (first_atom[k] if name == "edge_index" else k)
                elif name == "hyperedge_index":
                    part = part - part.new_tensor([[first_atom[k]], [first_hyperedge[k]]])
                single[name] = part
            singles.append(single)
        return singles

    def _split_by_graph(self, name: str, value: Tensor, level: Level) -> tuple[Tensor, list[int]]:
        atoms = self.edge_index[1] if level == "edge" else self.hyperedge_index[0]
        owner = self.batch[atoms]
        if owner.shape[0] > 1 and bool((owner[1:] < owner[:-1]).any()):
            value = value.index_select(_joined_along(name), owner.argsort(stable=True))
        return value, _starts(torch.bincount(owner, minlength=self.n_graphs))

    def level(self, name: str) -> Level:
        """Return what each row of a field belongs to; ValueError where nothing tells."""
        if name in _LEVELS:
            return _LEVELS[name]
        value = self[name]
        if isinstance(value, Tensor) and value.dim() > 0:
            if name.startswith("edge_") and value.shape[0] == self.n_edges:
                return "edge"
            # Where both lengths agree every structure is one atom, and both say the same.
            if value.shape[0] == self.n_atoms:
                return "atom"
            if value.shape[0] == self.n_graphs:
                return "graph"
        raise ValueError(
            f"cannot tell to which structure the parts of field {name!r} belong: it is neither a "
            f"tensor with {self.n_atoms} (atoms) or {self.n_graphs} (structures) rows, nor an "
            f"'edge_' field with {self.n_edges}"
        )

    def to(
        self,
        device: torch.device | torch.dtype | str | int | None = None,
        *args: str,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> "AtomGraph":
        """Return a copy on another device or with another floating-point type.

        A dtype casts the floating-point fields, except that ``energy`` and ``scalar`` stay float64:
        in float32 the total of a large structure loses its meV. The graph itself is left as it is.

        Args:
            device: Device or dtype.
            args: Names of fields; all by default.
            dtype: Of floating-point fields, if a device is given too.
            non_blocking: As in :meth:`torch.Tensor.to`.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        copy = AtomGraph()
        for name, value in self.__dict__.items():
            if not args or name in args:
                cast = dtype if value.is_floating_point() and name not in _ALWAYS_DOUBLE else None
                value = value.to(device=device, dtype=cast, non_blocking=non_blocking)
            copy.__dict__[name] = value
        return copy

    def pin_memory(self) -> "AtomGraph":
        """Return a copy in memory from which a GPU copies faster, as loaders ask for."""
        return self.replace(**{name: value.pin_memory() for name, value in self.__dict__.items()})


def atom_rows(natoms: GraphCounts, systems: Tensor) -> Tensor:
    """Return the rows of the atoms of some structures, structure by structure.

    Args:
        natoms: Atoms of every structure, (n_graphs,).
        systems: Numbers of structures, (n_taken,).
    """
    counts = natoms[systems]
    first = (natoms.cumsum(0) - natoms)[systems] - (counts.cumsum(0) - counts)
    return torch.arange(int(counts.sum()), device=natoms.device) + first.repeat_interleave(counts)


def _check_shapes(
    pos: Tensor,
    atomic_numbers: Tensor | None,
    cell: Tensor,
    pbc: Tensor,
    natoms: Tensor,
    batch: Tensor,
) -> None:
    n_atoms, n_graphs = pos.shape[0], natoms.shape[0]
    wanted = {
        "pos": (pos, (n_atoms, 3)),
        "cell": (cell, (n_graphs, 3, 3)),
        "pbc": (pbc, (n_graphs, 3)),
        "natoms (its sum is the number of atoms)": (batch, (n_atoms,)),
    }
    if atomic_numbers is None:
        raise ValueError("an AtomGraph with positions needs atomic_numbers too")
    wanted["atomic_numbers"] = (atomic_numbers, (n_atoms,))
    for name, (value, shape) in wanted.items():
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, but {n_atoms} atoms in {n_graphs} "
                f"structures need {shape}"
            )


def _joined_along(name: str) -> int:
    return -1 if name in ("edge_index", "hyperedge_index") else 0


def _field(graph: AtomGraph, name: str, graphs: Sequence[AtomGraph]) -> Tensor:
    if name in graph:
        return graph[name]
    like: Tensor = next(other[name] for other in graphs if name in other)
    if name == "hyperedge_index":
        return like.new_zeros(2, 0)
    if name == "hyperedge_type":
        return like.new_zeros(0)
    if name not in UNKNOWN:
        raise ValueError(
            f"graph {graphs.index(graph)} has no {name!r} but others have; give it to all graphs, "
            f"or drop it with graph.replace({name}=None)"
        )
    n_rows = graph.n_atoms if _LEVELS[name] == "atom" else graph.n_graphs
    return like.new_full((n_rows, *like.shape[1:]), UNKNOWN[name])


def _increments(graphs: Sequence[AtomGraph], name: str, sizes: list[int]) -> Tensor:
    steps = torch.tensor([0 if name == "batch" else graph.n_atoms for graph in graphs[:-1]])
    if name == "batch":
        steps = torch.tensor([graph.n_graphs for graph in graphs[:-1]])
    if name == "hyperedge_index":
        counts = [int(g.num_hyperedges.sum()) if "num_hyperedges" in g else 0 for g in graphs[:-1]]
        steps = torch.stack([steps, torch.tensor(counts)])
    starts = torch.nn.functional.pad(steps.cumsum(-1), (1, 0))
    spread = starts.repeat_interleave(torch.tensor(sizes), dim=-1)
    return spread.to(graphs[0].pos.device)


def _starts(counts: Tensor) -> list[int]:
    return [0, *counts.cumsum(0).tolist()]
