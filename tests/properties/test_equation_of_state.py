"""Equations of state: of their own function, and of a crystal of pairs."""

import analytic_potentials
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.eos import birchmurnaghan

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.properties.equation_of_state import (
    equation_of_state,
    fit_equation_of_state,
    scaled_volumes,
)
from atomeq.units import GPA

FITTED = 1e-6  # relative: a fit to exact values of its own function
SPAN = 0.01  # of volumes so near that a cubic describes the energy
CUBIC = 3e-3  # relative error of the bulk modulus by a function of four parameters over SPAN
# So narrow a well that at rest the second neighbours of fcc are beyond the cutoff.
NEIGHBOURS = analytic_potentials.Pairs(3.4, width=6.0)


def test_equation_of_state_recovers_its_parameters():
    volumes = [10.5, 11.0, 11.5, 12.0, 12.5, 13.0]
    energies = [birchmurnaghan(v, -4.1, 140 * GPA, 5.2, 11.8) for v in volumes]
    fit = fit_equation_of_state(volumes, energies)
    found = (fit.volume, fit.energy, fit.bulk_modulus, fit.derivative)
    np.testing.assert_allclose(found, (11.8, -4.1, 140, 5.2), rtol=FITTED)
    assert fit.residual < 1e-9
    np.testing.assert_allclose(fit.energies(np.array(volumes)), energies, rtol=FITTED)


def test_equation_of_state_needs_a_minimum():
    with pytest.raises(ValueError, match="no minimum between 10 and 12"):
        fit_equation_of_state([10, 10.5, 11, 11.5, 12], [5.0, 4.0, 3.0, 2.0, 1.0])
    with pytest.raises(ValueError, match="at least 5 volumes"):
        scaled_volumes(bulk("Cu"), 0.06, 4)


def test_volumes_are_those_asked_for():
    atoms = bulk("Cu", cubic=True)
    volumes = [one.get_volume() / atoms.get_volume() for one in scaled_volumes(atoms, 0.1, 5)]
    np.testing.assert_allclose(volumes, [0.9, 0.95, 1.0, 1.05, 1.1])


def energy_of_fcc(volume):
    """Energy per atom: six pairs of nearest neighbours."""
    r = (4 * volume) ** (1 / 3) / np.sqrt(2)
    decay = np.exp(-6 * (r - 2.5))
    return 6 * 0.4 * (decay**2 - 2 * decay) * (1 - (r / 3.4) ** 2) ** 3


def test_a_crystal_of_pairs_has_the_volume_and_modulus_of_its_formula():
    calculator = AtomeqCalculator(analytic_potentials.of(NEIGHBOURS))
    told = []
    fit, structures = equation_of_state(
        bulk("Cu", a=3.5),
        calculator,
        span=SPAN,
        count=7,
        fmax=1e-6,
        report=lambda stage, done, total: told.append((stage, done, total)),
    )
    grid = np.linspace(9, 13, 400_001)
    lowest = grid[np.argmin(energy_of_fcc(grid))]
    assert fit.volume == pytest.approx(lowest, rel=1e-4)
    assert fit.energy == pytest.approx(energy_of_fcc(lowest), rel=1e-6)
    step = 1e-3
    curvature = sum(c * energy_of_fcc(lowest + k * step) for k, c in ((-1, 1), (0, -2), (1, 1)))
    modulus = lowest * curvature / step**2 / GPA
    assert fit.bulk_modulus == pytest.approx(modulus, rel=CUBIC)
    assert len(structures) == 7
    for structure in structures:
        energy = energy_of_fcc(structure.get_volume())
        assert structure.get_potential_energy() == pytest.approx(energy, abs=1e-9)
    assert {stage for stage, *_ in told} == {"relaxing crystal", "relaxing volume", "volumes"}
    assert told[-1] == ("volumes", 7, 7)


def test_a_molecule_and_fixed_atoms_have_no_equation_of_state():
    calculator = AtomeqCalculator(analytic_potentials.of(NEIGHBOURS))
    with pytest.raises(ValueError, match="needs a crystal: Cu2 is not periodic"):
        equation_of_state(Atoms("Cu2", [[0, 0, 0], [0, 0, 2.4]]), calculator)
    with pytest.raises(ValueError, match="crystal 0 does not relax"):
        equation_of_state(analytic_potentials.crystal(), calculator, max_steps=1)
