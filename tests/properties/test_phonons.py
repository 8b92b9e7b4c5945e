"""Phonons: of the exact Hessian, of a crystal of pairs, and what is derived from them."""

import analytic_potentials
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.properties.phonons import (
    band_frequencies,
    band_path,
    density_of_states,
    displaced_supercells,
    fitting_supercell,
    frequencies_at_ends,
    mesh_frequencies,
    phonons,
    set_forces,
    thermal_properties,
)
from atomeq.properties.relaxation import relaxed

FINITE = 2e-4  # eV/Å²: differences over 1e-3 Å; their error falls with its square from 6e-3 at 0.01
THZ = 15.6333  # of a force constant of 1 eV/Å² on a mass of 1 u
# So narrow a well that at rest the second neighbours of fcc are beyond the cutoff.
NEIGHBOURS = analytic_potentials.Pairs(3.4, width=6.0)


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


def test_a_crystal_of_pairs_has_the_frequencies_of_its_springs():
    """Springs k between nearest neighbours of fcc, at rest: at X 8 k/m along and 4 k/m across."""
    calculator = AtomeqCalculator(analytic_potentials.of(NEIGHBOURS))
    (atoms,) = relaxed([bulk("Cu", a=3.5)], calculator, cell=True, fmax=1e-7, max_steps=500)
    length, step = atoms.cell.lengths()[0], 1e-3
    pairs = [Atoms("Cu2", [[0, 0, 0], [0, 0, length + k * step]]) for k in (-1, 0, 1)]
    below, at, above = (found["energy"] for found in calculator.evaluate(pairs))
    spring = (below - 2 * at + above) / step**2
    kept = []
    found = phonons(
        atoms, calculator, supercell=(2, 2, 2), displacement=step, path="GX", mesh=20, results=kept
    )
    expected = THZ * np.sqrt(spring / atoms.get_masses()[0] * np.array([4, 4, 8]))
    np.testing.assert_allclose(np.sort(found.bands[0][-1]), expected, rtol=1e-4)
    assert found.highest == pytest.approx(expected[-1], rel=1e-4)
    assert found.lowest == pytest.approx(0, abs=1e-3)
    assert found.imaginary_fraction == 0
    assert len(kept) == len(found.supercells)

    def refused(*arguments):
        raise AssertionError("computed again")

    calculator.evaluate = refused
    again = phonons(
        atoms, calculator, supercell=(2, 2, 2), displacement=step, path="GX", mesh=20, results=kept
    )
    np.testing.assert_array_equal(again.bands, found.bands)
