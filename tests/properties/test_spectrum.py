"""Infrared spectra: modes by numerical derivatives, dynamics by what is known of cosines."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.models.egnn import EGNN
from atomeq.models.electric import Electric
from atomeq.potential.checkpoint import scatter_weights
from atomeq.potential.potential import Potential
from atomeq.properties.spectrum import INTENSITY, infrared_modes, infrared_spectrum
from atomeq.units import ACCELERATION, BOLTZMANN


@pytest.fixture
def calculator() -> AtomeqCalculator:
    torch.manual_seed(0)
    model = Electric(
        EGNN(4.0, num_layers=1, hidden_channels=8, num_radial=4), properties=["dipole"]
    )
    potential = Potential(model).double()
    scatter_weights(potential)
    return AtomeqCalculator(potential)


@pytest.mark.parametrize(("name", "n_modes"), [("H2O", 3), ("CO2", 4), ("N2", 1)])
def test_there_are_3n_6_modes_or_3n_5(calculator, name: str, n_modes: int) -> None:
    assert len(infrared_modes(molecule(name), calculator).wavenumbers) == n_modes


def test_intensities_are_those_of_numerical_derivatives_along_the_modes(calculator) -> None:
    atoms = molecule("CH3OH")
    modes, h = infrared_modes(atoms, calculator), 1e-4
    roots = np.sqrt(atoms.get_masses())[:, None]
    for mode, strength in zip(modes.displacements, modes.intensities, strict=True):
        found = []
        for sign in (1, -1):
            near = atoms.copy()
            near.positions += sign * h * mode / roots
            found.append(calculator.get_property("dipole", near))
        slope = (found[0] - found[1]) / (2 * h)
        assert strength == pytest.approx(INTENSITY * slope @ slope, rel=1e-5, abs=1e-8)


def test_the_stretch_of_a_diatomic_is_that_of_its_reduced_mass(calculator) -> None:
    diatomic = Atoms("OH", [[0, 0, 0], [0, 0, 0.97]])
    diatomic.positions[1, 2] = 1.1
    (stretch,) = infrared_modes(diatomic, calculator).wavenumbers
    h, forces = 1e-4, []
    for sign in (1, -1):
        near = diatomic.copy()
        near.positions[1, 2] += sign * h
        forces.append(calculator.get_property("forces", near)[1, 2])
    curvature = -(forces[0] - forces[1]) / (2 * h)
    m1, m2 = diatomic.get_masses()
    squared = curvature * ACCELERATION * (1 / m1 + 1 / m2)  # 1/fs²
    expected = np.sign(squared) * np.sqrt(abs(squared)) / (2 * np.pi * 2.99792458e-5)
    assert stretch == pytest.approx(expected, rel=1e-5)


def test_a_periodic_structure_is_refused(calculator) -> None:
    atoms = molecule("H2O", vacuum=5, pbc=True)
    with pytest.raises(ValueError, match="H2O is periodic"):
        infrared_modes(atoms, calculator)


def test_the_spectrum_of_a_cosine_is_one_line_of_known_strength() -> None:
    nu, amplitude, interval, temperature = 1500.0, 0.05, 1.0, 300.0
    omega = 2 * np.pi * 2.99792458e-5 * nu  # 1/fs
    times = interval * np.arange(20000)
    dipoles = amplitude * np.cos(omega * times)[:, None] * [0.6, 0.0, 0.8] + [1.0, 2.0, 3.0]
    found = infrared_spectrum(dipoles, interval=interval, temperature=temperature)
    peak = found.wavenumbers[np.argmax(found.absorption)]
    assert peak == pytest.approx(nu, abs=2)
    step = found.wavenumbers[1] - found.wavenumbers[0]
    kt = BOLTZMANN * temperature * ACCELERATION
    expected = INTENSITY * (amplitude * omega) ** 2 / 2 / kt
    assert step * found.absorption.sum() == pytest.approx(expected, rel=0.01)
    half = found.wavenumbers[found.absorption > found.absorption.max() / 2]
    assert np.ptp(half) == pytest.approx(10.0, abs=1.5)  # the width


def test_too_few_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="16 dipoles or more"):
        infrared_spectrum([np.zeros(3)] * 5, interval=1.0, temperature=300.0)
