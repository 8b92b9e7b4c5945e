"""The training loss: of potentials a weighted sum of errors, of scalars their error alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from atomeq.data.targets import ScalarTarget
from atomeq.graph.atom_graph import AtomGraph
from atomeq.potential.potential import ELECTRIC
from atomeq.training.distributed import joint_count
from atomeq.typing import OF_STRUCTURES, PropertyKey

#: What potentials learn.
LABELS: tuple[PropertyKey, ...] = ("energy", "forces", "stress", *ELECTRIC)
#: What of a potential else a loss may be of.
_UNLABELLED: tuple[PropertyKey, ...] = ("gradient_forces", "orientation")


class Loss(Protocol):
    """What a task minimises."""

    @property
    def properties(self) -> tuple[PropertyKey, ...]:
        """What the loss needs of the predictor."""
        ...

    @property
    def labels(self) -> tuple[PropertyKey, ...]:
        """What it needs labels of."""
        ...

    def __call__(
        self, prediction: Mapping[PropertyKey, Tensor], graph: AtomGraph
    ) -> dict[str, Tensor]:
        """Return ``loss`` and its parts, all scalars, of a batch with its labels."""
        ...


@dataclass(frozen=True)
class ScalarLoss:
    """L = <w f(Δy)>: the mean over structures, in the unit of the target.

    Attributes:
        kind: f: the absolute value, the square or Huber's function.
        huber_delta: Where Huber's function turns linear, in the unit of the target.
    """

    kind: Literal["mae", "mse", "huber"] = "mae"
    huber_delta: float = 0.01

    def __post_init__(self) -> None:
        _refuse_delta(self.kind, self.huber_delta)

    @property
    def properties(self) -> tuple[PropertyKey, ...]:
        """What the loss needs of the predictor."""
        return ("scalar",)

    @property
    def labels(self) -> tuple[PropertyKey, ...]:
        """What it needs labels of."""
        return ("scalar",)

    def __call__(
        self, prediction: Mapping[PropertyKey, Tensor], graph: AtomGraph
    ) -> dict[str, Tensor]:
        """Return the ``loss`` of a batch; structures without a label do not count."""
        error, known = label_error("scalar", prediction["scalar"], graph)
        cost = _cost(error, self.kind, self.huber_delta)
        weight = graph.weight.to(cost.dtype)
        return {"loss": (weight * cost * known).sum() / joint_count(known.sum())}


@dataclass(frozen=True)
class PotentialLoss:
    """L = c_E <w f(ΔE/N)> + c_F <w f(ΔF)> + c_S <w f(Δσ)> + c_G <w f(F + dE/dx)>.

    The mean goes over structures for energy, over force components and over the nine stress
    components; w is the weight of the structure and f the square, the absolute value or Huber's
    function. Labels that a structure lacks (NaN) do not count.

    OC20's loss is ``kind="l2mae"``: absolute energy errors, and the mean length of the error vector
    of each atom's force; with ``energy_per="structure"`` and ``free_atoms_only=True``.

    Attributes:
        energy: c_E; errors in eV/atom, or in eV as ``energy_per`` says.
        forces: c_F; errors in eV/Å.
        stress: c_S; errors in eV/Å³.
        dipole: Its coefficient, and so on: of an :class:`~atomeq.models.electric.Electric` model;
            errors in e·Å.
        quadrupole: Errors in e·Å².
        polarizability: Errors in e²·Å²/eV.
        born_effective_charges: Errors in e.
        gradient_forces: c_G; draws a force head to the gradient of the energy, which is held fixed
            (FAENet's ``direct_with_gradient_target``). In training alone.
        orientation: Of the mean square of R - 1, R the frames of a
            :class:`~atomeq.models.frame_averaged.Canonicalized` model: the prior of Mondal et al.
            (NeurIPS 2023, arXiv:2310.01647), which lets a network that was trained on structures as
            they lie see them so.
        pressure: Whether the trace of the stress counts. Labels from plane waves of a fixed cutoff
            carry the Pulay stress, a pressure that is no derivative of their energies; without the
            trace the loss does not see it.
        kind: f; ``conditional_huber`` has a smaller delta for large forces, which weigh less then.
        huber_delta: Where Huber's function turns linear, in the units of the error; one number, or
            one for each property.
        energy_per: What an energy error is divided by: the number of atoms, or nothing.
        free_atoms_only: Leave out the forces on fixed atoms.
    """

    energy: float = 1.0
    forces: float = 10.0
    stress: float = 0.0
    dipole: float = 0.0
    quadrupole: float = 0.0
    polarizability: float = 0.0
    born_effective_charges: float = 0.0
    gradient_forces: float = 0.0
    orientation: float = 0.0
    pressure: bool = True
    kind: Literal["mse", "mae", "huber", "conditional_huber", "l2mae"] = "mse"
    huber_delta: float | dict[str, float] = 0.01
    energy_per: Literal["atom", "structure"] = "atom"
    free_atoms_only: bool = False

    def __post_init__(self) -> None:
        coefficients = {key: getattr(self, key) for key in (*LABELS, *_UNLABELLED)}
        if min(coefficients.values()) < 0 or not self.labels:
            shown = ", ".join(f"{key}={value}" for key, value in coefficients.items() if value)
            raise ValueError(f"loss coefficients are >= 0 and not all zero; got {shown or 'zeros'}")
        if self.gradient_forces and not self.forces:
            raise ValueError("gradient_forces are a target beside the labels: set forces above 0")
        if isinstance(self.huber_delta, dict) and set(self.huber_delta) != set(self.labels):
            raise ValueError(
                f"huber_delta has {', '.join(self.huber_delta)}, and the loss is of "
                f"{', '.join(self.labels)}; give one number, or one for each"
            )
        for key in self.labels:
            _refuse_delta(self.kind, self._delta(key))

    def _delta(self, key: str) -> float:
        if isinstance(self.huber_delta, dict):
            return self.huber_delta["forces" if key == "gradient_forces" else key]
        return self.huber_delta

    @property
    def properties(self) -> tuple[PropertyKey, ...]:
        """What the loss needs of the potential."""
        return tuple(key for key in (*LABELS, *_UNLABELLED) if getattr(self, key) > 0)

    @property
    def labels(self) -> tuple[PropertyKey, ...]:
        """What it needs labels of."""
        return tuple(key for key in LABELS if getattr(self, key) > 0)

    def __call__(
        self, prediction: Mapping[PropertyKey, Tensor], graph: AtomGraph
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            prediction: Properties from the potential, at least :attr:`labels`; where there are no
                ``gradient_forces``, as in validation, their term is left out.
            graph: The batch with its labels.

        Returns:
            ``loss`` and the mean error of each property before its coefficient, all scalars.
        """
        terms = {
            key: self._term(key, prediction, graph) for key in self.properties if key in prediction
        }
        loss = torch.stack([getattr(self, key) * term for key, term in terms.items()]).sum()
        return {"loss": loss, **terms}

    def _term(
        self, key: PropertyKey, prediction: Mapping[PropertyKey, Tensor], graph: AtomGraph
    ) -> Tensor:
        if key == "orientation":
            turned = prediction[key] - torch.eye(3).to(prediction[key])
            known = torch.isfinite(turned)
            return torch.where(known, turned, 0.0).square().sum() / joint_count(known.sum())
        if key == "gradient_forces":
            error = prediction["forces"] - prediction[key]
            known = torch.ones_like(error, dtype=torch.bool)
        else:
            error, known = label_error(key, prediction[key], graph)
        if key == "energy" and self.energy_per == "structure":
            error = error * graph.natoms
        of_atoms = key not in OF_STRUCTURES
        if key in ("forces", "gradient_forces"):
            if self.free_atoms_only and "fixed" in graph:
                known = known & ~graph["fixed"].bool()[:, None]
            if self.kind == "l2mae":
                known = known.all(dim=1, keepdim=True)
                error = torch.linalg.vector_norm(error, dim=1, keepdim=True)  # (n_atoms, 1)
        if key == "stress" and not self.pressure:
            error = without_trace(error)
        delta: float | Tensor = self._delta(key)
        if key == "forces" and self.kind == "conditional_huber":
            delta = delta * _large_force_factor(graph.forces)
        cost = _cost(error, self.kind, delta)
        weight = graph.weight
        if f"{key}_weight" in graph:
            weight = weight * graph[f"{key}_weight"]
        weight = weight[graph.batch] if of_atoms else weight
        weight = weight.to(cost.dtype).reshape(-1, *[1] * (cost.ndim - 1))
        return (weight * cost * known).sum() / joint_count(known.sum())


def _refuse_delta(kind: str, huber_delta: float) -> None:
    if kind.endswith("huber") and huber_delta <= 0:
        raise ValueError(f"huber_delta must be positive, got {huber_delta}")


def _large_force_factor(forces: Tensor) -> Tensor:
    """Return what multiplies the delta of each atom's force, (n_atoms, 1): MACE's conditions."""
    size = torch.linalg.vector_norm(forces, dim=1, keepdim=True)
    factors = torch.tensor([1.0, 0.7, 0.4, 0.1], dtype=forces.dtype, device=forces.device)
    bounds = torch.tensor([100.0, 200.0, 300.0], dtype=forces.dtype, device=forces.device)  # eV/Å
    return factors[torch.bucketize(size, bounds, right=True)]


def _cost(error: Tensor, kind: str, huber_delta: float | Tensor) -> Tensor:
    if kind == "mse":
        return error.square()
    if kind in ("mae", "l2mae"):
        return error.abs()
    size = error.abs()
    return torch.where(
        size <= huber_delta, error.square() / 2, huber_delta * (size - huber_delta / 2)
    )


def without_trace(stress: Tensor) -> Tensor:
    """Return the deviatoric part of stresses (n_graphs, 3, 3): what is left without pressure."""
    mean = stress.diagonal(dim1=1, dim2=2).mean(dim=1)
    return stress - torch.diag_embed(mean[:, None].expand(-1, 3))


def label_error(key: str, predicted: Tensor, graph: AtomGraph) -> tuple[Tensor, Tensor]:
    """Return prediction minus label and where the label is known.

    Args:
        key: ``energy`` (per atom), ``forces``, ``stress``, ``scalar`` or an electric property.
        predicted: As a potential or a predictor of scalars returns it.
        graph: The batch with its labels.

    Returns:
        Error, in eV/atom for the energy, zero where the label is NaN; and the mask of the known.
    """
    label = getattr(graph, key)
    known = torch.isfinite(label)
    # Subtract in the wider dtype: total energies of 10⁴ eV have no meV digits in float32.
    error = torch.where(known, predicted.to(label.dtype) - label, 0.0)
    if key == "energy":
        error = error / graph.natoms
    return error, known


def loss_of(
    target: ScalarTarget | None,
    loss: PotentialLoss | None,
    scalar_loss: ScalarLoss | None,
    *,
    staged: bool,
) -> Loss:
    """Return the loss of a potential or of a scalar, by default the plain one.

    Raises:
        ValueError: What is given is of the other.
    """
    if target is None:
        if scalar_loss is not None:
            raise ValueError("scalar_loss is of a target, and a potential is trained; set target")
        return loss or PotentialLoss()
    if loss is not None or staged:
        raise ValueError(
            f"loss and stages are of potentials; for the target {target.name} set scalar_loss"
        )
    return scalar_loss or ScalarLoss()
