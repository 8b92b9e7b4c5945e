"""Evaluator: a potential asked step after step, with neighbours remembered and failures confined.

A structure that the potential cannot answer for is left out and marked; the others get the numbers
they would get without it.
"""

import copy
import math
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor

from atomeq.dynamics.memory import keep_freed_memory
from atomeq.dynamics.state import any_atom, prepare
from atomeq.graph.atom_graph import MIN_VOLUME, AtomGraph
from atomeq.graph.builders import HyperGraph, RadiusGraph
from atomeq.graph.convert import MIN_DISTANCE, StructureError, Structures
from atomeq.graph.moving import MovingEdges, MovingNeighbors
from atomeq.graph.neighbors import SKIN
from atomeq.potential.captured import Captured
from atomeq.potential.checkpoint import load_potential
from atomeq.potential.committee import NotFiniteError
from atomeq.potential.potential import Potential
from atomeq.traces import known_to_the_host
from atomeq.typing import PropertyKey


class Failure(IntEnum):
    """Why a structure stands still; 0 says that it does not."""

    NONE = 0
    NOT_FINITE = 1
    OVERLAP = 2
    NO_NEIGHBORS = 3
    NO_FORCES = 4
    EXPLODED = 5
    UNCERTAIN = 6

    @property
    def reason(self) -> str:
        """What happened, for the user."""
        return _REASONS[self]


_REASONS = {
    Failure.NONE: "",
    Failure.NOT_FINITE: "a position or the cell became NaN or infinite",
    Failure.OVERLAP: f"atoms came closer than {MIN_DISTANCE} Å",
    Failure.NO_NEIGHBORS: "atoms flew apart or the cell collapsed: neighbours cannot be found",
    Failure.NO_FORCES: "the potential's energy, forces or stress are NaN or infinite",
    Failure.EXPLODED: "it exploded: an atom or the cell moved further in a step than matter does",
    Failure.UNCERTAIN: "a force became less certain than asked for (max_uncertainty)",
}


class Evaluator:
    """Energy, forces and stress of a batch in motion.

    It keeps the potential, as a frozen copy where it could still be trained, and the neighbour
    lists of the structures it has seen; results do not depend on what it remembers. On a CPU the
    process keeps the memory of a step for the next one
    (:func:`~atomeq.dynamics.memory.keep_freed_memory`).

    Args:
        potential: A potential, or name or folder of one.
        skin: How much further than the cutoff neighbours are remembered, Å.
        capture: Replay what was sent for a small system, see :mod:`atomeq.potential.captured` for
            CUDA and :mod:`atomeq.potential.replayed` for a CPU.
        max_uncertainty: Standard deviation of the forces, eV/Å, beyond which a structure fails;
            with infinity it is computed and never fails. By default it is not asked for.

    Attributes:
        n_edges: Edges of each structure in the last evaluation, (n_graphs,).

    Raises:
        ValueError: An uncertainty is asked of a potential that does not know it.
        NotFiniteError: When called, if the potential has never given a number for any structure: it
            is to blame, not they.
    """

    def __init__(
        self,
        potential: Potential | str | Path,
        *,
        skin: float = SKIN,
        capture: bool = True,
        max_uncertainty: float | None = None,
    ) -> None:
        loaded = potential if isinstance(potential, Potential) else load_potential(potential)
        if loaded.training or any(p.requires_grad for p in loaded.parameters()):
            loaded = copy.deepcopy(loaded).requires_grad_(False).eval()
        self.potential = loaded
        if max_uncertainty is not None:
            loaded.refuse_uncalibrated()
            if not max_uncertainty > 0:
                raise ValueError(f"max_uncertainty is a positive eV/Å, not {max_uncertainty}")
        self.max_uncertainty = max_uncertainty
        self._answer = Captured(loaded, wanted=capture)
        self._has_answered = False
        if loaded.device.type == "cpu":
            keep_freed_memory()
        builder = loaded.model.graph_builder()
        # Of a HyperGraph only the edges change on the way: see prepare().
        plain = type(builder) in (RadiusGraph, HyperGraph)
        self._builder = builder
        self._neighbors = MovingNeighbors(builder.cutoff, skin) if plain else None
        self.n_edges = torch.zeros(0, dtype=torch.int64)

    def prepare(self, structures: Structures) -> AtomGraph:
        """Return the batch that steppers start from, on the potential's device.

        A potential of hypergraphs has their topology perceived here, and the graph keeps it however
        the atoms move; structures that bring one in ``atoms.info["hyperedges"]`` keep that.

        Args:
            structures: As in :func:`~atomeq.dynamics.state.prepare`.

        Raises:
            StructureError: A structure is not usable, or its topology cannot be perceived.
        """
        if isinstance(self._builder, HyperGraph):
            structures = self._builder.fix_topology(structures, dtype=torch.float64)
        return prepare(structures, device=self.potential.device)

    def __call__(self, graph: AtomGraph, *, stress: bool = False) -> AtomGraph:
        """Compute energy, forces and, if asked, stress.

        Args:
            graph: As :meth:`prepare` makes it.
            stress: Whether the stress is needed; structures must have a volume.

        Returns:
            The graph with ``energy`` (n_graphs,), ``forces`` (n_atoms, 3), ``stress``
            (n_graphs, 3, 3) and ``failure`` (n_graphs,), and where asked for
            ``energy_uncertainty`` (n_graphs,) and ``forces_uncertainty`` (n_atoms,). Numbers of
            failed structures are zero.
        """
        failure = _geometry_failures(graph, stress=stress)
        connected, fine = self._connect(graph, failure)
        properties: list[PropertyKey] = ["energy", "forces"]
        if stress:
            properties.append("stress")
        if self.max_uncertainty is not None:
            properties += "energy_uncertainty", "forces_uncertainty"
        if connected is None:
            return _with_results(graph, {}, fine, failure, properties)
        results = self._answer(connected, properties)
        if not self._has_answered:
            self._refuse_no_numbers(connected, results["energy"])
        self.n_edges = _spread(_count_edges(connected), fine, graph.n_graphs)
        found = _with_results(graph, results, fine, failure, properties)
        if self.max_uncertainty is None or math.isinf(self.max_uncertainty):
            return found
        uncertain = any_atom(found["forces_uncertainty"] > self.max_uncertainty, found)
        return found.replace(failure=marked(found["failure"], uncertain, Failure.UNCERTAIN))

    def _refuse_no_numbers(self, graph: AtomGraph, energy: Tensor) -> None:
        self._has_answered = bool(torch.isfinite(energy).any())
        if not self._has_answered:
            numbers = graph.atomic_numbers[graph.batch == 0]
            raise NotFiniteError(self.potential.name, "energy", 0, numbers)

    def count_edges(self, graph: AtomGraph) -> int:
        """Return how many edges the structures have, without evaluating them.

        Raises:
            StructureError: Atoms overlap, or neighbours cannot be found.
        """
        if self._neighbors is None:
            return self.potential.build_graph(graph).n_edges
        return self._neighbors.connect(graph).n_edges

    def _connect(self, graph: AtomGraph, failure: Tensor) -> tuple[AtomGraph | None, Tensor]:
        """Return the structures that have not failed with their edges, and their numbers."""
        if self._neighbors is not None and (edges := self._neighbors.settled(graph, failure == 0)):
            everything = torch.arange(graph.n_graphs, device=failure.device)
            return _with_edges(graph, edges), everything
        fine = torch.nonzero(failure == 0).flatten()
        while len(fine):
            part = graph if len(fine) == graph.n_graphs else graph.take(fine)
            failed, connected = self._edges(part)
            if connected is not None:
                return connected, fine
            for k, code in failed.items():
                failure[fine[k]] = code
            fine = torch.nonzero(failure == 0).flatten()
        return None, fine

    def _edges(self, graph: AtomGraph) -> tuple[dict[int, Failure], AtomGraph | None]:
        if self._neighbors is None:
            try:
                return {}, self.potential.build_graph(graph)
            except StructureError as error:
                return {error.index or 0: Failure.OVERLAP}, None
        edges = self._neighbors(graph)
        failed = dict.fromkeys(edges.refused, Failure.NO_NEIGHBORS)
        if edges.lengths.shape[0] and float(edges.lengths.min()) < MIN_DISTANCE:
            close = edges.edge_index[1][edges.lengths < MIN_DISTANCE]
            failed |= dict.fromkeys(graph.batch[close].unique().tolist(), Failure.OVERLAP)
        if failed:
            return failed, None
        return {}, _with_edges(graph, edges)


def marked(failure: Tensor, systems: Tensor, why: Failure) -> Tensor:
    """Return the failures with some structures' (n_graphs,) added, where they had none."""
    return torch.where(systems & (failure == 0), int(why), failure)


def _with_edges(graph: AtomGraph, edges: MovingEdges) -> AtomGraph:
    # The lengths spare the potential a look at how near atoms are: they are of these positions.
    return graph.replace(
        edge_index=edges.edge_index, cell_offsets=edges.cell_offsets, edge_lengths=edges.lengths
    )


def _seen_to_be_finite(*values: Tensor) -> bool:
    """Whether the host can see at once, by a sum, that no number is NaN or infinite."""
    return all(known_to_the_host(one) and math.isfinite(float(one.sum())) for one in values)


def _geometry_failures(graph: AtomGraph, *, stress: bool) -> Tensor:
    failure = graph["failure"].clone()  # _connect() writes into it
    if not _seen_to_be_finite(graph.pos, graph.cell):
        broken = any_atom(~torch.isfinite(graph.pos).all(dim=1), graph)
        broken |= ~torch.isfinite(graph.cell).flatten(1).all(dim=1)
        failure = marked(failure, broken, Failure.NOT_FINITE)
    if stress:
        flat = graph.volume().nan_to_num(0.0) < MIN_VOLUME
        failure = marked(failure, flat, Failure.NO_NEIGHBORS)
    return failure


def _with_results(
    graph: AtomGraph,
    results: dict[PropertyKey, Tensor],
    fine: Tensor,
    failure: Tensor,
    properties: Sequence[PropertyKey],
) -> AtomGraph:
    """Put results back where they belong, and mark structures whose results are no numbers."""
    if results and len(fine) == graph.n_graphs:
        fields = {str(name): results[name].detach().to(graph.pos.dtype) for name in properties}
    else:
        fields = _put_back(graph, results, fine, properties)
    if not _seen_to_be_finite(*fields.values()):
        fields, failure = _without_the_broken(fields, failure, graph)
    # As ASE: what holds an atom takes up its force.
    fields["forces"] = fields["forces"].masked_fill(graph["fixed"][:, None], 0)
    return graph.replace(failure=failure, **fields)


def _put_back(
    graph: AtomGraph,
    results: dict[PropertyKey, Tensor],
    fine: Tensor,
    properties: Sequence[PropertyKey],
) -> dict[str, Tensor]:
    """Return results of all structures, of which those that are not fine have zeros."""
    likes = {
        "energy": graph.cell[:, 0, 0],
        "forces": graph.pos,
        "stress": graph.cell,
        "energy_uncertainty": graph.cell[:, 0, 0],
        "forces_uncertainty": graph.pos[:, 0],
    }
    fields = {str(name): torch.zeros_like(likes[name]) for name in properties}
    if results:
        atoms = torch.isin(graph.batch, fine)
        for name in properties:
            rows = atoms if name.startswith("forces") else fine
            fields[name][rows] = results[name].detach().to(graph.pos.dtype)
    return fields


def _without_the_broken(
    fields: dict[str, Tensor], failure: Tensor, graph: AtomGraph
) -> tuple[dict[str, Tensor], Tensor]:
    """Return zeros for the results of structures of which one is no number, and mark them."""
    broken = torch.zeros_like(failure, dtype=torch.bool)
    for name, values in fields.items():
        bad = ~torch.isfinite(values.reshape(len(values), -1)).all(dim=1)
        broken |= any_atom(bad, graph) if name.startswith("forces") else bad
    kept = {}
    for name, values in fields.items():
        rows = broken[graph.batch] if name.startswith("forces") else broken
        kept[name] = values.masked_fill(rows.view(-1, *[1] * (values.dim() - 1)), 0)
    return kept, marked(failure, broken, Failure.NO_FORCES)


def _count_edges(graph: AtomGraph) -> Tensor:
    systems = graph.batch[graph.edge_index[1]]  # bincount would have to look for the largest
    return torch.zeros_like(graph.natoms).index_add(0, systems, torch.ones_like(systems))


def _spread(values: Tensor, systems: Tensor, n_graphs: int) -> Tensor:
    return values.new_zeros(n_graphs).index_copy(0, systems, values)
