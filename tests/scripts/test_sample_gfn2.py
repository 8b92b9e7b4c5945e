"""Frames of molecular dynamics as training data, with another method in tblite's place."""

import sys
from types import ModuleType

import ase.io
import numpy as np
import pytest
import sample_gfn2
from ase.build import molecule
from ase.calculators.emt import EMT


@pytest.fixture
def emt(monkeypatch: pytest.MonkeyPatch) -> None:
    """EMT under the name of tblite's calculator."""
    package, module = ModuleType("tblite"), ModuleType("tblite.ase")
    module.TBLite = lambda **_: EMT()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tblite", package)
    monkeypatch.setitem(sys.modules, "tblite.ase", module)


@pytest.mark.usefixtures("emt")
def test_frames_carry_their_own_labels_and_follow_from_the_seed(tmp_path, monkeypatch):
    known = [molecule("H2O"), molecule("H2O")]
    known[1].rattle(0.02, seed=0)
    ase.io.write(tmp_path / "known.extxyz", known)
    words = ["--temperatures", "300", "900", "--starts", "2", "--frames", "3", "--every", "4"]
    for name in ("one", "two"):
        given = ["sample_gfn2", *(str(tmp_path / f"{n}.extxyz") for n in ("known", name)), *words]
        monkeypatch.setattr(sys, "argv", given)
        sample_gfn2.main()
    frames, again = (ase.io.read(tmp_path / f"{name}.extxyz", ":") for name in ("one", "two"))
    assert [atoms.info["temperature"] for atoms in frames] == [300.0] * 6 + [900.0] * 6
    places = np.array([atoms.positions for atoms in frames])
    assert np.unique(places.round(6), axis=0).shape == places.shape
    assert np.array_equal(places, [atoms.positions for atoms in again])
    for atoms in frames:
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        atoms.calc = EMT()
        assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
        assert np.allclose(forces, atoms.get_forces(), atol=1e-6)
