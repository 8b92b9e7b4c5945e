"""MeanPotential: a committee as one potential; its results are means, its doubt their spread."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from atomeq.files import write_atomically
from atomeq.graph.atom_graph import AtomGraph
from atomeq.ops.precision import use_precision
from atomeq.potential.folders import COMMITTEE_FILE, CheckpointError
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences
from atomeq.potential.terms import EnergyTerm
from atomeq.potential.uncertainty import coverage_of, factor_of
from atomeq.potential.untrusted import read_yaml
from atomeq.typing import PropertyKey

COMMITTEE_VERSION = 1
_AGREED = 1e-6  # eV/Å; of forces that symmetry forbids the spread is rounding
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
        rescaling: What the spreads of ``energy`` and ``forces`` are multiplied by, as
            :func:`rescaling_of` finds it; by default 1.

    Raises:
        ValueError: Less than two, different graphs or dtypes, no element in common, or a factor
            that is none.
    """

    def __init__(
        self, members: Sequence[Potential], rescaling: Mapping[str, float] | None = None
    ) -> None:
        factors = {"energy": 1.0, "forces": 1.0} | dict(rescaling or {})
        if len(factors) > 2 or not all(
            type(f) in (int, float) and 0 < f < float("inf") for f in factors.values()
        ):
            raise ValueError(f"rescaling are positive factors of energy and forces: {rescaling}")
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
        self.rescaling = factors

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
            spread = torch.stack([one["energy"].detach() for one in each]).std(dim=0)
            found["energy_uncertainty"] = self.rescaling["energy"] * spread
        if "forces_uncertainty" in spreads:
            forces = torch.stack([one["forces"].detach() for one in each]).to(torch.float64)
            spread = forces.var(dim=0).mean(dim=1).sqrt()
            found["forces_uncertainty"] = self.rescaling["forces"] * spread
        return {key: found[key] for key in properties}

    def fingerprint(self) -> str:
        """Return a SHA-256 of the members and of what their spread is multiplied by."""
        factors = json.dumps(self.rescaling, sort_keys=True)
        return hashlib.sha256((super().fingerprint() + factors).encode()).hexdigest()

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


def rescaling_of(
    committee: MeanPotential, held_out: Iterable[AtomGraph]
) -> tuple[dict[str, float], dict[str, float]]:
    """Find what a committee's spread is to be multiplied by, for 68 % of the errors to lie within.

    Members that were trained on the same data agree more than they are right.

    Args:
        committee: Stays as it is.
        held_out: Batches with labels ``energy`` and ``forces`` that no member was trained on.

    Returns:
        The factors of ``energy`` and ``forces``, and the shares of errors within one and two of the
        rescaled σ, ``energy_68`` and so on.

    Raises:
        ValueError: There are too few labels.
    """
    ratios: dict[str, list[Tensor]] = {"energy": [], "forces": []}
    keys: tuple[PropertyKey, ...] = ("energy", "forces", "energy_uncertainty", "forces_uncertainty")
    for graph in held_out:
        found = committee(graph, keys, create_graph=False)
        for name, ratio in ratios.items():
            if (label := graph.get(name)) is None:
                continue
            sigma = found[f"{name}_uncertainty"].reshape(len(label), -1) / committee.rescaling[name]
            error = (found[name].detach() - label).abs().reshape(len(label), -1)
            known = error.isfinite().all(dim=1) & (sigma[:, 0] > _AGREED)
            ratio.append((error / sigma)[known].to(torch.float64).flatten())
    joined = {name: torch.cat(ratio) for name, ratio in ratios.items() if ratio}
    factors = {name: factor_of(joined.get(name, torch.empty(0)), name) for name in ratios}
    coverage: dict[str, float] = {}
    for name, factor in factors.items():
        coverage |= coverage_of(joined[name] / factor, name)
    return factors, coverage


def write_committee(
    folder: Path, members: Sequence[str], *, rescaling: Mapping[str, float] | None = None
) -> None:
    """Make potentials that lie in a folder a committee, which loads as one potential.

    Args:
        folder: Holds them.
        members: Names of the folders in it, two or more.
        rescaling: Of :class:`MeanPotential`.
    """
    document = {"committee_version": COMMITTEE_VERSION, "members": list(members)}
    if rescaling is not None:
        document["rescaling"] = dict(rescaling)
    with write_atomically(folder / COMMITTEE_FILE) as partial:
        partial.write_text(yaml.safe_dump(document), encoding="utf-8")


def read_committee(folder: Path) -> tuple[list[str], dict[str, float]]:
    """Return the names of the folders that a committee's file lists, and its rescaling.

    Raises:
        CheckpointError: The file is of another version, or names no folders.
    """
    document = read_yaml(folder / COMMITTEE_FILE)
    version, names = document.get("committee_version"), document.get("members")
    if version != COMMITTEE_VERSION:
        raise CheckpointError(
            f"{folder} has committee_version {version!r}, this package reads {COMMITTEE_VERSION}"
        )
    if not isinstance(names, list) or not all(
        isinstance(name, str) and name == Path(name).name and name not in (".", "..")
        for name in names
    ):
        raise CheckpointError(f"members of {folder} are names of folders in it, not {names!r}")
    rescaling = document.get("rescaling") or {}
    if not isinstance(rescaling, dict):
        raise CheckpointError(f"rescaling of {folder} are factors by name, not {rescaling!r}")
    return names, rescaling
