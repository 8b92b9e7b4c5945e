"""``atomeq spectrum``: of a molecule, of a trajectory; potentials without dipoles are refused."""

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase.build import molecule

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.models.egnn import EGNN
from atomeq.models.electric import Electric
from atomeq.potential.checkpoint import save_potential, scatter_weights
from atomeq.potential.potential import Potential
from atomeq.properties.spectrum import infrared_modes


@pytest.fixture
def dipoles(workdir: Path) -> Path:
    torch.manual_seed(0)
    inner = EGNN(4.0, num_layers=1, hidden_channels=8, num_radial=4)
    potential = Potential(Electric(inner, properties=["dipole"])).double()
    scatter_weights(potential)
    return save_potential(potential, workdir / "dipoles")


def test_of_a_molecule_it_is_harmonic(run, workdir, dipoles, capsys):
    water = molecule("H2O")
    ase.io.write("water.xyz", water)
    line = "spectrum water.xyz --potential dipoles --out ir.extxyz --relax false"
    assert run(line) == 0
    told = json.loads((workdir / "ir.summary.json").read_text())
    expected = infrared_modes(
        next(ase.io.iread("water.xyz")), AtomeqCalculator(dipoles, dtype="float64")
    )
    np.testing.assert_allclose(told["lines"]["wavenumber_per_cm"], expected.wavenumbers)
    np.testing.assert_allclose(told["lines"]["intensity_km_per_mol"], expected.intensities)
    assert (workdir / "ir.png").stat().st_size > 1000
    capsys.readouterr()
    assert run("spectrum cu.extxyz --potential small --out no.extxyz") == 2
    assert "small gives no dipoles; name a potential that does" in capsys.readouterr().err


def test_of_a_trajectory_it_is_that_of_the_dipoles_of_its_frames(run, workdir, dipoles):
    frames = []
    for k in range(24):
        frame = molecule("H2O")
        frame.positions[1] *= 1 + 0.03 * np.sin(k)
        frames.append(frame)
    ase.io.write("md.extxyz", frames)
    assert run("spectrum md.extxyz --potential dipoles --interval 1 --out ir.extxyz") == 0
    told = json.loads((workdir / "ir.summary.json").read_text())
    assert told["n_frames"] == 24
    assert max(told["spectrum"]["absorption_km_per_mol_cm"]) > 0
    calculator = AtomeqCalculator(dipoles, dtype="float64")
    for written, frame in zip(ase.io.iread("ir.extxyz"), frames, strict=True):
        expected = calculator.get_property("dipole", frame)
        np.testing.assert_allclose(written.get_dipole_moment(), expected, atol=1e-6)
