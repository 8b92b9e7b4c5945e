"""The verbs eos, elastic, phonons and neb."""

import json

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

PNG = b"\x89PNG"


def summary(name):
    with open(f"{name}.summary.json", encoding="utf-8") as stream:
        return json.load(stream)


@pytest.fixture
def copper(workdir):
    ase.io.write(workdir / "crystal.extxyz", bulk("Cu", a=3.60))
    return workdir


def test_bulk_modulus_is_the_same_by_energies_and_by_stresses(run, copper):
    assert run("eos crystal.extxyz --potential cu-pbe --out eos.extxyz --span 0.03") == 0
    eos = summary("eos")
    assert eos["n_atoms"] == 1
    assert len(ase.io.read("eos.extxyz", index=":")) == 11
    assert run("elastic crystal.extxyz --potential cu-pbe --out elastic.traj") == 0
    elastic = summary("elastic")
    constants = np.array(elastic["stiffness_GPa"])
    assert constants[0, 0] == pytest.approx(constants[1, 1])
    assert constants[0, 0] == pytest.approx(constants[2, 2])
    assert constants[0, 3] == pytest.approx(0, abs=1e-6)
    assert elastic["born_stable"]
    assert elastic["bulk_modulus_hill_GPa"] == pytest.approx(eos["bulk_modulus_GPa"], rel=0.03)
    assert eos["dtype"] == elastic["dtype"] == "float64"
    for name in ("eos.png", "elastic.png"):
        assert (copper / name).read_bytes().startswith(PNG)


def test_phonons_of_copper(run, copper, capsys):
    words = "phonons crystal.extxyz --potential cu-pbe --out ph.extxyz --supercell 2 2 2 --mesh 20"
    assert run(words) == 0
    found = summary("ph")
    assert found["n_displacements"] == len(ase.io.read("ph.extxyz", index=":"))
    assert not found["imaginary_modes"]
    np.testing.assert_allclose(found["frequencies_THz"]["G"], 0, atol=1e-3)
    transverse, other, longitudinal = found["frequencies_THz"]["X"]
    assert transverse == pytest.approx(other, abs=1e-3)
    assert 3 < transverse < longitudinal < 10
    assert 20 < found["thermal"]["heat_capacity_J_per_K_mol"] < 25
    assert (copper / "ph.png").read_bytes().startswith(PNG)
    assert "force_constants" in (copper / "ph.phonopy.yaml").read_text()
    assert "point" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eos free.extxyz --potential small --out o.extxyz", "equation of state needs a crystal"),
        ("elastic free.extxyz --potential small --out o.extxyz", "elastic tensor needs a crystal"),
        ("phonons free.extxyz --potential small --out o.extxyz", "phonons needs a crystal"),
        ("eos crystal.extxyz --potential small --out o.extxyz --span 0.7", "between 0 and 0.5"),
        ("elastic crystal.extxyz --potential small --out o.extxyz --strain 3", "between 0 and 0.1"),
        (
            "phonons crystal.extxyz --potential small --out o.extxyz --relax false --path GZ",
            "at least two of",
        ),
        ("neb crystal.extxyz --potential small --out o.extxyz", "its two ends"),
        ("neb same.extxyz --potential small --out o.extxyz", "are the same"),
        ("neb mixed.extxyz --potential small --out o.extxyz", "same atoms in the same order"),
    ],
)
def test_errors_at_the_door_say_what_to_do(run, copper, capsys, words, message):
    crystal = bulk("Cu")
    ase.io.write("free.extxyz", Atoms("Cu2", [[0, 0, 0], [0, 0, 2.4]]))
    ase.io.write("same.extxyz", [crystal, crystal])
    ase.io.write("mixed.extxyz", [crystal, bulk("Al")])
    assert run(words) == 2
    assert message in capsys.readouterr().err
    assert not (copper / "o.extxyz").exists()


def test_a_crystal_that_does_not_relax_is_named(run, copper, capsys):
    words = "eos cu.extxyz --potential small --out o.extxyz --max-steps 1"
    assert run(words) == 2
    assert "crystal 0 does not relax" in capsys.readouterr().err


def test_neb_goes_on_where_it_stopped(run, workdir, capsys):
    start = ase.io.read("cu.extxyz", index=0)[1:]
    end = start.copy()
    end.positions[0] += (0.4, -0.3, -0.5)
    ase.io.write("ends.extxyz", [start, end])
    words = "neb ends.extxyz --potential small --out path.extxyz --images 3 --max-steps 2"
    assert run(words) == 1
    first = summary("path")
    assert first["n_images"] == 5
    assert first["steps"] == 2
    assert first["batched_evaluations"] == 3
    assert "go on with --restart" in capsys.readouterr().out
    images = ase.io.read("path.extxyz", index=":")
    energies = [image.get_potential_energy() for image in images]
    assert first["barrier_eV"] == pytest.approx(max(energies) - energies[0], abs=1e-5)
    np.testing.assert_allclose(images[0].positions, start.positions, atol=1e-6)
    assert (workdir / "path.png").read_bytes().startswith(PNG)
    assert run(words + " --restart --fmax 100") == 0
    again = summary("path")
    assert again["steps"] == 0
    assert again["barrier_eV"] == pytest.approx(first["barrier_eV"], abs=1e-6)
