"""Textbook properties of a crystal beside reference values: what a potential is asked first.

A YAML file says which crystal, which other structures of it, and which values are known:

    crystal: {name: Cu, crystalstructure: fcc, a: 3.63, cubic: true}      # of ase.build.bulk
    others:
      bcc: {name: Cu, crystalstructure: bcc, a: 2.89}

References:
      lattice_constant_A: {value: 3.635, source: PBE}
      C11_GPa: {value: 171, source: PBE}
      vacancy_formation_energy_eV: {value: 1.07, source: PBE}
      surface_energy_111_J_per_m2: {}                                       # computed alone
      bcc_minus_crystal_meV_per_atom: {value: 37, source: PBE}

What is named under ``references`` is computed, in float64, and nothing else. Of several crystals
each has such a part, by its name, under ``crystals``.
"""

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.build import bulk, surface

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.properties.elasticity import elastic_tensor
from atomeq.properties.equation_of_state import equation_of_state
from atomeq.properties.relaxation import relaxed
from atomeq.properties.single_points import Report, untold

_SURFACE = re.compile(r"surface_energy_(\d)(\d)(\d)_J_per_m2")
_DIFFERENCE = re.compile(r"(\w+)_minus_crystal_meV_per_atom")
_STIFFNESS = re.compile(r"C([1-6])([1-6])_GPa")
_LENGTH = 10.0  # Å; of the supercell with a vacancy, at least
_LAYERS = 10  # of a slab, in units of what ase.build.surface repeats
_FMAX, _MAX_STEPS = 0.005, 500
_CORE = np.arange(0.5, 1.21, 0.1)  # Å; distances of a dimer that no atoms should come to


def crystals_of(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a YAML file says of each crystal by its name, of a single one by none.

    Args:
        document: As the file has it.

    Raises:
        ValueError: ``crystals`` are no parts by name.
    """
    parts = document.get("crystals", {"": dict(document)})
    if not isinstance(parts, dict) or not all(isinstance(one, dict) for one in parts.values()):
        raise ValueError(f"crystals are parts by name, not {parts!r}")
    return parts


class CrystalProperties:
    """Properties of one crystal by a potential, each computed when it is asked for.

    Args:
        document: As the YAML file says.
        calculator: Of the potential, in float64.

    Raises:
        ValueError: The document names no crystal, an unknown property or a value that is no number.
    """

    def __init__(self, document: Mapping[str, Any], calculator: AtomeqCalculator) -> None:
        self._others = document.get("others", {})
        self._calculator, self._report = calculator, untold
        self.references: dict[str, dict[str, Any]] = document.get("references", {})
        if "crystal" not in document or not isinstance(self.references, dict):
            raise ValueError(
                "reference values need 'crystal', arguments of ase.build.bulk, and 'references'"
            )
        self._start = _built("crystal", document["crystal"])
        for name, node in self.references.items():
            self._function(name)
            value = (node or {}).get("value")
            if value is not None and type(value) not in (int, float):
                raise ValueError(f"the value of {name} is a number, not {value!r}")

    def __call__(self, report: Report = untold) -> dict[str, dict[str, Any]]:
        """Return ``value``, ``reference`` and ``source`` of each property that is named."""
        self._report = report
        found: dict[str, dict[str, Any]] = {}
        for name, node in self.references.items():
            node = node or {}
            found[name] = {"value": float(self._function(name)())}
            if "value" in node:
                found[name] |= {"reference": node["value"], "source": node.get("source", "")}
        return found

    def _function(self, name: str) -> Callable[[], float]:
        """Return what computes a property.

        Raises:
            ValueError: There is no such property.
        """
        plain = {
            "lattice_constant_A": self._lattice_constant,
            "bulk_modulus_GPa": self._bulk_modulus,
            "vacancy_formation_energy_eV": self._vacancy,
            "cohesive_energy_eV": self._cohesive_energy,
            "dimer_core_eV": self._dimer_core,
        }
        if name in plain:
            return plain[name]
        if match := _STIFFNESS.fullmatch(name):
            row, column = (int(digit) - 1 for digit in match.groups())
            return lambda: self._stiffness[row, column]
        if match := _SURFACE.fullmatch(name):
            indices = tuple(int(digit) for digit in match.groups())
            return lambda: self._surface_energy(indices)
        if (match := _DIFFERENCE.fullmatch(name)) and match[1] in self._others:
            return lambda: self._difference(match[1])
        raise ValueError(
            f"there is no property {name!r}; there are {', '.join(plain)}, C11_GPa and its like, "
            "surface_energy_111_J_per_m2 and its like, and X_minus_crystal_meV_per_atom of each X "
            "under 'others'"
        )

    @cached_property
    def _crystal(self) -> Atoms:
        return self._relaxed(self._start, cell=True, what="crystal")

    @cached_property
    def _energy(self) -> float:
        """Of an atom of the crystal, eV."""
        return self._energy_of(self._crystal) / len(self._crystal)

    @cached_property
    def _stiffness(self) -> np.ndarray:
        fit, _ = elastic_tensor(
            self._crystal, self._calculator, fmax=_FMAX, report=self._report, strain=2e-3
        )
        return fit.stiffness

    def _lattice_constant(self) -> float:
        return float(self._crystal.cell.lengths()[0])

    def _bulk_modulus(self) -> float:
        fit, _ = equation_of_state(self._crystal, self._calculator, fmax=_FMAX, report=self._report)
        return fit.bulk_modulus

    def _cohesive_energy(self) -> float:
        """Return what an atom alone, as the potential knows it, has more than in the crystal."""
        alone = [self._energy_of(Atoms([z])) for z in self._crystal.numbers]
        return float(np.mean(alone)) - self._energy

    def _vacancy(self) -> float:
        repeats = np.ceil(_LENGTH / self._crystal.cell.lengths()).astype(int)
        atoms = self._crystal.repeat(tuple(repeats))
        whole = self._energy * len(atoms)
        del atoms[0]
        if len(set(self._crystal.numbers)) > 1:
            raise ValueError("the vacancy of a compound depends on chemical potentials; leave it")
        found = self._energy_of(self._relaxed(atoms, cell=False, what="vacancy"))
        return found - whole * len(atoms) / (len(atoms) + 1)

    def _surface_energy(self, indices: tuple[int, ...]) -> float:
        slab = surface(self._crystal, indices, _LAYERS, vacuum=8.0, periodic=True)
        found = self._energy_of(self._relaxed(slab, cell=False, what=f"surface {indices}"))
        area = float(np.linalg.norm(np.cross(slab.cell[0], slab.cell[1])))
        return (found - len(slab) * self._energy) / (2 * area) * units.m**2 / units.J

    def _difference(self, name: str) -> float:
        other = self._relaxed(_built(name, self._others[name]), cell=True, what=name)
        return 1e3 * (self._energy_of(other) / len(other) - self._energy)

    def _dimer_core(self) -> float:
        """Return the lowest energy of two atoms closer than 1.2 Å over that at 2.2 Å, eV."""
        pair = [self._crystal.numbers[0]] * 2
        dimers = [Atoms(pair, [[0, 0, 0], [0, 0, d]]) for d in (*_CORE, 2.2)]
        *core, bond = [row["energy"] for row in self._calculator.evaluate(dimers, ["energy"])]
        return min(core) - bond

    def _relaxed(self, atoms: Atoms, *, cell: bool, what: str) -> Atoms:
        (found,) = relaxed(
            [atoms],
            self._calculator,
            cell=cell,
            fmax=_FMAX,
            max_steps=_MAX_STEPS,
            what=what,
            report=self._report,
        )
        return found

    def _energy_of(self, atoms: Atoms) -> float:
        return float(self._calculator.evaluate([atoms], ["energy"])[0]["energy"])


def _built(name: str, arguments: Any) -> Atoms:
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{name} are arguments of ase.build.bulk, not {arguments!r}")
    try:
        return bulk(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: ase.build.bulk refuses {dict(arguments)}: {error}") from error
