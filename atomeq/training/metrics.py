"""MAE and RMSE over a whole set, exact however it is batched."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from atomeq.data.targets import ScalarTarget
from atomeq.graph.atom_graph import AtomGraph
from atomeq.training.losses import LABELS, label_error
from atomeq.typing import PropertyKey
from atomeq.units import BOHR, COULOMB_CONSTANT, DEBYE, GPA, MEV

#: Result name -> title and unit, as the tables and logs show it, and the size of the unit in ours.
_SHOWN: dict[str, tuple[str, str, float]] = {
    "energy": ("energy", "eV", 1.0),
    "energy_per_atom": ("energy/atom", "meV/atom", MEV),
    "forces": ("forces", "meV/Å", MEV),
    "stress": ("stress", "GPa", GPA),
    "dipole": ("dipole", "D", DEBYE),
    "quadrupole": ("quadrupole", "D·Å", DEBYE),
    "polarizability": ("polarizability", "bohr³", BOHR**3 / COULOMB_CONSTANT),
    "born_effective_charges": ("Born charges", "e", 1.0),
    "turn": ("turn", "°", 1.0),
}
UNITS = {name: unit for name, (_, unit, _) in _SHOWN.items()}


class ErrorMetric(Metric):
    """What a task measures a potential with: fed with predictions and batches, it gives numbers."""

    #: Result -> its title and unit in tables.
    columns: Mapping[str, tuple[str, str]] = {}

    def update(self, prediction: Mapping[PropertyKey, Tensor], graph: AtomGraph) -> None:
        """Add a batch."""
        raise NotImplementedError

    def compute(self) -> dict[str, Tensor]:
        """Return the results of what was added."""
        raise NotImplementedError


class SummedErrors(ErrorMetric):
    """MAE and RMSE from sums in float64, in which each label counts once.

    Args:
        factors: Name -> what an error is multiplied by before it is shown.
    """

    full_state_update = False

    def __init__(self, factors: Mapping[str, float]) -> None:
        super().__init__()
        self.factors = dict(factors)
        for name in self.factors:
            for moment in ("absolute", "squared", "count"):
                self.add_state(
                    f"{name}_{moment}",
                    default=torch.zeros((), dtype=torch.float64),
                    dist_reduce_fx="sum",
                )

    def compute(self) -> dict[str, Tensor]:
        """Return the errors of what was added; labels that never occurred are absent."""
        errors: dict[str, Tensor] = {}
        for name, factor in self.factors.items():
            count = getattr(self, f"{name}_count")
            if count == 0:
                continue
            errors[f"{name}_mae"] = factor * getattr(self, f"{name}_absolute") / count
            errors[f"{name}_rmse"] = factor * (getattr(self, f"{name}_squared") / count).sqrt()
        return errors

    def add(self, name: str, error: Tensor, known: Tensor) -> None:
        """Add errors, those that are known."""
        error = error.to(torch.float64)
        for moment, value in (
            ("absolute", error.abs().sum()),
            ("squared", error.square().sum()),
            ("count", known.sum()),
        ):
            state = getattr(self, f"{name}_{moment}")
            setattr(self, f"{name}_{moment}", state + value)


class ScalarErrors(SummedErrors):
    """Errors of a predicted scalar, ``<name>_mae`` and ``<name>_rmse`` in the target's unit.

    Args:
        target: What is predicted.
    """

    def __init__(self, target: ScalarTarget) -> None:
        super().__init__({target.name: 1.0})
        self.target = target
        self.columns = {
            f"{target.name}_{kind}": (f"{target.name} {kind.upper()}", target.unit)
            for kind in ("mae", "rmse")
        }

    def update(self, prediction: Mapping[PropertyKey, Tensor], graph: AtomGraph) -> None:
        """Add a batch."""
        if getattr(graph, "scalar", None) is not None:
            self.add(self.target.name, *label_error("scalar", prediction["scalar"].detach(), graph))


class PotentialErrors(SummedErrors):
    """Errors of a potential.

    ``energy`` [eV per structure], ``energy_per_atom`` [meV/atom], ``forces`` [meV/Å, components]
    and ``stress`` [GPa, nine components], ``dipole`` [D], ``quadrupole`` [D·Å], ``polarizability``
    [bohr³] and ``born_effective_charges`` [e], each as ``<name>_mae`` and ``<name>_rmse``; and
    ``turn`` [°], by how much a canonicalized model turns structures from how they lie.
    """

    columns: Mapping[str, tuple[str, str]] = {
        f"{name}_{kind}": (f"{title} {kind.upper()}", unit)
        for name, (title, unit, _) in _SHOWN.items()
        for kind in ("mae", "rmse")
    }

    def __init__(self) -> None:
        super().__init__({name: 1 / size for name, (_, _, size) in _SHOWN.items()})

    def update(self, prediction: Mapping[PropertyKey, Tensor], graph: AtomGraph) -> None:
        """Add a batch.

        Args:
            prediction: Properties from the potential; those without labels are left out.
            graph: The batch with its labels.
        """
        for key in LABELS:
            if key not in prediction or getattr(graph, key, None) is None:
                continue
            error, known = label_error(key, prediction[key].detach(), graph)
            if key == "energy":
                self.add("energy_per_atom", error, known)
                error = error * graph.natoms
            self.add(key, error, known)
        if "orientation" in prediction:
            angles = angles_of(prediction["orientation"].detach())
            known = torch.isfinite(angles)
            self.add("turn", torch.where(known, angles, 0.0), known)


def angles_of(rotations: Tensor) -> Tensor:
    """Return the angles (n,) of rotations (n, 3, 3), degrees."""
    traces = rotations.to(torch.float64).diagonal(dim1=1, dim2=2).sum(dim=1)
    return torch.rad2deg(torch.arccos(((traces - 1) / 2).clamp(-1, 1)))
