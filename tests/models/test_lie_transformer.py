"""LieTransformer: SE(3) exact by its lift, T(3) inside a wrapper of frames."""

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from structures import rattled_molecule

from atomeq.check.model import validate_model
from atomeq.models.lie_transformer import LieTransformer
from atomeq.models.local_frames import LocalFrames
from atomeq.potential.potential import Potential

SMALL = {
    "num_layers": 2, "hidden_channels": 8, "num_heads": 2, "kernel_channels": 4, "num_radial": 4,
}  # fmt: skip
EXACT = 1e-10  # eV, of energies of order one
LAWS = [
    "forces are -dE/dx", "rotation", "permutation", "separated fragments add",
    "smooth at the cutoff", "continuous at symmetry", "batch equals single", "edges on the poles",
]  # fmt: skip
TURN = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]


@pytest.mark.parametrize("wrapped", [False, True])
def test_it_keeps_the_laws_without_an_exemption(wrapped: bool) -> None:
    """By the lift of SE(3), and with translations only in frames of atoms."""
    model = LieTransformer(2.8, frame_cutoff=2.6, **SMALL)
    if wrapped:
        model = LocalFrames(LieTransformer(2.8, group="T(3)", **SMALL))
    crystal = bulk("MgO", "rocksalt", a=4.2)
    crystal.rattle(0.08, seed=2)
    structures = [crystal, molecule("H2O2")]
    results = validate_model(
        model, elements=["Mg", "O"], structures=structures, only=[*LAWS, "reflection"]
    )
    assert all(result.passed for result in results)


def energy(model: LieTransformer, matrix: np.ndarray) -> float:
    torch.manual_seed(0)
    atoms = rattled_molecule()
    atoms.positions = atoms.positions @ matrix.T
    potential = Potential(model).double().eval()
    return float(potential(potential.build_graph(atoms), ("energy",))["energy"].detach())


def generic(**options) -> LieTransformer:
    model = LieTransformer(3.0, **SMALL, **options)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def test_translations_alone_are_exempt_from_rotations_and_break_them() -> None:
    model = generic(group="T(3)")
    assert set(model.exempt_laws) == {"rotation", "reflection"}
    assert abs(energy(model, TURN) - energy(model, np.eye(3))) > 1e-6
    assert not generic().exempt_laws


def test_proper_lifts_tell_mirror_images_apart() -> None:
    model = generic(proper=True)
    mirror, rotation = np.diag([1.0, 1.0, -1.0]), TURN * np.linalg.det(TURN)
    before = energy(model, np.eye(3))
    assert abs(energy(model, mirror) - before) > 1e-7
    assert energy(model, rotation) == pytest.approx(before, abs=EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": "SO(3)"}, "is unknown"),
        ({"num_heads": 3}, "do not divide"),
        ({"frame_cutoff": 9.0}, "beyond the cutoff"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        LieTransformer(3.0, **{**SMALL, **options})
