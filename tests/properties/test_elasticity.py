"""Elastic constants: of a linear solid, and of a crystal of pairs."""

import analytic_potentials
import numpy as np
import pytest
from ase.build import bulk
from ase.stress import voigt_6_to_full_3x3_stress

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.properties.elasticity import elastic_tensor, fit_elasticity, strained_structures
from atomeq.properties.equation_of_state import equation_of_state
from atomeq.units import GPA

SMALL = 1e-3  # strain at which the error of third order is below CAUCHY
CAUCHY = 1e-3  # relative
BY_ENERGIES = 5e-3  # relative, of a bulk modulus by Birch and Murnaghan's function


def cubic_stiffness(c11: float, c12: float, c44: float) -> np.ndarray:
    stiffness = np.diag([float(c11)] * 3 + [float(c44)] * 3)
    stiffness[:3, :3] += c12 * (1 - np.eye(3))
    return stiffness


def stresses_of(stiffness: np.ndarray, strains) -> list[np.ndarray]:
    voigt = [stiffness @ np.asarray(strain.voigt) * GPA for strain in strains]
    return [voigt_6_to_full_3x3_stress(stress) for stress in voigt]


# So narrow a well that at rest the second neighbours of fcc are beyond the cutoff.
NEIGHBOURS = analytic_potentials.Pairs(3.4, width=6.0)


def test_elastic_constants_of_a_linear_solid_are_recovered():
    copper = cubic_stiffness(168, 121, 75)
    atoms = bulk("Cu")
    structures, strains = strained_structures(atoms, 0.01)
    assert len(structures) == len(strains) == 24
    fit = fit_elasticity(atoms, strains, stresses_of(copper, strains))
    np.testing.assert_allclose(fit.stiffness, copper, atol=1e-6)
    assert fit.stable
    assert fit.asymmetry < 1e-6
    np.testing.assert_allclose(fit.bulk, (168 + 2 * 121) / 3)
    voigt, reuss, hill = fit.shear
    c44, shear = 75, (168 - 121) / 2
    assert voigt == pytest.approx((2 * shear + 3 * c44) / 5)
    assert reuss == pytest.approx(5 * shear * c44 / (2 * c44 + 3 * shear))
    assert hill == pytest.approx((voigt + reuss) / 2)
    young = 9 * fit.bulk[2] * hill / (3 * fit.bulk[2] + hill)
    assert fit.young == pytest.approx(young)


def test_symmetry_of_the_crystal_is_given_to_the_constants():
    atoms = bulk("Cu")
    _, strains = strained_structures(atoms, 0.01)
    noisy = cubic_stiffness(168, 121, 75)
    noisy[0, 0] += 3.0
    fit = fit_elasticity(atoms, strains, stresses_of(noisy, strains))
    np.testing.assert_allclose(fit.stiffness, cubic_stiffness(169, 121, 75), atol=1e-6)
    assert fit.asymmetry == pytest.approx(2.0, abs=1e-6)


def test_a_soft_shear_is_unstable():
    atoms = bulk("Cu")
    _, strains = strained_structures(atoms, 0.01)
    fit = fit_elasticity(atoms, strains, stresses_of(cubic_stiffness(100, 110, 60), strains))
    assert not fit.stable


def test_strains_are_the_ones_applied():
    atoms = bulk("Cu", cubic=True)
    for structure, strain in zip(*strained_structures(atoms, 0.01), strict=True):
        gradient = np.linalg.solve(atoms.cell.array, structure.cell.array).T
        green = (gradient.T @ gradient - np.eye(3)) / 2
        np.testing.assert_allclose(green, np.asarray(strain), atol=1e-12)


def test_constants_of_central_forces_obey_cauchy_and_give_the_modulus_of_the_energies():
    """Pairs at rest: C_12 = C_44; and of nearest neighbours alone in fcc both are half of C_11."""
    calculator = AtomeqCalculator(analytic_potentials.of(NEIGHBOURS))
    fit, structures = elastic_tensor(bulk("Cu", a=3.5), calculator, strain=SMALL, fmax=1e-6)
    c11, c12, c44 = fit.stiffness[0, 0], fit.stiffness[0, 1], fit.stiffness[3, 3]
    assert c12 == pytest.approx(c44, rel=CAUCHY)
    assert c11 == pytest.approx(2 * c12, rel=CAUCHY)
    assert len(structures) == 24
    eos, _ = equation_of_state(bulk("Cu", a=3.5), calculator, span=0.01, fmax=1e-6)
    assert fit.bulk[2] == pytest.approx(eos.bulk_modulus, rel=BY_ENERGIES)
