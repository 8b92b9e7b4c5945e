"""Energies relative to references: formation, distance from the convex hull, adsorption.

References must come from the same potential as the energies they are subtracted from. Results of a
screening say which potential they are of, and are refused where it is another.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers
from ase.formula import Formula

from atomeq.screening.results import part_provenance, read_rows, result_files

_EXACT = 1e-6  # of an atom; how well gas molecules must add up to an adsorbate


class MissingReference(ValueError):
    """A structure whose energy has no reference; the message says which is missing."""


class HullReferences:
    """Energies per atom of phases, and from them formation energies and hulls.

    Args:
        energies: eV per atom by formula, such as ``{"Cu": -3.72, "CuAu": -3.5}``; the lowest of
            a composition counts.
    """

    def __init__(self, energies: Mapping[str, float]) -> None:
        self._lowest: dict[str, float] = {}
        for formula, energy in energies.items():
            key = Formula(formula).reduce()[0].format("hill")
            self._lowest[key] = min(energy, self._lowest.get(key, np.inf))
        counted = {formula: _count(formula) for formula in self._lowest}
        self._elements = {
            next(iter(counts)): self._lowest[formula]
            for formula, counts in counted.items()
            if len(counts) == 1
        }
        self._hull = lru_cache(maxsize=256)(self._build)

    @classmethod
    def read(cls, source: str | Mapping[str, float], sha256: str) -> "HullReferences":
        """Take energies as given, or from the folder of a screening with the same potential.

        Raises:
            FileNotFoundError: The folder holds no results.
            ValueError: Its results are of another potential.
        """
        if not isinstance(source, str):
            return cls(source)
        folder = Path(source)
        files = result_files(folder)
        if not files:
            raise FileNotFoundError(f"{folder} holds no results of a screening")
        for path in files:
            found = part_provenance(path)["potential"]["sha256"]
            if found != sha256:
                raise ValueError(
                    f"{path} is of another potential (SHA-256 {found[:12]}…, here {sha256[:12]}…): "
                    "energies of two potentials have no common zero; screen the references anew"
                )
        lowest: dict[str, float] = {}
        for row in read_rows(folder, ["formula", "status", "converged", "energy_per_atom"]):
            energy = row["energy_per_atom"]
            if row["status"] == "done" and row["converged"] is not False and energy is not None:
                lowest[row["formula"]] = min(energy, lowest.get(row["formula"], np.inf))
        return cls(lowest)

    def formation_energy(self, formula: str, energy: float) -> float:
        """Return the energy of formation from the elements, eV per atom.

        Raises:
            MissingReference: An element has no reference.
        """
        counts = _count(formula)
        missing = sorted(counts.keys() - self._elements.keys())
        if missing:
            raise MissingReference(f"no reference energy of the element {', '.join(missing)}")
        elements = sum(number * self._elements[symbol] for symbol, number in counts.items())
        return (energy - elements) / sum(counts.values())

    def above_hull(self, formula: str, energy: float) -> float:
        """Return the distance from the hull of the references, eV per atom; negative below it.

        Raises:
            MissingReference: An element has no reference.
        """
        self.formation_energy(formula, energy)  # the elements are there
        from pymatgen.core import Composition

        composition = Composition(formula)
        hull = self._hull(tuple(sorted(_count(formula))))
        return float(energy / composition.num_atoms - hull.get_hull_energy_per_atom(composition))

    def _build(self, symbols: tuple[str, ...]) -> Any:
        # It loads in seconds, for which workers without a hull need not wait.
        from pymatgen.analysis.phase_diagram import PDEntry, PhaseDiagram
        from pymatgen.core import Composition

        inside = (item for item in self._lowest.items() if _count(item[0]).keys() <= set(symbols))
        compositions = ((Composition(formula), energy) for formula, energy in inside)
        return PhaseDiagram([PDEntry(c, energy * c.num_atoms) for c, energy in compositions])


class AdsorptionReferences:
    """Energies of clean slabs and of gas molecules.

    Args:
        slabs: eV by formula with all atoms, such as ``{"Cu16": -58.1}``.
        gas: eV by formula, such as ``{"H2": -6.8, "CO": -14.4}``; adsorbates are sums of them, with
            any coefficients.
    """

    def __init__(self, slabs: Mapping[str, float], gas: Mapping[str, float]) -> None:
        self._slabs = {formula: (_count(formula), energy) for formula, energy in slabs.items()}
        self._gas = [(_count(formula), energy) for formula, energy in gas.items()]
        self._gas_elements = {symbol for counts, _ in self._gas for symbol in counts}

    def adsorption_energy(self, formula: str, energy: float) -> float:
        """Return E(slab with adsorbate) - E(slab) - E(gas), eV.

        The slab is the largest one of which a formula leaves only elements of the gas.

        Raises:
            MissingReference: No slab fits, or the gas molecules do not add up to what is left.
        """
        whole = _count(formula)
        fitting: list[tuple[int, dict[str, int], float]] = []
        for counts, slab_energy in self._slabs.values():
            rest = {symbol: whole[symbol] - counts.get(symbol, 0) for symbol in whole}
            rest = {symbol: number for symbol, number in rest.items() if number}
            inside = counts.keys() <= whole.keys() and min(rest.values(), default=0) >= 0
            if inside and rest.keys() <= self._gas_elements:
                fitting.append((sum(counts.values()), rest, slab_energy))
        if not fitting:
            raise MissingReference(f"none of the slabs {', '.join(self._slabs)} is in {formula}")
        _, rest, slab_energy = max(fitting, key=lambda fit: fit[0])
        return energy - slab_energy - self._gas_energy(rest)

    def _gas_energy(self, counts: dict[str, int]) -> float:
        symbols = sorted(self._gas_elements)
        table = np.array([[gas.get(symbol, 0) for gas, _ in self._gas] for symbol in symbols])
        wanted = np.array([counts.get(symbol, 0) for symbol in symbols])
        coefficients = np.linalg.lstsq(table.astype(float), wanted, rcond=None)[0]
        if np.abs(table @ coefficients - wanted).max() > _EXACT:
            raise MissingReference(f"the gas references do not add up to {counts}")
        return float(coefficients @ np.array([energy for _, energy in self._gas]))


def _count(formula: str) -> dict[str, int]:
    return Formula(formula).count()


def energies_by_formula(value: Any, name: str) -> dict[str, float]:
    """Check a mapping of formulas to energies that a user wrote.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{name} must map formulas to energies in eV, not {value!r}")
    for formula, energy in value.items():
        try:
            unknown = Formula(str(formula)).count().keys() - atomic_numbers.keys()
        except ValueError as error:
            raise ValueError(f"{name}: {formula!r} is no formula") from error
        if unknown:
            raise ValueError(f"{name}: {formula!r} is no formula, there is no {min(unknown)}")
        if not isinstance(energy, int | float) or not np.isfinite(energy):
            raise ValueError(f"{name}: the energy of {formula} is {energy!r}")
    return {str(formula): float(energy) for formula, energy in value.items()}
