"""Frames of atoms: exact for any model, additive, continuous at symmetry; directions of PONITA."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from structures import rattled_molecule

from atomeq.check.model import validate_model
from atomeq.models.faenet import FAENet
from atomeq.models.frame_averaged import FrameAveraged
from atomeq.models.local_frames import LocalFrames
from atomeq.nn.local_frames import neighbour_frames
from atomeq.potential.checkpoint import load_potential, save_potential
from atomeq.potential.potential import Potential

EXACT = 1e-10  # eV, of energies of order one
SMALL = {
    "hidden_channels": 8, "num_filters": 8, "num_interactions": 1, "num_gaussians": 4,
    "phys_embeds": False, "pg_channels": 2,
}  # fmt: skip
TURN = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]


def wrapped(cutoff: float = 3.5, **options) -> Potential:
    torch.manual_seed(0)
    return Potential(LocalFrames(FAENet(cutoff, **SMALL), **options)).double().eval()


def energy(potential: Potential, atoms: Atoms) -> float:
    return float(potential(potential.build_graph(atoms), ("energy",))["energy"][0].detach())


def turned(atoms: Atoms, matrix: np.ndarray) -> Atoms:
    other = atoms.copy()
    other.set_cell(atoms.cell.array @ matrix.T)
    other.positions = atoms.positions @ matrix.T
    return other


STRUCTURES = {
    "generic": rattled_molecule(),
    "linear": molecule("CO2"),
    "tetrahedral": molecule("CH4"),
    "planar": molecule("C2H4"),
    "pair": molecule("N2"),
    "atom": Atoms("O"),
    "cubic crystal": bulk("NaCl", "rocksalt", a=5.64),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_energies_and_forces_turn_along_however_symmetric_the_structure(name):
    potential, atoms = wrapped(), STRUCTURES[name]
    other = turned(atoms, TURN)
    before, after = (potential(potential.build_graph(each)) for each in (atoms, other))
    assert float(after["energy"] - before["energy"]) == pytest.approx(0, abs=EXACT)
    expected = before["forces"].detach().numpy() @ TURN.T
    np.testing.assert_allclose(after["forces"].detach(), expected, rtol=0, atol=EXACT)


def test_fragments_add_where_frames_of_structures_do_not():
    one, other = rattled_molecule(), molecule("CO2")
    other.positions += [40.0, 3.0, 1.0]
    torch.manual_seed(0)
    whole = Potential(FrameAveraged(FAENet(3.5, **SMALL))).double().eval()
    for potential, adds in ((wrapped(), True), (whole, False)):
        together, *apart = (energy(potential, atoms) for atoms in (one + other, one, other))
        assert (abs(together - sum(apart)) < EXACT) == adds


def test_faenet_keeps_every_law_without_an_exemption():
    """Those it is exempt from inside FrameAveraged among them; on two small structures."""
    crystal = bulk("MgO", "rocksalt", a=4.2)
    crystal.rattle(0.08, seed=2)
    results = validate_model(
        LocalFrames(FAENet(3.0, **SMALL), frame_cutoff=3.0),
        elements=["Mg", "O"],
        structures=[crystal, molecule("H2O2")],
        only=[
            "forces are -dE/dx",
            "rotation",
            "reflection",
            "permutation",
            "wrapping",
            "separated fragments add",
            "smooth at the cutoff",
            "continuous at symmetry",
            "single atom",
            "batch equals single",
            "edges on the poles",
        ],
    )
    assert all(result.passed for result in results)
    assert not LocalFrames.exempt_laws


def test_the_energy_has_no_kink_where_a_molecule_passes_the_line():
    potential, bent = wrapped(), []
    for step in (-2e-3, -1e-3, 0.0, 1e-3, 2e-3):
        atoms = molecule("CO2")
        atoms.positions[0, 0] += step
        bent.append(energy(potential, atoms))
    assert bent[0] == pytest.approx(bent[4], abs=EXACT)
    assert (bent[0] - bent[2]) == pytest.approx(4 * (bent[1] - bent[2]), rel=1e-2)


def test_the_energy_is_continuous_where_neighbours_become_equivalent():
    """The nearest changes places with another: pairs share the weight there."""
    potential = wrapped()
    perfect, step = molecule("CH4"), 1e-6
    for sign in (1, -1):
        pushed = perfect.copy()
        pushed.positions[1] *= 1 + sign * step
        assert abs(energy(potential, pushed) - energy(potential, perfect)) < 10 * step


def test_proper_frames_tell_mirror_images_apart():
    potential, atoms = wrapped(proper=True), rattled_molecule()
    mirror = np.diag([1.0, 1.0, -1.0])
    assert abs(energy(potential, turned(atoms, mirror)) - energy(potential, atoms)) > 1e-7
    rotation = TURN * np.linalg.det(TURN)
    assert energy(potential, turned(atoms, rotation)) == pytest.approx(
        energy(potential, atoms), abs=EXACT
    )


def test_what_no_message_brings_can_be_left_out():
    """One layer of messages: an atom's neighbours are enough."""
    atoms = rattled_molecule()
    assert energy(wrapped(2.0, num_hops=1), atoms) == pytest.approx(
        energy(wrapped(2.0), atoms), abs=EXACT
    )
    assert abs(energy(wrapped(2.0, num_hops=0), atoms) - energy(wrapped(2.0), atoms)) > 1e-6


def test_one_random_frame_of_each_atom_averages_to_all():
    potential, atoms = wrapped(training_frames="stochastic"), molecule("H2O")
    exact = energy(potential, atoms)
    drawn = [energy(potential.train(), atoms) for _ in range(40)]
    spread = float(np.std(drawn))
    assert spread > 1e-7
    assert abs(np.mean(drawn) - exact) < 4 * spread / np.sqrt(40)


def test_a_forces_head_turns_along():
    model = LocalFrames(FAENet(3.5, force_head="mlp", **SMALL))
    potential, atoms = Potential(model).double().eval(), STRUCTURES["generic"]
    before, after = (
        potential(potential.build_graph(a))["forces"].detach().numpy()
        for a in (atoms, turned(atoms, TURN))
    )
    np.testing.assert_allclose(after, before @ TURN.T, rtol=0, atol=EXACT)


def test_it_survives_a_checkpoint(tmp_path):
    potential, atoms = wrapped(num_hops=1).float(), molecule("H2O")
    assert energy(load_potential(save_potential(potential, tmp_path)), atoms) == energy(
        potential, atoms
    )


def test_cutoffs_of_frames_are_within_the_model():
    with pytest.raises(ValueError, match="beyond the model's cutoff"):
        wrapped(frame_cutoff=4.0)


def test_weights_of_an_atom_sum_to_one():
    vectors = torch.randn(7, 3, dtype=torch.float64)
    target = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    frames = neighbour_frames(vectors, target, torch.ones(7, dtype=torch.float64), 4)
    totals = torch.zeros(4, dtype=torch.float64).index_add(0, frames.atom, frames.weights)
    torch.testing.assert_close(totals, torch.ones_like(totals))
    eye = torch.eye(3, dtype=torch.float64).expand_as(frames.matrices)
    torch.testing.assert_close(frames.matrices.mT @ frames.matrices, eye)
