"""Elastic constants and the Pulay stress are read off labels that have known ones."""

import elastic_labels
import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import GPa

A = 3.59  # Å
PULAY = 2.5  # GPa


def strained(strain: np.ndarray, repeat: int, energy: float = 0.0):
    """Return a labelled cell whose stress has a pressure that its energy knows nothing of."""
    atoms = bulk("Cu", cubic=True, a=A).repeat(repeat)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    atoms.calc = EMT()
    stress = atoms.get_stress() + PULAY * GPa * np.array([1, 1, 1, 0, 0, 0])
    energy += atoms.get_potential_energy()
    atoms.calc = SinglePointCalculator(atoms, energy=energy, stress=stress)
    return atoms


def test_constants_and_offset_of_labels_are_found():
    modes = [
        np.diag([1.0, 0, 0]),
        np.diag([0, 1.0, 1.0]),
        np.array([[0, 0.5, 0], [0.5, 0, 0], [0, 0, 0]]),
    ]
    frames = [strained(e * mode, 2) for e in (-0.02, -0.01, 0.01, 0.02) for mode in modes]
    frames.append(strained(np.zeros((3, 3)), 2))
    frames.append(strained(0.02 * np.eye(3), 1, energy=0.1))  # of another mesh of k-points
    found, rms, n_used = elastic_labels.fit(frames, A, most=0.05)
    assert n_used == len(frames)
    assert rms < 0.1
    assert found["offset"] == pytest.approx(PULAY, abs=0.05)
    # Finite differences of the same stresses.
    (less, more) = (strained(e * modes[0], 1).get_stress() / GPa for e in (-1e-4, 1e-4))
    c11, c12 = ((more - less) / 2e-4)[:2]
    # A pressure of labels turns second Piola-Kirchhoff constants into Cauchy's by its own size.
    assert found["C11"] == pytest.approx(c11, abs=2 * PULAY)
    assert found["C12"] == pytest.approx(c12, abs=2 * PULAY)
