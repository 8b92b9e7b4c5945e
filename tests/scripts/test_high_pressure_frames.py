"""The division of frames for a fine-tuning at high pressure, on made ones."""

import sys

import ase.io
import high_pressure_frames
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator

TURN = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])


def labelled(atoms: Atoms, energy: float) -> Atoms:
    stress = np.zeros(6)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=atoms.positions, stress=stress)
    return atoms


def frames(n: int, seed: int, size: int = 1) -> list[Atoms]:
    random = np.random.default_rng(seed)
    made = []
    for k in range(n):
        atoms = bulk("NaCl", "rocksalt", a=5.0 + 0.01 * k, cubic=True).repeat((1, 1, size))
        atoms.positions += random.normal(0, 0.1, atoms.positions.shape)
        made.append(labelled(atoms, 1000.0 * seed + k))
    return made


def turned(atoms: Atoms) -> Atoms:
    same = Atoms(atoms.numbers, atoms.positions @ TURN, cell=atoms.cell.array @ TURN, pbc=True)
    return labelled(same, atoms.get_potential_energy())


def test_copies_stay_together_and_nothing_is_in_two_parts(tmp_path, monkeypatch, capsys):
    own = frames(120, 1)
    sets = {
        "mpf-TP": own,
        "mpf-alkali-TP": [turned(atoms) for atoms in own[:60]],
        "random-TP": frames(20, 2),
        "mptrj-random-1k": frames(20, 3, size=6) + frames(20, 4, size=7),  # 48 and 56 atoms
        "mptrj-highest-stress-1k": frames(20, 5, size=4) + frames(20, 6, size=5),  # 32 and 40
        "alexandria-random-1k": frames(7, 7),
    }
    for name, some in sets.items():
        ase.io.write(tmp_path / f"{name}.extxyz.gz", some, format="extxyz")
    monkeypatch.setattr(sys, "argv", ["frames", str(tmp_path), str(tmp_path / "out")])
    high_pressure_frames.main()
    energies = {
        path.stem: [atoms.get_potential_energy() for atoms in ase.io.read(path, ":")]
        for path in (tmp_path / "out").iterdir()
    }
    every = {key: set(values) for key, values in energies.items()}
    parts = [values for key, values in every.items() if key != "test_highest_stress"]
    assert len(set.union(*parts)) == sum(map(len, parts))
    new = [e for key in ("train", "val", "test") for e in energies[key] if e < 3000]
    assert len(new) == 200
    assert every["train"] & set(range(5000, 7000)) == {5000.0 + k for k in range(20) if k % 10}
    assert every["replay"] & set(range(3000, 5000)) == {3000.0 + k for k in range(20) if k % 10}
    assert len(energies["test_mptrj"]) == len(energies["test_highest_stress"]) == 4
    assert every["test_mptrj_large"] == {4000.0 + k for k in range(20) if k % 10}
    assert every["replay"] >= {7000.0 + k for k in range(7)}
    with pytest.raises(SystemExit):
        high_pressure_frames.main()
    assert "exists: name a new folder" in capsys.readouterr().err
