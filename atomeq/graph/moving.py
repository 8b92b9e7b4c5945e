"""Neighbour lists of a batch whose structures move, deform, enter and leave.

What :class:`~atomeq.graph.neighbors.SkinNeighborList` is for one structure, on tensors: pairs are
measured for the whole batch at once, and only structures that moved too far are searched anew.
"""

import math
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.device_neighbors import search_pairs, searches_on
from atomeq.graph.neighbors import check_cutoff, complete_cell, enclosed, neighbor_list
from atomeq.typing import CellOffsets, EdgeIndex, EdgeLengths

_ROUNDING = 1e-9  # a hair less than what is allowed, so that rounding cannot lose a pair
_MAX_NEIGHBORS = 10_000.0  # per atom, on average; matter has some hundreds within any cutoff
_FAR = 1e150  # Å; a reference that no atom is near to, and whose square is still a number
_ALL_PAIRS = 50  # atoms; molecules up to this size never have to be searched
_REMEMBERED = 8  # lists kept of structures that left, per structure that is here


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


class _Candidates(NamedTuple):
    """The pairs of one structure within cutoff and skin, at the geometry they were searched for."""

    pos: Tensor  # (n_atoms, 3)
    cell: Tensor  # (3, 3), complete: see neighbors.complete_cell
    pbc: Tensor  # (3,)
    edge_index: Tensor  # (2, n_pairs), atoms counted in the structure
    cell_offsets: Tensor  # (n_pairs, 3)
    complete: bool = False  # these are all pairs there are


class _Assembly(NamedTuple):
    """Candidates of the whole batch, concatenated."""

    keys: list[int]
    pos: Tensor  # (n_atoms, 3)
    cell: Tensor  # (n_graphs, 3, 3)
    pbc: Tensor  # (n_graphs, 3)
    edge_index: Tensor  # (2, n_pairs)
    cell_offsets: Tensor  # (n_pairs, 3)
    system: Tensor  # (n_pairs,) structure of each pair
    deformable: Tensor  # (n_graphs,) periodic in some direction
    complete: Tensor  # (n_graphs,)


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
        self._assembly: _Assembly | None = None

    def __call__(self, graph: AtomGraph) -> MovingEdges:
        """Find the edges of every structure.

        Args:
            graph: Finite positions and cells, float64. ``key`` (n_graphs,) int64 names structures,
                so that one is recognised after others left; by default their order does.
        """
        keys = graph["key"].tolist() if "key" in graph else list(range(graph.n_graphs))
        assembly = self._assembly
        if assembly is None or assembly.keys != keys or assembly.pos.device != graph.pos.device:
            assembly = self._remembered(graph, keys)
        used = self._used_allowance(assembly, graph)  # (n_graphs,)
        refused: dict[int, str] = {}
        if bool((used > 1).any()):
            # One copy of the lists is made for all, so those that soon would ask are served too.
            stale = torch.nonzero(used > 0.5).flatten().tolist()
            refused = self._search(graph, stale, keys)
            assembly = self._assemble(keys, graph)
        self._assembly = assembly
        return self._measure(assembly, graph, refused)

    def _remembered(self, graph: AtomGraph, keys: list[int]) -> _Assembly:
        pos, cell, pbc = graph.pos, graph.cell, graph.pbc
        starts = [0, *graph.natoms.cumsum(0).tolist()]
        for k, key in enumerate(keys):
            known = self._known.get(key)
            if known is None or len(known.pos) != starts[k + 1] - starts[k]:
                unknown = pos.new_full((starts[k + 1] - starts[k], 3), _FAR)
                self._known[key] = _empty(unknown, cell[k], pbc[k])
            self._known.move_to_end(key)
        while len(self._known) > _REMEMBERED * len(keys) + 1:
            self._known.popitem(last=False)
        return self._assemble(keys, graph)

    def _assemble(self, keys: list[int], graph: AtomGraph) -> _Assembly:
        parts = [self._known[key] for key in keys]
        device = graph.pos.device
        counts = torch.tensor([part.edge_index.shape[1] for part in parts], device=device)
        system = torch.arange(len(parts), device=device).repeat_interleave(counts)
        first_atom = graph.natoms.cumsum(0) - graph.natoms
        edge_index = torch.cat([part.edge_index.to(device) for part in parts], dim=1)
        pbc = torch.stack([part.pbc.to(device) for part in parts])
        return _Assembly(
            keys,
            torch.cat([part.pos.to(device) for part in parts]),
            torch.stack([part.cell.to(device) for part in parts]),
            pbc,
            edge_index + first_atom[system],
            torch.cat([part.cell_offsets.to(device) for part in parts]),
            system,
            pbc.any(dim=1),
            torch.tensor([part.complete for part in parts], device=device),
        )

    def _used_allowance(self, assembly: _Assembly, graph: AtomGraph) -> Tensor:
        """Return how much of its allowance each structure has used; above 1 it must be searched."""
        cell = _complete_like(graph, assembly)
        changed = (cell != assembly.cell).flatten(1).any(dim=1)  # (n_graphs,)
        stretched = torch.full_like(graph.cell[:, 0, 0], 1.0)
        expected = assembly.pos
        if bool(changed.any()):
            eye = torch.eye(3, dtype=cell.dtype, device=cell.device)
            deformation = torch.linalg.solve(assembly.cell, cell)
            deformation = torch.where(changed[:, None, None], deformation, eye)
            stretched = torch.linalg.svdvals(deformation)[:, -1]
            expected = torch.bmm(expected[:, None], deformation[graph.batch])[:, 0]
        moved = (graph.pos - expected).square().sum(dim=1)
        moved = moved.new_zeros(graph.n_graphs).scatter_reduce(0, graph.batch, moved, "amax")
        allowed = stretched * (self.cutoff + self.skin) * (1 - _ROUNDING) - self.cutoff
        used = 2 * moved.sqrt() / allowed.clamp(min=1e-300)
        same = (graph.pbc == assembly.pbc).all(dim=1)
        used = torch.where((allowed >= 0) & (used <= 1) & same, used, math.inf)
        return torch.where(assembly.complete & same, 0.0, used)

    def _search(self, graph: AtomGraph, stale: list[int], keys: list[int]) -> dict[int, str]:
        """Renew the lists of some structures; return why the others of them have none."""
        reach, device = self.cutoff + self.skin, graph.pos.device
        refused: dict[int, str] = {}
        waiting = {}  # what the device searches, all at once
        for k in stale:
            pos, cell, pbc = graph.pos[slice(*_rows(graph, k))], graph.cell[k], graph.pbc[k]
            if len(pos) <= _ALL_PAIRS and not bool(pbc.any()):
                self._known[keys[k]] = _all_pairs(pos, pbc)
                continue
            self.n_searches += 1
            arrays = pos.cpu().numpy(), cell.cpu().numpy(), pbc.cpu().numpy()
            try:
                _refuse_collapse(*arrays, cutoff=self.cutoff)
                if searches_on(device):
                    waiting[k] = enclosed(*arrays, reach)
                else:
                    edges = neighbor_list(*arrays, reach)
                    self._keep(graph, k, keys[k], *map(torch.from_numpy, edges))
            except ValueError as error:
                self._known[keys[k]] = _empty(torch.full_like(pos, _FAR), cell, pbc)
                refused[k] = str(error)
        if waiting:
            found = search_pairs(list(waiting.values()), reach, device)
            for k, pairs in zip(waiting, found, strict=True):
                self._keep(graph, k, keys[k], *pairs)
        return refused

    def _keep(
        self, graph: AtomGraph, k: int, key: int, edge_index: Tensor, cell_offsets: Tensor
    ) -> None:
        complete = complete_cell(graph.cell[k].cpu().numpy(), graph.pbc[k].cpu().numpy())
        device = graph.pos.device
        self._known[key] = _Candidates(
            graph.pos[slice(*_rows(graph, k))].clone(),
            torch.from_numpy(complete).to(device),
            graph.pbc[k].clone(),
            edge_index.to(device),
            cell_offsets.to(device),
        )

    def _measure(
        self, assembly: _Assembly, graph: AtomGraph, refused: dict[int, str]
    ) -> MovingEdges:
        source, target = assembly.edge_index
        vectors = graph.pos.index_select(0, source) - graph.pos.index_select(0, target)
        if bool(assembly.deformable.any()):
            # Per component and without a matrix product, whose rounding depends on how many rows
            # it has: a pair has the same length to the last bit in whatever batch it stands.
            cell = graph.cell.index_select(0, assembly.system)  # (n_pairs, 3, 3)
            for a in range(3):
                vectors = vectors + assembly.cell_offsets[:, a, None] * cell[:, a]
        squared = vectors.square()
        lengths = (squared[:, 0] + squared[:, 1] + squared[:, 2]).sqrt()
        inside = torch.nonzero(lengths < self.cutoff).flatten()
        return MovingEdges(
            assembly.edge_index.index_select(1, inside),
            assembly.cell_offsets.index_select(0, inside),
            lengths.index_select(0, inside),
            refused,
        )


def _rows(graph: AtomGraph, k: int) -> tuple[int, int]:
    stop = int(graph.natoms[: k + 1].sum())
    return stop - int(graph.natoms[k]), stop


def _empty(pos: Tensor, cell: Tensor, pbc: Tensor) -> _Candidates:
    """Return a structure without pairs; its far positions make it be searched."""
    eye = torch.eye(3, dtype=cell.dtype, device=cell.device)
    none = torch.zeros(2, 0, dtype=torch.int64, device=pos.device)
    return _Candidates(pos, eye, pbc.clone(), none, none.new_zeros(0, 3))


def _all_pairs(pos: Tensor, pbc: Tensor) -> _Candidates:
    """Return every pair of a molecule, in the order of a search: by target, then by source."""
    pairs = torch.cartesian_prod(*[torch.arange(len(pos), device=pos.device)] * 2)  # (n², 2)
    edge_index = pairs[pairs[:, 0] != pairs[:, 1]].T.flip(0).contiguous()
    offsets = edge_index.new_zeros(edge_index.shape[1], 3)
    eye = torch.eye(3, dtype=pos.dtype, device=pos.device)
    return _Candidates(pos.clone(), eye, pbc.clone(), edge_index, offsets, complete=True)


def _complete_like(graph: AtomGraph, assembly: _Assembly) -> Tensor:
    """Return the present cells, completed as the reference cells are: (n_graphs, 3, 3)."""
    cell = torch.where(graph.pbc[:, :, None], graph.cell, assembly.cell)
    partial = graph.pbc.any(dim=1) & ~graph.pbc.all(dim=1)
    for k in torch.nonzero(partial).flatten().tolist():
        try:
            complete = complete_cell(graph.cell[k].cpu().numpy(), graph.pbc[k].cpu().numpy())
        except ValueError:  # the search will say so
            continue
        cell[k] = torch.from_numpy(complete).to(cell.device)
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
