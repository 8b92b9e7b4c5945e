"""What moves: a batch of structures with its velocities, forces and step counts, as one value.

States are never changed in place: a step returns a new one. So a step that fails, for want of
memory or because one structure broke, leaves the state before it whole.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self, cast

import torch
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph, atom_rows
from atomeq.graph.convert import (
    StructureError,
    Structures,
    from_structures,
    standard_masses,
    structure_list,
    structure_name,
)
from atomeq.traces import known_to_the_host

#: Metadata of a state's fields: whose numbers their rows are.
PER_ATOM = {"level": "atom"}
PER_SYSTEM = {"level": "system"}

_keys = itertools.count()


@dataclass(frozen=True)
class State:
    """A batch in motion; steppers add their own fields, each per atom or per system.

    Attributes:
        graph: Structures without edges; float64 ``pos``, ``cell``, ``masses``, ``fixed``, with what
            was computed of them: ``energy``, ``forces``, ``stress`` where it is needed, and
            ``failure`` (see :class:`~atomeq.dynamics.evaluator.Failure`).
        n_steps: Steps each structure has taken, (n_graphs,).
    """

    graph: AtomGraph
    n_steps: Tensor = field(metadata=PER_SYSTEM)

    @property
    def failed(self) -> Tensor:
        """Structures that broke and stand still since, (n_graphs,)."""
        return self.graph["failure"] != 0

    def take(self, systems: Tensor) -> Self:
        """Return some of the structures, by number (n_taken,), in that order."""
        rows = atom_rows(self.graph.natoms, systems)
        taken = {
            name: getattr(self, name)[rows if level == "atom" else systems]
            for name, level in self._levels()
        }
        return dataclasses.replace(self, graph=self.graph.take(systems), **taken)

    @classmethod
    def concatenate(cls, states: Sequence[Self]) -> Self:
        """Join states of one kind, in their order."""
        if len(states) == 1:
            return states[0]
        graph = AtomGraph.concatenate([state.graph for state in states])
        joined = {
            name: torch.cat([getattr(state, name) for state in states])
            for name, _ in states[0]._levels()
        }
        return dataclasses.replace(states[0], graph=graph, **joined)

    def followed_by(self, after: Self) -> Self:
        """Return the state after a step, with structures that broke in it as they were before.

        Their ``failure`` says what happened. So no number in a state is ever NaN, and a broken
        structure cannot harm the others in later steps.
        """
        failure = torch.where(self.failed, self.graph["failure"], after.graph["failure"])
        graph = after.graph.replace(failure=failure)
        if known_to_the_host(failure) and not failure.any():  # a device would be waited for
            return dataclasses.replace(after, graph=graph)
        systems = failure != 0
        atoms = systems[graph.batch]
        moved = {
            name: _where(atoms, self.graph[name], graph[name])
            for name in ("pos", "velocities", "forces", "forces_uncertainty")
            if name in graph
        }
        moved |= {
            name: _where(systems, self.graph[name], graph[name])
            for name in ("cell", "energy", "stress", "energy_uncertainty")
            if name in graph
        }
        kept = {
            name: _where(atoms if level == "atom" else systems, getattr(self, name), value)
            for name, level in self._levels()
            if (value := getattr(after, name)).shape == getattr(self, name).shape
        }
        return dataclasses.replace(after, graph=graph.replace(**moved), **kept)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything the state holds, by name; :meth:`from_tensors` undoes it."""
        own = {name: getattr(self, name) for name, _ in self._levels()}
        return own | {f"graph.{name}": value for name, value in self.graph.to_dict().items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """Build a state of what :meth:`tensors` returned."""
        graph_fields, own = {}, {}
        for name, value in tensors.items():
            where, _, rest = name.partition("graph.")
            if where:
                own[name] = value
            else:
                graph_fields[rest] = value
        return cls(graph=AtomGraph(**graph_fields), **own)

    @classmethod
    def _levels(cls) -> list[tuple[str, str]]:
        return [(part.name, part.metadata["level"]) for part in fields(cls) if part.metadata]


def prepare(structures: Structures, *, device: torch.device | str | None = None) -> AtomGraph:
    """Make the batch that steppers start from: structures of any kind, ready to move.

    Args:
        structures: One or many of ASE's Atoms, pymatgen's Structure or Molecule, AtomGraph.
        device: Where to compute.

    Returns:
        A graph without edges and labels, float64, with ``masses`` (isotopes as given, else the
        element's), ``fixed``, ``failure`` and a ``key`` by which neighbour lists know a structure.

    Raises:
        StructureError: A structure is not usable, or has constraints other than fixed atoms.
    """
    _refuse_other_constraints(structures)
    graph = from_structures(structures, dtype=torch.float64, device=device)
    labels = dict.fromkeys(("energy", "forces", "stress", "weight", "edge_index", "cell_offsets"))
    standard = standard_masses(graph.atomic_numbers)
    masses = standard
    if "masses" in graph:
        given = graph["masses"]
        masses = torch.where(torch.isfinite(given) & (given > 0), given, standard)
    fixed = graph.get("fixed", torch.zeros_like(graph.batch, dtype=torch.bool))
    keys = [next(_keys) for _ in range(graph.n_graphs)]
    return graph.replace(
        **labels,
        masses=masses,
        fixed=fixed,
        failure=torch.zeros_like(graph.natoms),
        key=torch.tensor(keys, device=graph.pos.device),
    )


def per_system(values: Tensor, graph: AtomGraph) -> Tensor:
    """Sum numbers of atoms over each structure: (n_atoms, ...) to (n_graphs, ...)."""
    return values.new_zeros(graph.n_graphs, *values.shape[1:]).index_add(0, graph.batch, values)


def largest(values: Tensor, graph: AtomGraph) -> Tensor:
    """Return the largest of each structure's non-negative numbers: (n_atoms,) to (n_graphs,)."""
    return values.new_zeros(graph.n_graphs).scatter_reduce(0, graph.batch, values, "amax")


def any_atom(flags: Tensor, graph: AtomGraph) -> Tensor:
    """Return whether a flag of any atom is set: (n_atoms,) bool to (n_graphs,) bool."""
    return per_system(flags.to(torch.int64), graph) > 0


def _refuse_other_constraints(structures: Structures) -> None:
    """Refuse what would move otherwise than its constraints say: only fixed atoms are kept."""
    for index, item in enumerate(structure_list(structures)):
        for constraint in getattr(item, "constraints", ()):  # of ASE's Atoms alone
            kind = type(constraint).__name__
            name = structure_name(index, cast("Any", item).numbers)
            if kind != "FixAtoms":
                raise StructureError(
                    f"{name}: {kind} is no constraint that "
                    "dynamics keeps, which is FixAtoms alone; remove it, or use ASE's optimizers "
                    "and integrators with AtomeqCalculator",
                    index=index,
                )


def _where(mask: Tensor, kept: Tensor, changed: Tensor) -> Tensor:
    if changed is kept:  # so that who remembers a tensor, as neighbour lists do, knows it again
        return kept
    return torch.where(mask.view(-1, *[1] * (changed.dim() - 1)), kept, changed)
