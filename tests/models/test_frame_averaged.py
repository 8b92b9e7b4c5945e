"""Any model becomes invariant, also where frames are degenerate."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from scipy.spatial.transform import Rotation
from structures import rattled_molecule, rattled_slab

from atomeq.models.faenet import FAENet
from atomeq.models.frame_averaged import Canonicalized, FrameAveraged
from atomeq.potential.checkpoint import CheckpointError, build_model, load_potential, save_potential
from atomeq.potential.potential import Potential

SMALL = {"hidden_channels": 48, "num_filters": 24, "num_interactions": 2, "num_gaussians": 8}
EXACT = 1e-12
TURN = Rotation.from_rotvec([0.7, -1.3, 0.4]).as_matrix()
ABOUT_Z = Rotation.from_rotvec([0, 0, 0.9]).as_matrix()
MIRROR = np.diag([1.0, -1.0, 1.0])

STRUCTURES = {
    "generic": rattled_molecule(),
    "atom": Atoms("O"),
    "diatomic": molecule("CO"),
    "linear": molecule("CO2"),
    "planar": molecule("H2O"),
    "symmetric top": molecule("NH3"),
    "hexagon": molecule("C6H6"),
    "tetrahedral": molecule("CH4"),
    "octahedral": Atoms("SF6", [[0, 0, 0], *(1.56 * np.eye(3)), *(-1.56 * np.eye(3))]),
    "cubic crystal": bulk("NaCl", "rocksalt", a=5.64),
    "hexagonal crystal": bulk("Zn", "hcp", a=2.66, c=4.95),
    "slab": rattled_slab(),
}


def bare(**options) -> FAENet:
    return FAENet(4.0, **SMALL, **options)


def wrapped(wrapper, **options) -> Potential:
    return Potential(wrapper(bare(), **options)).double().eval()


def energy(potential: Potential, atoms: Atoms) -> float:
    return float(potential(potential.build_graph(atoms), ("energy",))["energy"][0].detach())


def turned(atoms: Atoms, matrix: np.ndarray) -> Atoms:
    other = atoms[np.random.default_rng(0).permutation(len(atoms))]
    other.set_cell(atoms.cell.array @ matrix.T)
    other.positions = other.positions @ matrix.T
    return other


def test_the_bare_model_is_not_invariant():
    """Or the tests below would show nothing."""
    potential = Potential(bare()).double().eval()
    atoms = STRUCTURES["generic"]
    assert abs(energy(potential, atoms) - energy(potential, turned(atoms, TURN))) > 1e-3


@pytest.mark.parametrize("wrapper", [FrameAveraged, Canonicalized])
@pytest.mark.parametrize("name", STRUCTURES)
def test_energy_is_invariant_however_symmetric_the_structure(wrapper, name):
    potential, atoms = wrapped(wrapper), STRUCTURES[name]
    before = energy(potential, atoms)
    for matrix in (TURN, TURN @ MIRROR):
        assert energy(potential, turned(atoms, matrix)) == pytest.approx(before, abs=EXACT)


@pytest.mark.parametrize("name", STRUCTURES)
def test_nearly_symmetric_structures_are_invariant_too(name):
    potential, atoms = wrapped(FrameAveraged), STRUCTURES[name].copy()
    atoms.rattle(1e-4, seed=4)
    after = energy(potential, turned(atoms, TURN))
    # Rounding errors are amplified by the inverse of the gap between eigenvalues, here 1e4.
    assert after == pytest.approx(energy(potential, atoms), abs=1e4 * EXACT)


@pytest.mark.parametrize("wrapper", [FrameAveraged, Canonicalized])
@pytest.mark.parametrize("name", STRUCTURES)
def test_forces_turn_along_and_are_finite(wrapper, name):
    potential, atoms = wrapped(wrapper), STRUCTURES[name]
    forces = potential(potential.build_graph(atoms))["forces"].numpy()
    assert np.isfinite(forces).all()
    other = atoms.copy()
    other.set_cell(atoms.cell.array @ TURN.T)
    other.positions = atoms.positions @ TURN.T
    after = potential(potential.build_graph(other))["forces"].numpy()
    np.testing.assert_allclose(after, forces @ TURN.T, rtol=0, atol=1e3 * EXACT)


@pytest.mark.parametrize("wrapper", [FrameAveraged, Canonicalized])
def test_proper_frames_tell_mirror_images_apart(wrapper):
    potential, atoms = wrapped(wrapper, proper=True), STRUCTURES["generic"]
    before = energy(potential, atoms)
    assert energy(potential, turned(atoms, TURN)) == pytest.approx(before, abs=EXACT)
    assert abs(energy(potential, turned(atoms, MIRROR)) - before) > 1e-6


def test_frames_of_the_plane_are_for_turns_about_z():
    potential, atoms = wrapped(FrameAveraged, dim=2), STRUCTURES["slab"]
    before = energy(potential, atoms)
    assert energy(potential, turned(atoms, ABOUT_Z)) == pytest.approx(before, abs=EXACT)
    assert abs(energy(potential, turned(atoms, TURN)) - before) > 1e-6


def test_forces_of_a_force_head_turn_along():
    model = FrameAveraged(bare(force_head="mlp"))
    potential, atoms = Potential(model).double().eval(), STRUCTURES["generic"]
    other = atoms.copy()
    other.positions = atoms.positions @ (TURN @ MIRROR).T
    before, after = (
        potential(potential.build_graph(a))["forces"].detach().numpy() for a in (atoms, other)
    )
    np.testing.assert_allclose(after, before @ (TURN @ MIRROR).T, rtol=0, atol=EXACT)


def test_frames_of_positions_are_invariant_but_see_the_choice_of_images():
    """As published; the reason why frames of edges are the default."""
    potential, atoms = wrapped(FrameAveraged, covariance="positions"), STRUCTURES["slab"]
    before = energy(potential, atoms)
    assert energy(potential, turned(atoms, TURN)) == pytest.approx(before, abs=EXACT)
    other = atoms.copy()
    other.positions[0] += atoms.cell[0]
    assert abs(energy(potential, other) - before) > 1e-6
    default = wrapped(FrameAveraged)
    assert energy(default, other) == pytest.approx(energy(default, atoms), abs=EXACT)


def test_stochastic_frames_follow_their_seed_and_average_to_all():
    atoms = STRUCTURES["generic"]

    def draws(seed: int, n: int) -> list[float]:
        potential = wrapped(FrameAveraged, training_frames="stochastic", seed=seed).train()
        return [energy(potential, atoms) for _ in range(n)]

    torch.manual_seed(0)
    some = draws(3, 60)
    torch.manual_seed(0)
    assert draws(3, 60) == some
    torch.manual_seed(0)
    exact = energy(wrapped(FrameAveraged), atoms)
    assert len({round(value, 9) for value in some}) == 8
    assert np.mean(sorted({round(value, 9) for value in some})) == pytest.approx(exact, abs=1e-8)


def test_frame_by_frame_equals_one_batch():
    torch.manual_seed(0)
    together = energy(wrapped(FrameAveraged), STRUCTURES["generic"])
    torch.manual_seed(0)
    one_by_one = energy(wrapped(FrameAveraged, batched=False), STRUCTURES["generic"])
    assert one_by_one == pytest.approx(together, abs=EXACT)


def test_a_batch_of_degenerate_and_generic_structures_equals_its_members():
    structures = list(STRUCTURES.values())
    for wrapper in (FrameAveraged, Canonicalized):
        potential = wrapped(wrapper)
        together = potential(potential.build_graph(structures), ("energy",))["energy"].detach()
        apart = [energy(potential, atoms) for atoms in structures]
        np.testing.assert_allclose(together, apart, rtol=0, atol=EXACT)


def test_a_model_inside_a_model_survives_a_checkpoint(tmp_path):
    potential = Potential(Canonicalized(bare(), channels=8)).eval()
    loaded = load_potential(save_potential(potential, tmp_path))
    atoms = STRUCTURES["generic"]
    assert energy(loaded, atoms) == energy(potential, atoms)
    assert loaded.model.config() == potential.model.config()


def test_a_foreign_model_inside_is_refused(tmp_path):
    class Foreign(FAENet):
        pass

    with pytest.raises(
        CheckpointError, match=r"FrameAveraged cannot be saved: .*Foreign' is not registered"
    ):
        save_potential(Potential(FrameAveraged(Foreign(4.0, **SMALL))), tmp_path)
    node = FrameAveraged(bare()).config()
    node["init_args"]["model"]["class_path"] = "os.system"
    with pytest.raises(CheckpointError, match=r"os\.system"):
        build_model(node)


def test_dim_is_two_or_three():
    with pytest.raises(ValueError, match="dim 2 or 3"):
        FrameAveraged(bare(), dim=4)  # pyright: ignore[reportArgumentType]
