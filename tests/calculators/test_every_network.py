"""What stands on potentials takes networks of irreps like any other."""

import importlib

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from small_potential import small_potential

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.calculators.torchsim import torchsim_model
from atomeq.dynamics.integrators import VelocityVerlet
from atomeq.dynamics.run import relax, simulate
from atomeq.potential.potential import Potential
from atomeq.screening.results import read_rows
from atomeq.screening.run import screen

SAME = 1e-8  # eV, Å: sums in another order, step after step
WANTED = ("energy", "forces", "stress")


@pytest.fixture(scope="module", params=["nequip", "mace"])
def potential(request) -> Potential:
    return small_potential(network=request.param).requires_grad_(False)


def crystals() -> list[Atoms]:
    found = []
    for k, repeat in enumerate([(2, 1, 1), (3, 1, 1), (2, 2, 1)]):
        atoms = bulk("Cu", a=3.6 + 0.05 * k).repeat(repeat)
        atoms.symbols[0] = "Al"
        atoms.rattle(0.08, seed=k)
        found.append(atoms)
    return found


def test_a_batch_gives_what_each_gives_alone(potential):
    calculator = AtomeqCalculator(potential)
    for atoms, found in zip(crystals(), calculator.evaluate(crystals(), WANTED), strict=True):
        (alone,) = calculator.evaluate([atoms], WANTED)
        for key in WANTED:
            np.testing.assert_allclose(found[key], alone[key], atol=SAME)


def test_single_precision_follows_double(potential):
    single = AtomeqCalculator(potential, dtype="float32").evaluate(crystals(), WANTED)
    double = AtomeqCalculator(potential).evaluate(crystals(), WANTED)
    for found, expected in zip(single, double, strict=True):
        scale = max(1.0, np.abs(expected["forces"]).max())
        np.testing.assert_allclose(found["forces"], expected["forces"], atol=1e-4 * scale)


def test_the_hessian_is_the_slope_of_the_forces(potential):
    atoms = crystals()[1]
    atoms.calc = AtomeqCalculator(potential)
    hessian = atoms.calc.get_hessian(atoms)
    forces = []
    for step in (1e-4, -1e-4):
        moved = atoms.copy()
        moved.positions[0, 0] += step
        moved.calc = atoms.calc
        forces.append(moved.get_forces().ravel())
    slope = (forces[1] - forces[0]) / 2e-4
    np.testing.assert_allclose(hessian[0], slope, atol=1e-5 * np.abs(hessian).max())


def test_dynamics_in_company_are_those_alone(potential):
    together = sorted(relax(crystals(), potential, max_steps=4), key=lambda one: one.index)
    for k, atoms in enumerate(crystals()):
        (alone,) = relax([atoms], potential, max_steps=4)
        assert together[k].energy == pytest.approx(alone.energy, abs=1e-6)
    motion = VelocityVerlet(timestep=1.0, temperature=100.0)
    moved = sorted(simulate(crystals(), potential, motion, n_steps=4), key=lambda one: one.index)
    assert {one.status for one in moved} == {"completed"}
    (alone,) = simulate(crystals()[:1], potential, motion, n_steps=4)
    torch.testing.assert_close(moved[0].graph.pos, alone.graph.pos, atol=SAME, rtol=0)


def test_a_screening_and_a_committee_take_them(potential, tmp_path):
    ase.io.write(tmp_path / "in.extxyz", crystals())
    screen(
        tmp_path / "in.extxyz", potential, out=tmp_path / "out", steps=["validate", "single_point"]
    )
    rows = list(read_rows(tmp_path / "out"))
    expected = AtomeqCalculator(potential).evaluate(crystals(), ("energy",))
    assert sorted(row["energy"] for row in rows) == pytest.approx(
        sorted(one["energy"] for one in expected), abs=1e-6
    )
    committee = AtomeqCalculator([potential, small_potential()])
    (found,) = committee.evaluate(crystals()[:1], ("energy", "energy_std"))
    assert found["energy_std"] > 0


@pytest.mark.filterwarnings("ignore")
def test_torch_sims_own_validation_passes(potential):
    try:
        interface = importlib.import_module("torch_sim.models.interface")
    except (ImportError, SyntaxError) as error:
        pytest.skip(f"torch-sim is not installed here ({error}): pip install torch-sim-atomistic")
    knows_all = Potential(potential.model)  # of the elements that torch-sim asks for
    interface.validate_model_outputs(torchsim_model(knows_all), torch.device("cpu"), torch.float64)
