"""Perfect supercells become primitive cells with their labels; what is not perfect stays."""

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from atomeq.data.datamodule import AtomisticDataModule
from atomeq.data.supercells import without_repetition


def labelled(atoms: Atoms) -> Atoms:
    atoms.calc = EMT()
    results = {
        "energy": atoms.get_potential_energy(),
        "forces": atoms.get_forces(),
        "stress": atoms.get_stress(),
    }
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def strained(atoms: Atoms) -> Atoms:
    strain = np.array([[0.01, 0.02, 0.0], [0.0, -0.01, 0.005], [0.0, 0.0, 0.015]])
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return atoms


@pytest.mark.parametrize("n_basis", [1, 2], ids=["lattice", "displaced pairs"])
def test_the_primitive_cell_has_the_labels_that_it_would_have(n_basis: int):
    if n_basis == 1:
        atoms = bulk("Cu", cubic=True).repeat((2, 1, 2))
    else:  # two atoms in a cell, the second off its place: forces that repeat
        pair = bulk("Cu", cubic=False).repeat((2, 1, 1))
        pair.positions[1] += [0.1, 0.05, -0.02]
        pair.symbols[1] = "Al"
        atoms = pair.repeat((2, 2, 1))
    whole = labelled(strained(atoms))
    small = without_repetition(whole)
    assert len(small) == n_basis
    expected = labelled(small.copy())
    assert small.get_potential_energy() == pytest.approx(expected.get_potential_energy(), abs=1e-6)
    np.testing.assert_allclose(small.get_forces(), expected.get_forces(), atol=1e-6)
    np.testing.assert_allclose(small.get_stress(), expected.get_stress(), atol=1e-6)
    assert len(whole) > n_basis


def test_what_does_not_repeat_stays():
    rattled = bulk("Cu", cubic=True).repeat(2)
    rattled.rattle(0.02, seed=0)
    vacancy = bulk("Cu", cubic=True).repeat(2)
    del vacancy[3]
    forced = bulk("Cu", cubic=True)
    forces = np.zeros((4, 3))
    forces[0, 0] = 0.1  # a perfect lattice whose labels are none
    forced.calc = SinglePointCalculator(forced, energy=0.0, forces=forces)
    for atoms in (rattled, vacancy, forced, molecule("H2O"), bulk("Cu")):
        assert without_repetition(atoms) is atoms


def test_files_are_reduced_where_it_is_asked_for(tmp_path: Path):
    frames = [labelled(bulk("Cu", cubic=True).repeat((1, 1, n))) for n in (1, 2, 3)]
    ase.io.write(tmp_path / "cu.extxyz", frames)
    for choice, sizes in (("reduce", [1, 1, 1]), ("keep", [4, 8, 12])):
        data = AtomisticDataModule(train=str(tmp_path / "cu.extxyz"), supercells=choice)
        found = data._training_part("train")
        assert [len(atoms) for atoms in found] == sizes
        energies = [atoms.get_potential_energy() / len(atoms) for atoms in found]
        assert np.ptp(energies) < 1e-9
