"""Energy against volume, fitted by Birch and Murnaghan's equation of state."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from ase import Atoms
from ase.eos import EquationOfState as ASEEquationOfState
from ase.eos import birchmurnaghan
from numpy.typing import NDArray

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.properties.relaxation import relaxed
from atomeq.properties.single_points import Report, computed, refuse_no_crystal, untold
from atomeq.units import GPA

MIN_VOLUMES = 5  # four parameters and something left over to judge the fit by


@dataclass(frozen=True)
class EquationOfState:
    """Birch and Murnaghan's third-order equation of state.

    Attributes:
        volume: At zero pressure, Å³.
        energy: At zero pressure, eV.
        bulk_modulus: GPa.
        derivative: Of the bulk modulus by pressure.
        residual: Root mean square of what the fit leaves, eV.
    """

    volume: float
    energy: float
    bulk_modulus: float
    derivative: float
    residual: float

    def energies(self, volumes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the energy at volumes (Å³), eV."""
        modulus = self.bulk_modulus * GPA
        return birchmurnaghan(volumes, self.energy, modulus, self.derivative, self.volume)


def equation_of_state(
    atoms: Atoms,
    calculator: AtomeqCalculator,
    *,
    span: float = 0.06,
    count: int = 11,
    relax: bool = True,
    fmax: float = 1e-3,
    max_steps: int = 500,
    report: Report = untold,
) -> tuple[EquationOfState, list[Atoms]]:
    """Fit an equation of state to a crystal's energy at several volumes.

    Args:
        atoms: A crystal.
        calculator: Gives energies; float64 is what differences of them ask for.
        span: Largest change of the volume, relative.
        count: Number of volumes.
        relax: Relax atoms and cell first, and the atoms at each volume.
        fmax: Of relaxations, eV/Å.
        max_steps: Of relaxations.
        report: Told of progress.

    Returns:
        The fit, and the structures it was fitted to with energy (eV), forces and stress.

    Raises:
        ValueError: No crystal, volumes that cannot be used, or no minimum of the energy within.

    Example:
        >>> fit, _ = equation_of_state(copper, AtomeqCalculator("cu-pbe"))  # doctest: +SKIP
        >>> fit.bulk_modulus  # doctest: +SKIP
    """
    refuse_no_crystal(atoms, calculator, "an equation of state")
    structures = scaled_volumes(atoms, span, count)
    if relax:
        settle = partial(relaxed, fmax=fmax, max_steps=max_steps, report=report)
        (start,) = settle([atoms], calculator, cell=True, what="crystal")
        structures = scaled_volumes(start, span, count)
        structures = settle(structures, calculator, cell=False, what="volume")
    properties = ("energy", "forces", "stress")
    found = computed(structures, calculator, properties, stage="volumes", report=report)
    volumes = [float(structure.get_volume()) for structure in found]
    return fit_equation_of_state(volumes, [one.get_potential_energy() for one in found]), found


def scaled_volumes(atoms: Atoms, span: float, count: int) -> list[Atoms]:
    """Return a structure at several volumes, atoms in their place in the cell.

    Args:
        atoms: A structure with a volume.
        span: Largest change of the volume, relative: 0.06 goes from 94 % to 106 %.
        count: Number of volumes.

    Raises:
        ValueError: The span is not between 0 and 0.5, or there are too few volumes.
    """
    if not 0 < span < 0.5 or count < MIN_VOLUMES:
        raise ValueError(
            f"an equation of state needs at least {MIN_VOLUMES} volumes within a span between 0 "
            f"and 0.5 of the volume; got {count} within {span:g}"
        )
    scaled = []
    for factor in np.linspace(1 - span, 1 + span, count):
        structure = atoms.copy()
        structure.set_cell(atoms.cell.array * factor ** (1 / 3), scale_atoms=True)
        scaled.append(structure)
    return scaled


def fit_equation_of_state(volumes: Sequence[float], energies: Sequence[float]) -> EquationOfState:
    """Fit the equation of state.

    Args:
        volumes: Å³.
        energies: eV.

    Returns:
        The fit.

    Raises:
        ValueError: The energy has no minimum within these volumes.
    """
    lowest = int(np.argmin(energies))
    order = np.argsort(volumes)
    if lowest in (order[0], order[-1]):
        raise ValueError(
            f"the energy has no minimum between {min(volumes):.4g} and {max(volumes):.4g} Å³, "
            f"it is lowest at {volumes[lowest]:.4g}; relax the cell first or widen the span"
        )
    fit = ASEEquationOfState(volumes, energies, eos="birchmurnaghan")
    volume, energy, modulus = fit.fit(warn=False)
    derivative = float(fit.eos_parameters[2])
    fitted = birchmurnaghan(np.asarray(volumes), energy, modulus, derivative, volume)
    residual = np.sqrt(np.mean((fitted - np.asarray(energies)) ** 2))
    return EquationOfState(
        float(volume), float(energy), float(modulus) / GPA, derivative, float(residual)
    )
