"""MeanPotential: a committee as one potential; its results are means, its doubt their spread."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.ops.precision import use_precision
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences
from atomeq.potential.terms import EnergyTerm
from atomeq.typing import PropertyKey

_SPREAD_OF: dict[PropertyKey, PropertyKey] = {
    "energy_uncertainty": "energy",
    "forces_uncertainty": "forces",
}


class MeanPotential(Potential):
    """What several potentials say of the same graphs: the mean, and as uncertainty the spread.

    ``energy_uncertainty`` and ``forces_uncertainty`` are the standard deviations (of n - 1) of the
    members, of a force the rms over its components, so that whatever stops, ranks or chooses by an
    uncertainty does so by a committee too. Model, terms, distances and features are the first's.

    Args:
        members: Two or more, with equal graphs; they are this potential's from now on.

    Raises:
        ValueError: Less than two, different graphs or dtypes, or no element in common.
    """

    def __init__(self, members: Sequence[Potential]) -> None:
        if len(members) < 2:
            raise ValueError(f"a committee has two members or more, not {len(members)}")
        first = members[0]
        for other in members[1:]:
            if other.model.graph_builder() != first.model.graph_builder():
                raise ValueError(
                    f"{other.name} and {first.name} see different graphs; give them to a "
                    "calculator one by one: AtomeqCalculator([...])"
                )
            if (other.dtype, other.model.told) != (first.dtype, first.model.told):
                raise ValueError(f"{other.name} and {first.name} differ in dtype or electrons")
        known = set.intersection(*(set(one.elements) for one in members))
        if not known:
            raise ValueError("the potentials of this committee have no element in common")
        super().__init__(first.model, AtomicReferences(dict.fromkeys(sorted(known), 0.0)))
        self.terms, self.distances = first.terms, first.distances
        self.precision = first.precision
        for one in members:
            one.precision = None  # that of the whole holds
        self.members = nn.ModuleList(members)

    def _each(self) -> list[Potential]:
        return [one for one in self.members if isinstance(one, Potential)]

    def add_terms(self, terms: Sequence[EnergyTerm]) -> None:
        """Add known physics to every member."""
        for one in self._each() if terms else []:
            one.add_terms(terms)

    def derive(
        self,
        graph: AtomGraph,
        properties: Sequence[PropertyKey],
        *,
        create_graph: bool | None = None,
    ) -> dict[PropertyKey, Tensor]:
        """Compute means, and the spread where it is asked for."""
        if "extrapolation" in properties:
            raise ValueError("a committee has no extrapolation; ask for forces_uncertainty")
        spreads: list[PropertyKey] = [key for key in self.uncertainties if key in properties]
        keys: dict[PropertyKey, None] = {key: None for key in properties if key not in spreads}
        keys |= {_SPREAD_OF[key]: None for key in spreads}
        with use_precision(self.precision):
            each = [
                one.derive(graph, tuple(keys), create_graph=create_graph) for one in self._each()
            ]
        found = {key: torch.stack([one[key] for one in each]).mean(dim=0) for key in keys}
        if "energy_uncertainty" in spreads:
            found["energy_uncertainty"] = torch.stack([one["energy"] for one in each]).std(dim=0)
        if "forces_uncertainty" in spreads:
            forces = torch.stack([one["forces"].detach() for one in each]).to(torch.float64)
            found["forces_uncertainty"] = forces.var(dim=0).mean(dim=1).sqrt()
        return {key: found[key] for key in properties}

    @property
    def uncertainties(self) -> tuple[PropertyKey, ...]:
        """What it gives beside its results."""
        return ("energy_uncertainty", "forces_uncertainty")

    @property
    def receptive_depth(self) -> int | None:
        """That of the member whose energies depend on the farthest atoms."""
        depths = [one.receptive_depth for one in self._each()]
        known = [depth for depth in depths if depth is not None]
        return max(known) if len(known) == len(depths) else None

    @property
    def conservative(self) -> bool:
        """Whether all forces are derivatives of energies."""
        return all(one.conservative for one in self._each())

    @property
    def gives_stress(self) -> bool:
        """Whether every member gives a stress."""
        return all(one.gives_stress for one in self._each())

    @property
    def gives_energies(self) -> bool:
        """Whether every member gives energies."""
        return all(one.gives_energies for one in self._each())

    @property
    def electric(self) -> tuple[PropertyKey, ...]:
        """The electric properties that every member gives."""
        first, *others = (one.electric for one in self._each())
        return tuple(key for key in first if all(key in other for other in others))
