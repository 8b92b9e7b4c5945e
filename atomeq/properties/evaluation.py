"""How far a potential is off labelled structures: by kind of structure, by element, by promise."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import NDArray

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.potential.uncertainty import UNCERTAINTIES, is_free
from atomeq.units import GPA

_SIGMAS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
_CHUNK = 8  # structures between two reports of progress
_FACTORS = {"energy_meV_per_atom": 1e3, "forces_meV_per_A": 1e3, "stress_GPa": 1 / GPA}


@dataclass
class Compared:
    """Labels beside what a potential gives, in the units of the package.

    Attributes:
        label: As labelled; of energies per atom.
        predicted: By the potential.
        sigma: Uncertainties of a calibrated potential, else empty.
        owners: What each number belongs to: the kind of its structure and, of a force, its element.
    """

    label: list[NDArray[np.float64]] = field(default_factory=list)
    predicted: list[NDArray[np.float64]] = field(default_factory=list)
    sigma: list[NDArray[np.float64]] = field(default_factory=list)
    owners: list[tuple[Hashable, NDArray[np.int64] | None]] = field(default_factory=list)


class Evaluation:
    """Errors of a potential on structures that carry labels.

    Args:
        structures: With ``energy`` (eV), ``forces`` (eV/Å) or ``stress`` (eV/Å³) as results.
        calculator: Computes them; one potential.
        kind: Names the kind of a structure.
        report: Told how many are done.

    Attributes:
        compared: By ``energy_meV_per_atom``, ``forces_meV_per_A``, ``stress_GPa``.
        n_structures: By kind, and ``"all"``.

    Raises:
        ValueError: No structure has a label.
    """

    def __init__(
        self,
        structures: Sequence[Atoms],
        calculator: AtomeqCalculator,
        *,
        kind: Callable[[Atoms], str] = lambda atoms: "all",
        report: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.compared = {name: Compared() for name in _FACTORS}
        self.n_structures: dict[str, int] = {"all": 0}
        self.n_outside = 0  # atoms whose features training has not shown
        self._calibrated = "forces_uncertainty" in calculator.implemented_properties
        self._judges = "extrapolation" in calculator.implemented_properties
        for start in range(0, len(structures), _CHUNK):
            few = structures[start : start + _CHUNK]
            for atoms, results in zip(few, self._computed(few, calculator), strict=True):
                self._add(atoms, results, kind(atoms))
            report(start + len(few))
        if not any(part.label for part in self.compared.values()):
            raise ValueError(
                "no structure has a label: energies and forces are read from the results of a "
                "structure's calculator, as extended XYZ keeps them"
            )

    def _computed(
        self, structures: Sequence[Atoms], calculator: AtomeqCalculator
    ) -> Iterable[Mapping[str, Any]]:
        names = ["energy", "forces"]
        if self._calibrated:
            known = calculator.implemented_properties
            names += [name for name in UNCERTAINTIES if name in known]
        if "stress" in calculator.implemented_properties and all(
            "stress" in _labels(atoms) for atoms in structures
        ):
            names.append("stress")
        return calculator.evaluate(structures, names)

    def _add(self, atoms: Atoms, results: Mapping[str, Any], kind: str) -> None:
        labels, n = _labels(atoms), len(atoms)
        for name in ("all", kind) if kind != "all" else ("all",):
            self.n_structures[name] = self.n_structures.get(name, 0) + 1
        if "extrapolation" in results:
            self.n_outside += int((results["extrapolation"] > 1).sum())
        if "energy" in labels:
            sigma = results.get("energy_uncertainty")
            self._keep(
                "energy_meV_per_atom",
                *(np.array([labels["energy"] / n]), np.array([results["energy"] / n])),
                sigma=None if sigma is None else np.array([sigma / n]),
                owner=(kind, None),
            )
        if "forces" in labels:
            self._keep(
                "forces_meV_per_A",
                *(labels["forces"], results["forces"]),
                sigma=results.get("forces_uncertainty"),
                owner=(kind, atoms.numbers),
            )
        if "stress" in labels and "stress" in results:
            self._keep(
                "stress_GPa", *(labels["stress"], results["stress"]), sigma=None, owner=(kind, None)
            )

    def _keep(
        self,
        name: str,
        label: Any,
        predicted: Any,
        *,
        sigma: NDArray[np.float64] | None,
        owner: tuple[Hashable, NDArray[np.int64] | None],
    ) -> None:
        part = self.compared[name]
        part.label.append(np.asarray(label, dtype=np.float64))
        part.predicted.append(np.asarray(predicted, dtype=np.float64))
        part.owners.append(owner)
        if sigma is not None:
            part.sigma.append(sigma)

    def errors(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return MAE, RMSE and count by kind (``"all"`` too) and by quantity."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for name, part in self.compared.items():
            for kind in self.n_structures:
                of_kind = [
                    predicted - label
                    for predicted, label, (own, _) in zip(
                        part.predicted, part.label, part.owners, strict=True
                    )
                    if kind in ("all", own)
                ]
                if of_kind:
                    found.setdefault(kind, {})[name] = _moments(of_kind, _FACTORS[name])
        return found

    def by_element(self) -> dict[str, dict[str, float]]:
        """Return the errors of forces, meV/Å, by the symbol of the atom they act on."""
        part = self.compared["forces_meV_per_A"]
        if not part.label:
            return {}
        errors = np.concatenate(part.predicted) - np.concatenate(part.label)
        numbers = np.concatenate([of for _, of in part.owners if of is not None])
        return {
            chemical_symbols[z]: _moments([errors[numbers == z]], 1e3) for z in np.unique(numbers)
        }

    def coverage(self, kind: str = "all") -> dict[str, float]:
        """Return what a calibrated potential's uncertainties are worth here; else nothing.

        The shares of errors within σ and 2 σ (68.3 and 95.4 % are promised), the mean error of the
        tenth with the largest σ over the median error, and the share of atoms beyond training,
        which a committee does not tell.

        Args:
            kind: Of structures; of one kind nothing is told of atoms beyond training.
        """
        found: dict[str, float] = {}
        for name in ("energy_meV_per_atom", "forces_meV_per_A"):
            short = name.partition("_")[0]
            sigma, errors = self._doubted(name, kind)
            if not len(sigma):
                continue
            found[f"{short}_68"] = float((errors <= sigma[:, None]).mean())
            found[f"{short}_95"] = float((errors <= 2 * sigma[:, None]).mean())
            worst = np.argsort(-sigma, kind="stable")[: max(1, len(sigma) // 10)]
            median = float(np.median(errors.mean(axis=1)))
            if median > 0:
                found[f"{short}_worst_decile_over_median"] = float(errors[worst].mean()) / median
        if found and self._judges and kind == "all":
            n_atoms = sum(map(len, self.compared["forces_meV_per_A"].label)) or 1
            found["atoms_beyond_training"] = self.n_outside / n_atoms
        return found

    def _doubted(
        self, name: str, kind: str = "all"
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return σ (n,) and errors (n, 1 or 3), less those of forces that symmetry forbids."""
        part = self.compared[name]
        chosen = [k for k, (own, _) in enumerate(part.owners) if kind in ("all", own)]
        if not part.sigma or not chosen:
            return np.empty(0), np.empty((0, 1))
        sigma, label, predicted = (
            np.concatenate([rows[k] for k in chosen])
            for rows in (part.sigma, part.label, part.predicted)
        )
        errors = np.abs(predicted - label).reshape(len(sigma), -1)
        if name != "forces_meV_per_A":
            return sigma, errors
        free = is_free(torch.from_numpy(label), torch.from_numpy(predicted)).numpy()
        return sigma[free], errors[free]

    def calibration(self) -> dict[str, list[float]]:
        """Return shares of errors within multiples of σ, beside those of a normal distribution."""
        found = {"sigmas": list(_SIGMAS)}
        found["promised"] = [math.erf(z / math.sqrt(2)) for z in _SIGMAS]
        for name in ("energy_meV_per_atom", "forces_meV_per_A"):
            sigma, errors = self._doubted(name)
            if len(sigma):
                ratios = errors / sigma[:, None]
                found[name.partition("_")[0]] = [float((ratios <= z).mean()) for z in _SIGMAS]
        return found if len(found) > 2 else {}


def scan(structures: Sequence[Atoms], calculator: AtomeqCalculator) -> dict[str, Any]:
    """Compare energies along a path, each over that where the labelled energy is lowest.

    Args:
        structures: In the order of the path, with labelled energies.
        calculator: Computes them.

    Returns:
        ``labelled_eV`` and ``predicted_eV``, their ``range_..._eV`` and ``rmse_eV``.

    Raises:
        ValueError: A structure has no energy.
    """
    if not structures or not all("energy" in _labels(atoms) for atoms in structures):
        raise ValueError("a scan is of structures with energies, and one has none")
    labelled = np.array([_labels(atoms)["energy"] for atoms in structures])
    rows = calculator.evaluate(structures, ["energy"])
    predicted = np.array([row["energy"] for row in rows])
    lowest = int(labelled.argmin())
    labelled, predicted = labelled - labelled[lowest], predicted - predicted[lowest]
    return {
        "labelled_eV": labelled.tolist(),
        "predicted_eV": predicted.tolist(),
        "range_labelled_eV": float(np.ptp(labelled)),
        "range_predicted_eV": float(np.ptp(predicted)),
        "rmse_eV": float(np.sqrt(((predicted - labelled) ** 2).mean())),
    }


def _labels(atoms: Atoms) -> Mapping[str, Any]:
    return {} if atoms.calc is None else atoms.calc.results


def _moments(errors: Sequence[NDArray[np.float64]], factor: float) -> dict[str, float]:
    joined = factor * np.concatenate([one.ravel() for one in errors])
    return {
        "mae": float(np.abs(joined).mean()),
        "rmse": float(np.sqrt((joined**2).mean())),
        "count": len(joined),
    }
