"""Neighbour lists of a batch whose structures move, deform, enter and leave.

Pairs are measured for the whole batch at once, and only structures that moved too far are searched
anew. The arrays are NumPy's on a CPU, whose calls cost a fraction of torch's on small structures,
and tensors on any other device.
"""

import math
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import torch

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.convert import MIN_DISTANCE, StructureError, refuse_overlap, structure_name
from atomeq.graph.device_neighbors import search_pairs, searches_on
from atomeq.graph.neighbors import (
    Edges,
    check_cutoff,
    complete_cell,
    enclosed,
    neighbor_list,
    pair_lengths,
)
from atomeq.typing import CellOffsets, EdgeIndex, EdgeLengths

_ROUNDING = 1e-9  # a hair less than what is allowed, so that rounding cannot lose a pair
_MAX_NEIGHBORS = 10_000.0  # per atom, on average; matter has some hundreds within any cutoff
_FAR = 1e150  # Å; a reference that no atom is near to, and whose square is still a number
_ALL_PAIRS = 50  # atoms; molecules up to this size never have to be searched
_REMEMBERED = 8  # lists kept of structures that left, per structure that is here
_KEPT = 2**20  # pairs of lists that are kept in any case: structures come one by one before a batch
_SOON = 4 / 3  # times what it has moved: a structure would ask; atoms of solids do not go on
_OF_A_LIST = 1000  # pairs that weigh as much as a list that has none

Array = Any  # np.ndarray on a CPU, else torch.Tensor


def uses_numpy(device: torch.device) -> bool:
    """Whether arrays of a device are NumPy's."""
    return device.type == "cpu"


class MovingEdges(NamedTuple):
    """The edges of a batch.

    Attributes:
        edge_index: (2, n_edges), sorted by target within each structure.
        cell_offsets: (n_edges, 3).
        lengths: (n_edges,), Å.
        refused: Why a structure could not be searched, by its number; it has no edges here.
    """

    edge_index: EdgeIndex
    cell_offsets: CellOffsets
    lengths: EdgeLengths
    refused: dict[int, str]


class _Geometry(NamedTuple):
    """Where the atoms of a batch are, as arrays of its device."""

    pos: Array  # (n_atoms, 3)
    cell: Array  # (n_graphs, 3, 3)
    pbc: Array  # (n_graphs, 3)
    sizes: list[int]  # atoms of each structure
    device: torch.device

    @classmethod
    def of(cls, graph: AtomGraph) -> "_Geometry":
        pos, cell, pbc = graph.pos.detach(), graph.cell.detach(), graph.pbc
        if uses_numpy(graph.pos.device):
            pos, cell, pbc = pos.numpy(), cell.numpy(), pbc.numpy()
        return cls(pos, cell, pbc, graph.natoms.tolist(), graph.pos.device)

    @property
    def starts(self) -> list[int]:
        """First atom of each structure, and their number."""
        return [0, *np.cumsum(self.sizes).tolist()]

    def structure(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return one structure's positions, cell and periodicity in NumPy's arrays."""
        stop = sum(self.sizes[: k + 1])
        arrays = self.pos[stop - self.sizes[k] : stop], self.cell[k], self.pbc[k]
        return arrays if uses_numpy(self.device) else tuple(x.cpu().numpy() for x in arrays)

    def array(self, value: Any) -> Array:
        """Return a NumPy array, a list or a tensor as an array of this device."""
        if uses_numpy(self.device):
            return np.asarray(value)
        return torch.as_tensor(value, device=self.device)


class _Candidates(NamedTuple):
    """The pairs of one structure within cutoff and skin, at the geometry they were searched for."""

    pos: Array  # (n_atoms, 3)
    cell: Array  # (3, 3), complete: see neighbors.complete_cell
    pbc: Array  # (3,)
    edge_index: Array  # (2, n_pairs), atoms counted in the structure
    cell_offsets: Array  # (n_pairs, 3)
    complete: bool = False  # these are all pairs there are


class _Assembly(NamedTuple):
    """Candidates of the whole batch, concatenated."""

    keys: list[int]
    sizes: list[int]
    device: torch.device
    xp: Any  # numpy or torch: what computes with the arrays
    pos: Array  # (n_atoms, 3)
    cell: Array  # (n_graphs, 3, 3)
    pbc: Array  # (n_graphs, 3)
    edge_index: Array  # (2, n_pairs)
    cell_offsets: Array  # (n_pairs, 3)
    shifts: Array  # (3, n_pairs) the same as floats; no rows where nothing is periodic
    system: Array  # (n_pairs,) structure of each pair
    batch: Array  # (n_atoms,) structure of each atom
    starts: Array  # (n_graphs,) first atom of each structure
    unlimited: Array  # (n_graphs,) infinity where there are no other pairs, else 0
    partial: list[int]  # structures that are periodic in some directions only
    crystals: bool  # all are periodic in three directions


class MovingNeighbors:
    """Finds the edges of a batch step after step.

    The pairs within ``cutoff + skin`` of a reference geometry are kept for every structure, and
    contain all pairs within the cutoff as long as::

        2 max|u| <= σ_min(F) (cutoff + skin) - cutoff

    where F deforms the reference cell into the present one, σ_min is its smallest singular value
    and u is how far an atom lies from where F alone would put it. With a constant cell this is the
    usual rule of half the skin. Of a small molecule all pairs are kept, for good. Which pairs are
    inside is decided by lengths measured now, pair by pair with the same arithmetic, so the edges
    do not depend on the reference, on the skin or on what else is in the batch.

    Args:
        cutoff: Å.
        skin: Å; 0 searches every time.

    Attributes:
        n_searches: How many structures had to be searched so far.
    """

    def __init__(self, cutoff: float, skin: float) -> None:
        check_cutoff(cutoff)
        if not (math.isfinite(skin) and skin >= 0):
            raise ValueError(f"skin must be a finite length >= 0 Å, not {skin!r}")
        self.cutoff = float(cutoff)
        self.skin = float(skin)
        self.n_searches = 0
        self._known: OrderedDict[int, _Candidates] = OrderedDict()
        self._weight = 0  # of what is known, in pairs
        self._assembly: _Assembly | None = None
        self._settled: tuple[torch.Tensor | None, ...] = ()

    def __call__(self, graph: AtomGraph) -> MovingEdges:
        """Find the edges of every structure.

        Args:
            graph: Finite positions and cells, float64. ``key`` (n_graphs,) int64 names structures,
                so that one is recognised after others left; by default their order does.
        """
        here = _Geometry.of(graph)
        named = getattr(graph, "key", None)
        keys = list(range(len(here.sizes))) if named is None else named.tolist()
        assembly = self._assembly
        new: set[int] = set()
        refused: dict[int, str] = {}
        if assembly is None or assembly[:3] != (keys, here.sizes, here.device):
            new = self._new(here, keys)
            refused = self._search(here, sorted(new), keys)
            assembly = self._assemble(keys, here)
        self._settled = ()
        moved, allowed, same = self._moved(assembly, here)  # (n_graphs,)
        if not bool((moved <= allowed).all()):  # NaN never holds
            # One copy of the lists is made for all, so those that soon would ask are served too.
            asking = torch.as_tensor(_SOON * moved <= allowed).logical_not().nonzero().flatten()
            refused |= self._search(here, [k for k in asking.tolist() if k not in new], keys)
            assembly = self._assemble(keys, here)
        elif same:
            self._settled = _constants(graph)
        self._assembly = assembly
        return self._measure(assembly, here, refused)

    def settled(self, graph: AtomGraph, fine: torch.Tensor) -> MovingEdges | None:
        """Find the edges as long as only atoms move, and not too far, with one look at the device.

        Cells, sizes and names are what they were where they are the same tensors, for a state's
        are never changed in place.

        Args:
            graph: As for a call.
            fine: Structures that can be searched, (n_graphs,) bool.

        Returns:
            What a call returns; None where that has to be made, because a structure is not fine or
            atoms are close, where lists are stale, and on a CPU, where looking costs nothing.
        """
        known = zip(self._settled, _constants(graph), strict=False)
        if not self._settled or not all(before is now for before, now in known):
            return None
        assembly = self._assembly
        assert assembly is not None  # it was settled with
        sizes, device = assembly.sizes, assembly.device
        here = _Geometry(graph.pos.detach(), graph.cell.detach(), graph.pbc, sizes, device)
        moved, allowed = self._allowed(assembly, here, assembly.pos, 1.0)
        lengths = _lengths(assembly, here)
        inside = lengths < self.cutoff
        held = fine.all() & (moved <= allowed).all() & (lengths >= MIN_DISTANCE).all()
        held, n_edges = torch.stack([held.to(torch.int64), inside.sum()]).tolist()
        if not held:
            return None
        rows = torch.nonzero_static(inside, size=n_edges)[:, 0]
        return _selected(assembly, lengths, rows, {})

    def connect(self, graph: AtomGraph) -> AtomGraph:
        """Return structures that were validated with their edges, as a graph builder does.

        Raises:
            StructureError: A structure cannot be searched, or its atoms overlap.
        """
        found = self(graph)
        for k, reason in found.refused.items():
            raise StructureError(f"{_title(graph, k)}: {reason}", index=k)
        if len(found.lengths) and found.lengths.min().item() < MIN_DISTANCE:
            source = found.edge_index[0, found.lengths.argmin()]
            k = int(graph.batch[source])
            first = int(graph.natoms[:k].sum())
            edges = Edges(
                (found.edge_index - first).cpu().numpy(), found.cell_offsets.cpu().numpy()
            )
            refuse_overlap(_title(graph, k), edges, found.lengths.cpu().numpy(), index=k)
        return graph.replace(edge_index=found.edge_index, cell_offsets=found.cell_offsets)

    def _new(self, here: _Geometry, keys: list[int]) -> set[int]:
        """Return which structures have no list yet, and forget those that left long ago."""
        if self._assembly is not None and self._assembly.device != here.device:
            self._known.clear()
            self._weight = 0
        new = set()
        for k, key in enumerate(keys):
            known = self._known.get(key)
            if known is None or len(known.pos) != here.sizes[k]:
                new.add(k)
            else:
                self._known.move_to_end(key)
        most = (_REMEMBERED + 1) * len(keys)
        while len(self._known) > most and self._weight > _KEPT:
            self._weight -= _weight(self._known.popitem(last=False)[1])
        return new

    def _assemble(self, keys: list[int], here: _Geometry) -> _Assembly:
        parts = [self._known[key] for key in keys]
        xp: Any = np if uses_numpy(here.device) else torch
        starts = here.starts
        pbc = xp.stack([part.pbc for part in parts])
        offsets = xp.concatenate([part.cell_offsets for part in parts])
        counts = [part.edge_index.shape[1] for part in parts]
        edges = [part.edge_index + first for part, first in zip(parts, starts, strict=False)]
        periodic = bool(pbc.any())
        shifts = np.ascontiguousarray(offsets.T, np.float64) if xp is np else offsets.T.double()
        return _Assembly(
            keys=keys,
            sizes=here.sizes,
            device=here.device,
            xp=xp,
            pos=xp.concatenate([part.pos for part in parts]),
            cell=xp.stack([part.cell for part in parts]),
            pbc=pbc,
            edge_index=xp.concatenate(edges, 1),
            cell_offsets=offsets,
            shifts=shifts if periodic else shifts[:0],
            system=here.array(np.repeat(np.arange(len(parts)), counts)),
            batch=here.array(np.repeat(np.arange(len(parts)), here.sizes)),
            starts=here.array(starts[:-1]),
            unlimited=here.array([math.inf if part.complete else 0.0 for part in parts]),
            partial=[k for k, part in enumerate(pbc.sum(1).tolist()) if 0 < part < 3],
            crystals=bool(pbc.all()),
        )

    def _moved(self, assembly: _Assembly, here: _Geometry) -> tuple[Array, Array, bool]:
        """Return twice the largest moves, what the lists allow, Å, and whether no cell changed."""
        xp, n_graphs = assembly.xp, len(here.sizes)
        cell = _complete_like(here, assembly)
        expected, stretched = assembly.pos, 1.0
        changed = cell != assembly.cell
        deformed = bool(changed.any())
        if deformed:
            deformation = xp.linalg.solve(assembly.cell, cell)
            same = ~changed.reshape(n_graphs, 9).any(1)[:, None, None]
            deformation = xp.where(same, here.array(np.eye(3)), deformation)
            stretched = _singular_values(deformation)[:, -1]
            expected = (expected[:, :, None] * deformation[assembly.batch]).sum(1)
        moved, allowed = self._allowed(assembly, here, expected, stretched)
        other = bool((here.pbc != assembly.pbc).any())
        if other:
            allowed = xp.where((here.pbc == assembly.pbc).all(1), allowed, -1.0)
        return moved, allowed, not (deformed or other)

    def _allowed(
        self, assembly: _Assembly, here: _Geometry, expected: Array, stretched: Array | float
    ) -> tuple[Array, Array]:
        moved = here.pos - expected
        moved *= moved
        moved = moved.sum(1)  # (n_atoms,)
        if assembly.xp is np:
            moved = np.maximum.reduceat(moved, assembly.starts)
        else:
            largest = moved.new_zeros(len(assembly.sizes))
            moved = largest.scatter_reduce(0, assembly.batch, moved, "amax")
        allowed = stretched * (self.cutoff + self.skin) * (1 - _ROUNDING) - self.cutoff
        return 2 * moved**0.5, allowed + assembly.unlimited

    def _search(self, here: _Geometry, stale: list[int], keys: list[int]) -> dict[int, str]:
        """Renew the lists of some structures; return why the others of them have none."""
        reach = self.cutoff + self.skin
        refused: dict[int, str] = {}
        waiting = {}  # what the device searches, all at once
        for k in stale:
            pos, cell, pbc = here.structure(k)
            if len(pos) <= _ALL_PAIRS and not pbc.any():
                self._keep(here, k, keys[k], *_all_pairs(len(pos)), complete=True)
                continue
            self.n_searches += 1
            try:
                _refuse_collapse(pos, cell, pbc, cutoff=self.cutoff)
                if searches_on(here.device):
                    waiting[k] = enclosed(pos, cell, pbc, reach)
                else:
                    self._keep(here, k, keys[k], *neighbor_list(pos, cell, pbc, reach))
            except ValueError as error:
                self._remember(keys[k], _unknown(here, k))
                refused[k] = str(error)
        if waiting:
            found = search_pairs(list(waiting.values()), reach, here.device)
            for k, pairs in zip(waiting, found, strict=True):
                self._keep(here, k, keys[k], *pairs)
        return refused

    def _keep(
        self,
        here: _Geometry,
        k: int,
        key: int,
        edge_index: Array,
        cell_offsets: Array,
        *,
        complete: bool = False,
    ) -> None:
        pos, cell, pbc = here.structure(k)
        found = _Candidates(
            here.array(pos.copy()),
            here.array(cell.copy() if pbc.all() else complete_cell(cell, pbc)),
            here.array(pbc.copy()),
            here.array(edge_index),
            here.array(cell_offsets),
            complete,
        )
        self._remember(key, found)

    def _remember(self, key: int, found: _Candidates) -> None:
        before = self._known.pop(key, None)  # so that it stands at the end
        self._weight += _weight(found) - (0 if before is None else _weight(before))
        self._known[key] = found

    def _measure(
        self, assembly: _Assembly, here: _Geometry, refused: dict[int, str]
    ) -> MovingEdges:
        edge_index, offsets = assembly.edge_index, assembly.cell_offsets
        if assembly.xp is np:
            lengths = pair_lengths(
                here.pos, here.cell, edge_index, assembly.shifts, assembly.system
            )
            inside = np.flatnonzero(lengths < self.cutoff)
            return MovingEdges(
                torch.from_numpy(edge_index.take(inside, 1)),
                torch.from_numpy(offsets.take(inside, 0)),
                torch.from_numpy(lengths.take(inside)),
                refused,
            )
        lengths = _lengths(assembly, here)
        return _selected(assembly, lengths, torch.nonzero(lengths < self.cutoff)[:, 0], refused)


def _constants(graph: AtomGraph) -> tuple[torch.Tensor | None, ...]:
    """Return what does not change while only atoms move; nothing where arrays are NumPy's."""
    if uses_numpy(graph.pos.device):
        return ()
    return graph.get("key"), graph.natoms, graph.pbc, graph.cell


def _lengths(assembly: _Assembly, here: _Geometry) -> torch.Tensor:
    """Return the lengths of all candidates, tensors, (n_pairs,), Å."""
    source, target = assembly.edge_index
    vectors = here.pos.index_select(0, source) - here.pos.index_select(0, target)
    if len(assembly.shifts):
        # The arithmetic of pair_lengths, whose rounding does not depend on how many rows there
        # are: a pair has the same length to the last bit in whatever batch it stands.
        cell = here.cell.index_select(0, assembly.system)  # (n_pairs, 3, 3)
        for a in range(3):
            vectors = vectors + assembly.shifts[a, :, None] * cell[:, a]
    squared = vectors.square()
    return (squared[:, 0] + squared[:, 1] + squared[:, 2]).sqrt()


def _selected(
    assembly: _Assembly, lengths: torch.Tensor, rows: torch.Tensor, refused: dict[int, str]
) -> MovingEdges:
    return MovingEdges(
        assembly.edge_index.index_select(1, rows),
        assembly.cell_offsets.index_select(0, rows),
        lengths.index_select(0, rows),
        refused,
    )


def _singular_values(matrices: Array) -> Array:
    if isinstance(matrices, np.ndarray):
        return np.linalg.svd(matrices, compute_uv=False)  # svdvals is of NumPy 2
    return torch.linalg.svdvals(matrices)


def _title(graph: AtomGraph, k: int) -> str:
    return structure_name(k, graph.atomic_numbers[graph.batch == k].cpu().numpy())


def _unknown(here: _Geometry, k: int) -> _Candidates:
    """Return a structure without pairs; its far positions make it be searched."""
    return _Candidates(
        here.array(np.full((here.sizes[k], 3), _FAR)),
        here.array(np.eye(3)),
        here.array(here.structure(k)[2].copy()),
        here.array(np.zeros((2, 0), np.int64)),
        here.array(np.zeros((0, 3), np.int64)),
    )


def _weight(candidates: _Candidates) -> int:
    return candidates.edge_index.shape[1] + _OF_A_LIST


def _all_pairs(n_atoms: int) -> tuple[np.ndarray, np.ndarray]:
    """Return every pair of a molecule, in the order of a search: by target, then by source."""
    target, source = np.nonzero(~np.eye(n_atoms, dtype=bool))
    return np.stack([source, target]), np.zeros((len(source), 3), np.int64)


def _complete_like(here: _Geometry, assembly: _Assembly) -> Array:
    """Return the present cells, completed as the reference cells are: (n_graphs, 3, 3)."""
    if assembly.crystals:
        return here.cell
    cell = assembly.xp.where(here.pbc[:, :, None], here.cell, assembly.cell)
    for k in assembly.partial:
        _, own, pbc = here.structure(k)
        try:
            cell[k] = here.array(complete_cell(own, pbc))
        except ValueError:  # the search will say so
            continue
    return cell


def _refuse_collapse(pos: np.ndarray, cell: np.ndarray, pbc: np.ndarray, *, cutoff: float) -> None:
    """Refuse a cell that collapsed: a search would take all memory before it could say so."""
    if not pbc.all():
        return
    volume = abs(np.linalg.det(cell))
    sphere = 4 / 3 * math.pi * cutoff**3
    if len(pos) * sphere <= _MAX_NEIGHBORS * volume:
        return
    raise ValueError(
        f"the cell holds {len(pos)} atoms in {volume:.3g} Å³, which is no matter; it collapsed, or "
        "is not in Å"
    )
