"""How far off a potential may be: the covariance of its last layer, calibrated on labels.

The features f of an atom, what a network's last linear map makes its energy of, are spread in
training by C = <f fᵀ>. A structure whose features the training set has hardly shown has a large
q² = fᵀ (C + ς² 1)⁻¹ f, the prediction rigidity of the last layer (Bigi, Chong, Ceriotti & Grasselli
2024, arXiv:2403.02251), and a standard deviation α q. One α for each property, and one ς, are set
on structures that were not trained on. It costs one pass over the training set, no training, and a
product of matrices per evaluation.

Energies are taken per atom, with the mean features of a structure; a force has the features of its
atom, which say how well its surroundings are known and cost no further derivative.
"""

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.ops.segment.operations import segment_mean
from atomeq.typing import PropertyKey

if TYPE_CHECKING:
    from atomeq.potential.potential import Potential

#: What a potential with an uncertainty gives beside its results.
UNCERTAINTIES: tuple[PropertyKey, ...] = (
    "energy_uncertainty",
    "forces_uncertainty",
    "extrapolation",
)
#: Share of a Gaussian within one standard deviation.
ONE_SIGMA = math.erf(1 / math.sqrt(2))
_RIDGES = tuple(10.0**k for k in range(-10, 2))  # ς² in units of the mean variance of a feature
_FEWEST = 5  # labels of a calibration
_FORBIDDEN = 1e-3  # eV/Å; forces below it, labelled and predicted, are zero by symmetry


def is_free(label: Tensor, predicted: Tensor) -> Tensor:
    """Return which forces (n, 3), eV/Å, could be wrong: symmetry does not forbid them, (n,).

    Those that it does are right whatever was learned, and would make any σ look too large.
    """
    return (label.abs() + predicted.abs()).amax(dim=1) > _FORBIDDEN


class LastLayerUncertainty(nn.Module):
    """Standard deviations of energies and forces from the features of atoms.

    Args:
        n_features: Of an atom.

    Attributes:
        energy: α L⁻¹ with L Lᵀ = C + ς², of mean features, (n_features, n_features): σ = |L⁻¹ f̄| α,
            eV per atom.
        forces: The same of a component of a force, eV/Å.
        largest: Of |L⁻¹ f|² over the atoms of the training set.
    """

    energy: Tensor
    forces: Tensor
    largest: Tensor

    def __init__(self, n_features: int) -> None:
        super().__init__()
        for name in ("energy", "forces"):
            zeros = torch.zeros(n_features, n_features, dtype=torch.float64)
            self.register_buffer(name, zeros)
        self.register_buffer("largest", torch.ones((), dtype=torch.float64))

    @property
    def n_features(self) -> int:
        """Features of an atom."""
        return self.energy.shape[0]

    def forward(self, features: Tensor, graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        """Return what may be wrong.

        Args:
            features: As a model returns them, (n_atoms, n_features).
            graph: The structures.

        Returns:
            ``energy_uncertainty`` (n_graphs,), eV; ``forces_uncertainty`` (n_atoms,), eV/Å, of each
            component; ``extrapolation`` (n_atoms,): above 1 an atom's features lie further out than
            those of any atom of the training set.
        """
        features = features.detach().to(torch.float64)
        means = segment_mean(features, graph.batch, graph.n_graphs)
        q_forces = _norms(features, self.forces)
        return {
            "energy_uncertainty": _norms(means, self.energy) * graph.natoms,
            "forces_uncertainty": q_forces,
            "extrapolation": q_forces**2 / self.largest,
        }

    def _apply(self, fn, recurse: bool = True):
        # Like references they follow to a device and stay float64: a covariance is ill-conditioned.
        device = fn(self.largest).device
        for name in self._buffers:
            setattr(self, name, getattr(self, name).to(device))
        return self


def calibrated(
    potential: "Potential", training: Iterable[AtomGraph], held_out: Iterable[AtomGraph]
) -> tuple[LastLayerUncertainty, dict[str, float]]:
    """Measure the covariance of a potential's features and calibrate it; the potential stays.

    Args:
        potential: In evaluation mode.
        training: Batches of what it was trained on, with edges; their labels are not needed.
        held_out: Batches with labels ``energy`` or ``forces``, not trained on. Structures without a
            label (NaN) are passed over.

    Returns:
        The uncertainty, to be set as ``potential.uncertainty``, and what share of the held-out
        errors lies within one and two standard deviations: ``energy_68``, ``forces_95`` and so on.

    Raises:
        ValueError: The model offers no features, or there are too few labels for a calibration.
    """
    sums = _Sums()
    for graph in training:
        sums.add(atom_features(potential, graph), graph)
    if not sums.n_atoms:
        raise ValueError("the training set is empty: there is nothing to know features from")
    found = list(_held_out(potential, held_out))
    module = LastLayerUncertainty(sums.n_features).to(potential.device)
    coverage: dict[str, float] = {}
    if not found:
        raise ValueError("no structure was held out to calibrate by")
    for name, covariance in sums.covariances().items():
        features = torch.cat([rows[name][0] for rows in found])
        errors = torch.cat([rows[name][1] for rows in found])
        _refuse_few(len(errors), name)
        factor = _fitted(covariance, features, errors)
        setattr(module, name, factor)
        coverage |= coverage_of(errors.abs() / _norms(features, factor)[:, None], name)
    module.largest = torch.stack(
        [_norms(part, module.forces).square().max() for part in sums.atoms]
    ).max()
    return module, coverage


def _refuse_few(n_errors: int, name: str) -> None:
    if n_errors >= _FEWEST:
        return
    if name == "energy":
        raise ValueError(
            f"{n_errors} held-out energies are too few to calibrate by; "
            f"give {_FEWEST} or more structures that were not trained on"
        )
    raise ValueError("the held-out structures have no forces to calibrate by; label them with both")


def coverage_of(ratios: Tensor, name: str) -> dict[str, float]:
    """Return the shares of errors within one and two σ, ``energy_68`` and ``energy_95``.

    Args:
        ratios: Of errors to σ.
        name: Of the property.
    """
    shares = {f"{name}_{share}": (ratios <= z).double().mean() for z, share in ((1, 68), (2, 95))}
    return {key: float(share) for key, share in shares.items()}


def factor_of(ratios: Tensor, name: str) -> float:
    """Return what to multiply σ by for 68 % of the errors to lie within.

    Args:
        ratios: Of errors to σ.
        name: Of the property.

    Raises:
        ValueError: They are too few.
    """
    _refuse_few(len(ratios), name)
    return float(torch.quantile(_few(ratios.flatten()), ONE_SIGMA))


class _Sums:
    """Features of a training set, as the two covariances need them."""

    def __init__(self) -> None:
        self.atoms: list[Tensor] = []
        self.means: list[Tensor] = []

    def add(self, features: Tensor, graph: AtomGraph) -> None:
        self.atoms.append(features)
        self.means.append(segment_mean(features, graph.batch, graph.n_graphs))

    @property
    def n_atoms(self) -> int:
        return sum(len(part) for part in self.atoms)

    @property
    def n_features(self) -> int:
        return self.atoms[0].shape[1]

    def covariances(self) -> dict[str, Tensor]:
        """Return the mean of f fᵀ over structures and over atoms."""
        return {
            name: sum((part.T @ part for part in parts), torch.zeros(()).to(parts[0]))
            / sum(map(len, parts))
            for name, parts in (("energy", self.means), ("forces", self.atoms))
        }


def atom_features(potential: "Potential", graph: AtomGraph) -> Tensor:
    """Return what the last linear map of a network sees of each atom, (n_atoms, n_features).

    Raises:
        ValueError: The model offers no features.
    """
    with torch.no_grad():
        outputs = potential.model(graph)
    if "features" not in outputs:
        raise ValueError(
            f"{type(potential.model).__name__} returns no features of its atoms, so there is no "
            "covariance of them; return 'features' (n_atoms, n) from its forward()"
        )
    return outputs["features"].detach().to(torch.float64)


def _held_out(
    potential: "Potential", graphs: Iterable[AtomGraph]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Yield features and errors: of energies per atom, (n, 1), and of forces, (n, 3)."""
    for graph in graphs:
        predicted = potential(graph, ("energy", "forces"), create_graph=False)
        features = atom_features(potential, graph)
        means = segment_mean(features, graph.batch, graph.n_graphs)
        energy = predicted["energy"] - graph.get("energy", math.nan)
        errors = {
            "energy": (energy / graph.natoms)[:, None],
            "forces": (predicted["forces"] - graph.get("forces", math.nan)).to(torch.float64),
        }
        rows = {}
        for name, of in (("energy", means), ("forces", features)):
            known = torch.isfinite(errors[name]).all(dim=1)
            if name == "forces":
                known &= is_free(predicted["forces"] - errors["forces"], predicted["forces"])
            rows[name] = (of[known], errors[name].detach()[known])
        yield rows


def _fitted(covariance: Tensor, features: Tensor, errors: Tensor) -> Tensor:
    """Return α L⁻¹ of the ridge that makes the errors likeliest; α so that 68 % lie within σ.

    A Gaussian's own α, the mean of z², would follow a few large errors; intervals that hold what
    they promise are what it is for.
    """
    scale = covariance.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    eye = torch.eye(len(covariance)).to(covariance)
    best, chosen = -math.inf, None
    for ridge in _RIDGES:
        lower, info = torch.linalg.cholesky_ex(covariance + ridge * scale * eye)
        if int(info):  # not positive definite to the last digit: a larger ridge is
            continue
        inverse = torch.linalg.solve_triangular(lower, eye, upper=False)
        q = _norms(features, inverse)[:, None].clamp(min=1e-300)
        z = errors.abs() / q
        alpha = factor_of(z, "energy")
        likelihood = float(-(0.5 * (z / max(alpha, 1e-300)) ** 2).mean() - (alpha * q).log().mean())
        if likelihood > best:
            best, chosen = likelihood, alpha * inverse
    if chosen is None:
        raise ValueError("the features of the training set are not finite; check the potential")
    return chosen


def _few(values: Tensor, most: int = 10_000_000) -> Tensor:
    """Return values evenly chosen: torch.quantile takes no more than 16 million."""
    return values if len(values) <= most else values[:: -(-len(values) // most)]


def _norms(features: Tensor, factor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(features @ factor.T, dim=1)
