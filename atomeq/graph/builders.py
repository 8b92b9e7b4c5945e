"""Graph builders: structures of any kind in, an AtomGraph with edges out.

A model names its builder, so that training, calculators and screening all see the same edges.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.convert import (
    MIN_DISTANCE,
    StructureError,
    Structures,
    from_structures,
    refuse_overlap,
    structure_list,
    structure_name,
)
from atomeq.graph.hyperedges import INFO_KEY, NO_HYPEREDGES, Hyperedges
from atomeq.graph.neighbors import (
    Edges,
    check_cutoff,
    neighbor_list_with_lengths,
)
from atomeq.graph.topology import given_topology, perceived_topology

# OC20's tolerance, in Å² of SQUARED distance, for neighbours that count as equally far.
_DEGENERACY = 0.01
# Å²; squared distances nearer than this tie, whatever rounding made of them.
_TIE = 1e-8
# Å per cube root of the neighbours that are wanted: a sphere which holds them in most solids.
_FIRST_RADIUS = 2.2
_GROWTH = 1.3

_Found = tuple[Edges, NDArray[np.float64]]
_Search = Callable[[int, NDArray, NDArray, NDArray], _Found]


class GraphBuilder(Protocol):
    """What makes graphs for a model; its ``cutoff`` (Å) bounds the length of every edge."""

    @property
    def cutoff(self) -> float:
        """Longest edge, Å."""
        ...

    def __call__(self, structures: Structures, dtype: torch.dtype | None = None) -> AtomGraph:
        """Return the graph of one or many structures, edges sorted by target."""
        ...

    def connect(self, graph: AtomGraph) -> AtomGraph:
        """Return a graph of structures that were validated, with its edges."""
        ...


class _ByValue:
    """Builders of one kind with equal arguments are equal: members of a committee share graphs."""

    def _arguments(self) -> tuple[float, ...]:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._arguments() == self._arguments()

    def __hash__(self) -> int:
        return hash((type(self), *self._arguments()))


class RadiusGraph(_ByValue):
    """Connects all atoms, and images of atoms, closer than the cutoff.

    Args:
        cutoff: Å.

    Raises:
        ValueError: The cutoff is not allowed.

    Example:
        >>> from ase.build import bulk
        >>> RadiusGraph(cutoff=3.0)(bulk("Cu")).n_edges
        12
    """

    def __init__(self, cutoff: float) -> None:
        check_cutoff(cutoff)
        self.cutoff = float(cutoff)

    def __call__(self, structures: Structures, dtype: torch.dtype | None = None) -> AtomGraph:
        """Return the graph of one or many structures.

        Args:
            structures: One or many of ASE's Atoms, pymatgen's Structure or Molecule, AtomGraph.
            dtype: Of floating-point fields; by default float64, and for an AtomGraph its own.

        Raises:
            StructureError: A structure is not usable, or atoms overlap.
        """
        return self.connect(from_structures(structures, dtype=dtype))

    def connect(self, graph: AtomGraph) -> AtomGraph:
        """Return a graph of structures that were validated, with its edges."""
        return _connect(graph, self._search)

    def _arguments(self) -> tuple[float, ...]:
        return (self.cutoff,)

    def _search(self, k: int, pos: NDArray, cell: NDArray, pbc: NDArray) -> _Found:
        return neighbor_list_with_lengths(pos, cell, pbc, self.cutoff)

    def __repr__(self) -> str:
        return f"RadiusGraph(cutoff={self.cutoff})"


class NearestNeighborGraph(_ByValue):
    """Connects each atom to its nearest neighbours within the cutoff, as OC20's models do.

    The neighbour cap makes energies jump when two neighbours swap places; a smooth potential wants
    :class:`RadiusGraph`.

    Args:
        cutoff: Å.
        max_neighbors: Incoming edges each atom keeps, nearest first.
        strict: True keeps exactly ``max_neighbors`` where there are as many; of equally far ones
            the lowest source and offset. False keeps every neighbour whose squared distance is at
            most 0.01 Å² above that of the ``max_neighbors + 1``-th, so that no shell is cut in two.

    Raises:
        ValueError: An argument is not allowed.
    """

    def __init__(self, cutoff: float, max_neighbors: int, *, strict: bool = True) -> None:
        check_cutoff(cutoff)
        if max_neighbors < 1:
            raise ValueError(f"max_neighbors must be at least 1, not {max_neighbors!r}")
        self.cutoff = float(cutoff)
        self.max_neighbors = int(max_neighbors)
        self.strict = bool(strict)

    def __call__(self, structures: Structures, dtype: torch.dtype | None = None) -> AtomGraph:
        """Return the graph of one or many structures; arguments as in :class:`RadiusGraph`."""
        return self.connect(from_structures(structures, dtype=dtype))

    def connect(self, graph: AtomGraph) -> AtomGraph:
        """Return a graph of structures that were validated, with its edges."""
        return _connect(graph, self._search)

    def _arguments(self) -> tuple[float, ...]:
        return self.cutoff, self.max_neighbors, self.strict

    def _search(self, k: int, pos: NDArray, cell: NDArray, pbc: NDArray) -> _Found:
        # The cap binds long before the cutoff does: of 300 neighbours within 12 Å, 20 are kept.
        # A sphere is large enough once every atom has so many neighbours well inside it that
        # nothing beyond it could be kept, so the result is that of the whole cutoff.
        needed, margin = self.max_neighbors, 2 * _TIE
        if not self.strict:
            needed, margin = needed + 1, margin + _DEGENERACY
        radius = min(self.cutoff, _FIRST_RADIUS * self.max_neighbors ** (1 / 3))
        while True:
            edges, lengths = neighbor_list_with_lengths(pos, cell, pbc, radius)
            if radius >= self.cutoff:
                break
            inside = edges.edge_index[1][lengths**2 + margin < radius**2]
            if np.bincount(inside, minlength=len(pos)).min(initial=needed) >= needed:
                break
            radius = min(self.cutoff, _GROWTH * radius)
        keep = nearest(edges.edge_index[1], lengths, self.max_neighbors, strict=self.strict)
        return Edges(edges.edge_index[:, keep], edges.cell_offsets[keep]), lengths[keep]

    def __repr__(self) -> str:
        return (
            f"NearestNeighborGraph(cutoff={self.cutoff}, max_neighbors={self.max_neighbors}, "
            f"strict={self.strict})"
        )


class HyperGraph(_ByValue):
    """Connects atoms within the cutoff, and gives each structure its hyperedges.

    They are, in this order of preference: those of a given AtomGraph; those in
    ``atoms.info["hyperedges"]``, where :func:`~atomeq.graph.hyperedges.fix_topology` writes them;
    those perceived from the coordinates. Perceived anew for every geometry they would jump when a
    bond breaks, and a potential's energy with them: what moves atoms calls :meth:`fix_topology`
    once, or keeps a :class:`~atomeq.graph.topology.KeptTopologies`.

    Args:
        cutoff: Å.
        perceive: Perceive hyperedges where none are given. False leaves such a structure without.

    Raises:
        ValueError: The cutoff is not allowed.
    """

    def __init__(self, cutoff: float, *, perceive: bool = True) -> None:
        self._edges = RadiusGraph(cutoff)
        self.cutoff = float(cutoff)
        self.perceive = bool(perceive)

    def __call__(self, structures: Structures, dtype: torch.dtype | None = None) -> AtomGraph:
        """Return the graph of one or many structures; arguments as in :class:`RadiusGraph`.

        Raises:
            StructureError: A structure is not usable, or its hyperedges cannot be perceived.
            ImportError: They must be perceived, and RDKit is not installed.
        """
        many = structure_list(structures)
        return self._with_hyperedges(self._edges(many, dtype=dtype), many)

    def connect(self, graph: AtomGraph) -> AtomGraph:
        """Return a graph of structures that were validated, with its edges and hyperedges."""
        return self._with_hyperedges(self._edges.connect(graph), [graph])

    def _arguments(self) -> tuple[float, ...]:
        return self.cutoff, self.perceive

    def fix_topology(self, structures: Structures, dtype: torch.dtype | None = None) -> AtomGraph:
        """Return structures without edges, with hyperedges that they keep as their atoms move.

        Args:
            structures: As in :class:`RadiusGraph`.
            dtype: As in :class:`RadiusGraph`.

        Raises:
            StructureError: As in :meth:`__call__`.
            ImportError: As in :meth:`__call__`.
        """
        many = structure_list(structures)
        return self._with_hyperedges(from_structures(many, dtype=dtype), many)

    def _with_hyperedges(self, graph: AtomGraph, many: Sequence[object]) -> AtomGraph:
        given = [item for one in many for item in _given_hyperedges(one)]
        if all(item is True for item in given):
            return graph
        singles = graph.to_list()
        for k, hyperedges in enumerate(given):
            if hyperedges is not True:
                found = self._hyperedges(singles[k], hyperedges, k)
                singles[k] = singles[k].replace(**_hyperedge_fields(found, singles[k], k))
        return AtomGraph.concatenate(singles)

    def _hyperedges(self, graph: AtomGraph, given: object, k: int) -> Hyperedges:
        """Return those of structure k: as they were given, or perceived."""
        numbers = graph.atomic_numbers.cpu().numpy()
        if given is not None:
            return given_topology(given, numbers, index=k)
        if not self.perceive:
            return NO_HYPEREDGES
        positions = graph.pos.detach().cpu().numpy()
        return perceived_topology(numbers, positions, graph.pbc[0].cpu().numpy(), index=k)

    def __repr__(self) -> str:
        return f"HyperGraph(cutoff={self.cutoff}, perceive={self.perceive})"


def _given_hyperedges(structure: object) -> list[object]:
    """Return for each structure in one: True if its graph has hyperedges, its info's, or None."""
    if isinstance(structure, AtomGraph):
        given = True if "num_hyperedges" in structure else None
        return [given] * structure.n_graphs
    return [getattr(structure, "info", {}).get(INFO_KEY)]


def _hyperedge_fields(hyperedges: Hyperedges, graph: AtomGraph, k: int) -> dict[str, torch.Tensor]:
    try:
        fields = hyperedges.fields(n_atoms=graph.n_atoms)
    except ValueError as error:
        raise StructureError(f"{_title(graph, 0)}: {error}", index=k) from error
    return {name: value.to(graph.pos.device) for name, value in fields.items()}


def nearest(
    target: NDArray[np.int64],
    lengths: NDArray[np.float64],
    max_neighbors: int,
    *,
    strict: bool,
) -> NDArray[np.bool_]:
    """Mark the edges that a cap on neighbours keeps.

    Args:
        target: (n_edges,), ascending.
        lengths: (n_edges,), Å.
        max_neighbors: Cap per target.
        strict: See :class:`NearestNeighborGraph`.

    Returns:
        (n_edges,) mask.
    """
    squared = lengths**2
    counts = np.bincount(target) if len(target) else np.zeros(0, np.int64)
    starts = np.cumsum(counts) - counts
    order = np.lexsort((np.rint(squared / _TIE), target))
    if strict:
        keep = np.empty(len(target), dtype=bool)
        keep[order] = np.arange(len(target)) - starts[target] < max_neighbors
        return keep
    limit = np.full(len(counts), np.inf)
    crowded = np.flatnonzero(counts > max_neighbors)
    limit[crowded] = squared[order[starts[crowded] + max_neighbors]] + _DEGENERACY
    return squared <= limit[target]


def _connect(graph: AtomGraph, search: _Search) -> AtomGraph:
    device = graph.pos.device
    positions = graph.pos.detach().cpu().numpy().astype(np.float64)
    cells = graph.cell.detach().cpu().numpy().astype(np.float64)
    pbc = graph.pbc.cpu().numpy()
    starts = np.concatenate(([0], graph.natoms.cpu().numpy().cumsum()))
    edge_indices, offsets = [], []
    for k, (start, stop) in enumerate(itertools.pairwise(starts)):
        try:
            edges, lengths = search(k, positions[start:stop], cells[k], pbc[k])
        except ValueError as error:
            raise StructureError(f"{_title(graph, k)}: {error}", index=k) from error
        if len(lengths) and lengths.min() < MIN_DISTANCE:
            refuse_overlap(_title(graph, k), edges, lengths, index=k)
        edge_index, cell_offsets = edges
        edge_index += start
        edge_indices.append(edge_index)
        offsets.append(cell_offsets)
    return graph.replace(
        edge_index=torch.from_numpy(_joined(edge_indices, 1)).to(device),
        cell_offsets=torch.from_numpy(_joined(offsets, 0)).to(device),
    )


def _joined(parts: list[NDArray[np.int64]], axis: int) -> NDArray[np.int64]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)  # no second copy


def _title(graph: AtomGraph, k: int) -> str:
    return structure_name(k, graph.graph(k).atomic_numbers.cpu().numpy())


def neighbor_graph(cutoff: float, max_neighbors: int | None, *, strict: bool) -> GraphBuilder:
    """Return the builder of all pairs within the cutoff, or of the nearest neighbours.

    Args:
        cutoff: Å.
        max_neighbors: Neighbours of an atom; None for all.
        strict: As in :class:`NearestNeighborGraph`.
    """
    if max_neighbors is None:
        return RadiusGraph(cutoff)
    return NearestNeighborGraph(cutoff, max_neighbors, strict=strict)
