"""Thermal conductivity: of exact third derivatives, of the symmetry and with the law of a crystal.

What phono3py computes is skipped where it is not installed.
"""

import importlib.util
import json
import sys

import ase.io
import numpy as np
import pytest
from analytic_potentials import Pairs, of
from ase import Atoms
from ase.build import bulk

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli import main
from atomeq.properties.phonons import structure_from_phonopy
from atomeq.properties.relaxation import relaxed
from atomeq.properties.thermal_conductivity import thermal_conductivity

THIRD = 0.02  # of the largest third derivative: differences over 0.01 Å against 1e-3 Å
CLASSICAL = 0.02  # far above the highest frequency kappa falls as 1/T
ROUGH = 9.0  # Å, a mesh of 5³ wave vectors

with_phono3py = pytest.mark.skipif(
    importlib.util.find_spec("phono3py") is None, reason="phono3py is not installed (atomeq[kappa])"
)


@pytest.fixture(scope="module")
def calculator() -> AtomeqCalculator:
    return AtomeqCalculator(of(Pairs()))


@pytest.fixture(scope="module")
def copper(calculator) -> Atoms:
    (atoms,) = relaxed([bulk("Cu", a=3.2)], calculator, cell=True, fmax=1e-6, max_steps=500)
    return atoms


@with_phono3py
def test_third_derivatives_are_those_of_the_exact_hessian(copper, calculator):
    found = thermal_conductivity(
        copper, calculator, supercell=(3, 3, 3), displacement=0.01, mesh=ROUGH
    )
    cell = structure_from_phonopy(found.phonon3.supercell)
    sides = []
    for step in (1e-3, -1e-3):
        moved = cell.copy()
        moved.positions[0, 0] += step
        sides.append(calculator.get_hessian(moved).reshape(27, 3, 27, 3).transpose(0, 2, 1, 3))
    exact = (sides[0] - sides[1]) / 2e-3  # derivative along x of atom 0
    size = np.abs(exact).max()
    assert size > 1
    np.testing.assert_allclose(found.phonon3.fc3[0, :, :, 0], exact, atol=THIRD * size)


@with_phono3py
def test_it_has_the_symmetry_of_the_crystal_and_falls_as_one_over_temperature(copper, calculator):
    temperatures = [300.0, 2000.0, 4000.0]
    settings = {"supercell": (3, 3, 3), "mesh": ROUGH, "temperatures": temperatures}
    pure = thermal_conductivity(copper, calculator, isotopes=False, **settings)
    assert pure.kappa.shape == (3, 3, 3)
    assert pure.mesh == (5, 5, 5)
    expected = pure.average[:, None, None] * np.eye(3)
    np.testing.assert_allclose(pure.kappa, expected, atol=1e-6 * pure.average[0])
    assert pure.average[0] > pure.average[1] > 0
    products = pure.average * temperatures
    assert products[1] == pytest.approx(products[2], rel=CLASSICAL)
    natural = thermal_conductivity(copper, calculator, **settings)
    assert (natural.average < pure.average).all()  # isotopes scatter too


@with_phono3py
def test_the_tensor_turns_with_a_crystal_of_lower_symmetry(calculator):
    start = bulk("Cu", "hcp", a=2.3, c=3.75)
    (atoms,) = relaxed([start], calculator, cell=True, fmax=1e-6, max_steps=500)
    atoms.rotate(40, "x", rotate_cell=True)
    kappa = thermal_conductivity(atoms, calculator, supercell=(3, 3, 1), mesh=ROUGH).kappa[0]
    c, s = np.cos(np.radians(40)), np.sin(np.radians(40))
    rotation = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    upright = rotation.T @ kappa @ rotation  # hexagonal: two equal axes and a third
    expected = np.diag([upright[0, 0], upright[0, 0], upright[2, 2]])
    np.testing.assert_allclose(upright, expected, atol=1e-6 * upright[0, 0])
    assert abs(upright[2, 2] / upright[0, 0] - 1) > 0.1


@with_phono3py
def test_a_crystal_that_is_no_minimum_is_refused(copper, calculator):
    stretched = copper.copy()
    stretched.set_cell(1.25 * copper.cell.array, scale_atoms=True)
    with pytest.raises(ValueError, match="modes are imaginary"):
        thermal_conductivity(stretched, calculator, supercell=(2, 2, 2), mesh=ROUGH)


@with_phono3py
@pytest.mark.parametrize("change", [{"supercell": (0, 1, 1)}, {"temperatures": [0.0]}])
def test_what_is_not_positive_is_refused(copper, calculator, change):
    with pytest.raises(ValueError, match="must be positive"):
        thermal_conductivity(copper, calculator, **{"supercell": (1, 1, 1), **change})


@with_phono3py
def test_the_verb_writes_what_phono3py_reads(tmp_path, monkeypatch, capsys):
    import phono3py

    monkeypatch.chdir(tmp_path)
    ase.io.write("cu.extxyz", bulk("Cu", a=3.60))
    line = "kappa cu.extxyz --potential cu-pbe --out k.extxyz --supercell 3 3 3 --mesh 16"
    main([*line.split(), "--temperatures", "300", "600"])
    found = json.loads((tmp_path / "k.summary.json").read_text())
    assert found["n_displacements"] == len(ase.io.read("k.extxyz", index=":"))
    low, high = found["conductivity"]["average_W_per_m_K"]
    assert low > high > 0
    assert "W/(m K)" in capsys.readouterr().out
    again = phono3py.load("k.phono3py.yaml", fc_calculator="traditional", log_level=0)
    again.mesh_numbers = 16.0
    again.init_phph_interaction()
    again.run_thermal_conductivity(temperatures=[300.0], is_isotope=True)
    tensor = found["conductivity"]["tensor_W_per_m_K"][0]
    # The diagonals of fcc's grid are of one length: rounding of the cell chooses the tetrahedra.
    assert again.thermal_conductivity.kappa[0][0][0] == pytest.approx(tensor[0][0], rel=2e-2)
    computed = [one.get_forces() for one in ase.io.read("k.extxyz", index=":")]
    np.testing.assert_allclose(again.forces, computed, atol=1e-7)


@with_phono3py
def test_the_verb_goes_on_without_computing_again(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    def computing(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.chdir(tmp_path)
    ase.io.write("cu.extxyz", bulk("Cu", a=3.60))
    line = "kappa cu.extxyz --potential cu-pbe --out k.extxyz --supercell 2 2 2"
    with monkeypatch.context() as patch:
        patch.setattr("atomeq.properties.thermal_conductivity._solve", interrupted)
        with pytest.raises(SystemExit, match="130"):
            main(line.split())
    assert (tmp_path / "k.forces.jsonl").exists()
    monkeypatch.setattr(AtomeqCalculator, "evaluate", computing)
    main([*line.split(), "--restart", "--mesh", "9"])
    assert (tmp_path / "k.summary.json").exists()
    assert not (tmp_path / "k.forces.jsonl").exists()


def test_without_phono3py_the_extra_is_named(calculator, monkeypatch):
    monkeypatch.setitem(sys.modules, "phono3py", None)
    with pytest.raises(ImportError, match=r"pip install 'atomeq\[kappa\]'"):
        thermal_conductivity(bulk("Cu"), calculator)
