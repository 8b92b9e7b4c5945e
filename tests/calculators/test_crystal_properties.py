"""Equations of state, elastic constants, phonons and bands of images."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.eos import birchmurnaghan
from ase.mep.neb import NEB
from ase.stress import voigt_6_to_full_3x3_stress
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.calculators.elastic_band import BatchedNEB, path_lengths
from atomeq.calculators.elasticity import fit_elasticity, strained_structures
from atomeq.calculators.equation_of_state import fit_equation_of_state, scaled_volumes
from atomeq.calculators.phonons import (
    band_frequencies,
    band_path,
    density_of_states,
    displaced_supercells,
    fitting_supercell,
    frequencies_at_ends,
    mesh_frequencies,
    set_forces,
    thermal_properties,
)
from atomeq.units import GPA

FITTED = 1e-6  # relative: a fit to exact values of its own function
FINITE = 2e-4  # eV/Å²: differences over 1e-3 Å; their error falls with its square from 6e-3 at 0.01
EXACT = 1e-10


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


def cubic_stiffness(c11: float, c12: float, c44: float) -> np.ndarray:
    stiffness = np.diag([float(c11)] * 3 + [float(c44)] * 3)
    stiffness[:3, :3] += c12 * (1 - np.eye(3))
    return stiffness


def stresses_of(stiffness: np.ndarray, strains) -> list[np.ndarray]:
    voigt = [stiffness @ np.asarray(strain.voigt) * GPA for strain in strains]
    return [voigt_6_to_full_3x3_stress(stress) for stress in voigt]


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


def phonons_of(atoms: Atoms, calculator: AtomeqCalculator, displacement: float = 0.01):
    phonon, cells = displaced_supercells(atoms, supercell=(2, 2, 2), displacement=displacement)
    set_forces(phonon, [results["forces"] for results in calculator.evaluate(cells)])
    return phonon


def test_phonons_are_those_of_the_exact_hessian():
    atoms = bulk("Cu", a=3.6)
    calculator = AtomeqCalculator(small_potential())
    phonon = phonons_of(atoms, calculator, displacement=1e-3)
    cell = phonon.supercell
    supercell = Atoms(cell.symbols, cell=cell.cell, scaled_positions=cell.scaled_positions, pbc=1)
    hessian = calculator.get_hessian(supercell).reshape(8, 3, 8, 3).transpose(0, 2, 1, 3)
    assert np.abs(hessian).max() > 0.1
    np.testing.assert_allclose(phonon.force_constants, hessian, atol=FINITE)


def test_bands_begin_at_zero_and_repeat_at_equal_points():
    phonon = phonons_of(bulk("Cu", a=3.6), AtomeqCalculator(small_potential()))
    path = band_path(phonon, "GXW,GL")
    assert path.ends == [("G", "X"), ("X", "W"), ("G", "L")]
    assert path.connected == [True, False, False]
    assert path.labels == ["G", "X", "W", "G", "L"]
    bands = band_frequencies(phonon, path)
    assert [leg.shape for leg in bands] == [(41, 3)] * 3
    np.testing.assert_allclose(bands[0][0], 0, atol=1e-4)
    np.testing.assert_allclose(np.sort(bands[0][-1]), np.sort(bands[1][0]), atol=1e-6)
    points = frequencies_at_ends(phonon, path)
    np.testing.assert_allclose(points["X"], np.sort(bands[1][0]), atol=1e-6)
    assert band_path(phonon).ends[0][0] == "G"
    with pytest.raises(ValueError, match="at least two of"):
        band_path(phonon, "GQ")


def test_density_of_states_counts_the_modes_and_heat_capacity_becomes_classical():
    phonon = phonons_of(bulk("Cu", a=3.6), AtomeqCalculator(small_potential()))
    frequencies, weights = mesh_frequencies(phonon, 20.0)
    assert frequencies.shape[1] == 3
    grid, dos = density_of_states(phonon)
    # A potential at random has imaginary modes too; all modes are counted.
    assert np.trapezoid(dos, grid) == pytest.approx(3, rel=0.05)
    hot, cold = thermal_properties(phonon, [3000.0, 30.0])
    # Dulong and Petit count the real modes, and the three at Γ are left out.
    real = float(weights @ (frequencies > 1e-3).sum(axis=1))
    assert hot["heat_capacity_J_per_K_mol"] == pytest.approx(real * 8.314, rel=0.02)
    assert cold["heat_capacity_J_per_K_mol"] < hot["heat_capacity_J_per_K_mol"]
    assert hot["temperature_K"] == 3000


def test_supercells_are_as_large_as_asked():
    assert fitting_supercell(bulk("Cu", cubic=True, a=3.6), 10.0) == (3, 3, 3)
    assert fitting_supercell(bulk("Cu", cubic=True, a=5.0), 10.0) == (2, 2, 2)
    with pytest.raises(ValueError, match="must be positive"):
        displaced_supercells(bulk("Cu"), supercell=(2, 0, 2), displacement=0.01)


def hop() -> list[Atoms]:
    start = bulk("Cu", cubic=True).repeat((2, 1, 1))
    del start[0]
    start.rattle(0.03, seed=0)
    end = start.copy()
    end.positions[0] += (0.3, -0.4, -0.5)
    images = [start, *(start.copy() for _ in range(3)), end]
    NEB(images, method="improvedtangent").interpolate()
    return images


@pytest.mark.parametrize("climb", [False, True])
def test_a_band_in_one_batch_has_the_forces_of_single_images(climb):
    calculator = AtomeqCalculator(small_potential())
    batched = BatchedNEB(hop(), calculator, climb=climb)
    images = hop()
    for image in images:
        image.calc = AtomeqCalculator(small_potential())
    single = NEB(images, k=0.1, climb=climb, method="improvedtangent")
    for step in range(2):
        forces = batched.get_forces()
        np.testing.assert_allclose(forces, single.get_forces(), atol=EXACT)
        for band in (batched, single):
            band.set_positions(band.get_positions() + 0.01 * forces)
        assert batched.n_evaluations == step + 1
    assert np.all(np.diff(path_lengths(batched.images)) > 0)


def test_a_band_needs_images():
    with pytest.raises(ValueError, match="at least three"):
        BatchedNEB(hop()[:2], AtomeqCalculator(small_potential()))
