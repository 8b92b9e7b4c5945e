"""Laws of the learned propagators: E(3) equivariance, refinement of the time step, refusals."""

from itertools import pairwise

import pytest
import torch
from published.segno_motion import SEGNOMotion
from torch import Tensor

from atomeq.models.base import Propagator
from atomeq.models.clifford import CGENNPropagator
from atomeq.models.egnn_published import MoleculeEGNN, VelocityEGNN
from atomeq.models.ponita import PONITAPropagator
from atomeq.models.se3_transformer import SE3TransformerPropagator
from atomeq.models.segno import Motion, SEGNOPropagator, md22_form, nbody_form
from atomeq.ops.edge.wigner import rotation_matrix
from atomeq.propagation.particles import fully_connected

EXACT = 1e-11  # float64 through some layers
NEARLY_ASYMPTOTIC = 0.2  # of a ratio of errors at finite steps
N_SYSTEMS, N_BODIES = 2, 5


def generic(model: Propagator) -> Propagator:
    """Weights away from the tiny ones of the initialisation."""
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    return model.double().eval()


@pytest.fixture
def system() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    pos = torch.randn(N_SYSTEMS * N_BODIES, 3, dtype=torch.float64)
    velocities = torch.randn_like(pos)
    edge_index = fully_connected(N_SYSTEMS, N_BODIES)
    source, target = edge_index
    squared = ((pos[source] - pos[target]) ** 2).sum(1, keepdim=True)
    edge_features = torch.cat([torch.ones_like(squared), squared], dim=1)
    return pos, velocities, velocities.norm(dim=1, keepdim=True), edge_features, edge_index


MODELS = {
    "egnn": VelocityEGNN,
    "egnn_normalized": lambda: VelocityEGNN(normalize=True, tanh=True),
    "ponita": lambda: PONITAPropagator(hidden_channels=8, basis_channels=6, num_steps=2),
    "cgenn": lambda: CGENNPropagator(hidden_channels=6),
    "cgenn_centred": lambda: CGENNPropagator(hidden_channels=6, centred=True),
    "glgenn": lambda: CGENNPropagator(hidden_channels=6, sharing="quaternion"),
    "se3_transformer": lambda: SE3TransformerPropagator(hidden_channels=4, num_layers=1, lmax=2),
    "segno": SEGNOPropagator,
    "segno_leapfrog": lambda: SEGNOPropagator(integrator="leapfrog"),
    "segno_md22": lambda: md22_form(n_inputs=1, n_edge_features=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_prediction_moves_with_the_frame(name: str, system) -> None:
    model = generic(MODELS[name]())
    pos, velocities, *rest = system
    quaternion = torch.nn.functional.normalize(torch.randn(4, dtype=torch.float64), dim=0)
    rotation = -rotation_matrix(quaternion)  # improper
    shift = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    before = model(pos, velocities, *rest)
    after = model(pos @ rotation.T + shift, velocities @ rotation.T, *rest)
    scale = before[0].abs().max()
    assert (after[0] - (before[0] @ rotation.T + shift)).abs().max() <= EXACT * scale
    if before[1] is not None:
        assert (after[1] - before[1] @ rotation.T).abs().max() <= EXACT * scale


@pytest.mark.parametrize("name", MODELS)
def test_inputs_are_left_alone(name: str, system) -> None:
    copies = [tensor.clone() for tensor in system]
    generic(MODELS[name]())(*system)
    assert all(torch.equal(a, b) for a, b in zip(system, copies, strict=True))


@pytest.mark.parametrize(("integrator", "order"), [("symplectic_euler", 1), ("leapfrog", 2)])
def test_halving_the_step_converges_at_the_order_of_the_integrator(
    integrator: str, order: int, system
) -> None:
    """With the same weights, and features that change along: nothing depends on the step."""
    model = generic(SEGNOPropagator(hidden_channels=16, feature_rate=1.0, integrator=integrator))
    results = []
    for num_steps in (32, 64, 128, 256):
        model.num_steps = num_steps
        results.append(torch.cat(model(*system)).detach())
    changes = [float((b - a).abs().max()) for a, b in pairwise(results)]
    for coarse, fine in pairwise(changes):
        assert fine == pytest.approx(coarse / 2**order, rel=NEARLY_ASYMPTOTIC)


def test_a_longer_horizon_is_more_of_the_same_motion(system) -> None:
    """Twice the horizon in twice the steps passes through where the horizon ended."""
    model = generic(SEGNOPropagator(hidden_channels=16, num_steps=4, horizon=0.5))
    once = model(*system)
    model.num_steps, model.horizon = 8, 1.0
    motion = Motion(model.embedding(system[2]), *system[:2])
    fourth = list(model.trajectory(motion, *system[3:]))[3]
    assert torch.equal(fourth.pos, once[0])
    assert torch.equal(fourth.velocities, once[1])


def test_leapfrog_returns_to_the_start_when_velocities_are_reversed(system) -> None:
    """A law of the integrator for forces that depend on positions alone: features stand still."""
    model = generic(SEGNOPropagator(hidden_channels=16, feature_rate=0.0, integrator="leapfrog"))
    pos, velocities, *rest = system
    there, speed = model(pos, velocities, *rest)
    assert (there - pos - velocities).abs().max() > 0.01  # there were forces
    back, returned = model(there, -speed, *rest)
    assert (back - pos).abs().max() <= EXACT * pos.abs().max()
    assert (returned + velocities).abs().max() <= EXACT * velocities.abs().max()
    model.integrator = "symplectic_euler"
    there, speed = model(pos, velocities, *rest)
    assert (model(there, -speed, *rest)[0] - pos).abs().max() > 1e-4  # of first order: it does not


def test_published_step_does_not_follow_the_number_of_steps() -> None:
    assert [nbody_form(n).horizon / n for n in (4, 8)] == [1 / 8, 1 / 8]


def test_horizon_and_steps_must_be_positive() -> None:
    with pytest.raises(ValueError, match="0 steps"):
        SEGNOPropagator(num_steps=0)
    with pytest.raises(ValueError, match="integrator 'euler' is unknown"):
        SEGNOPropagator(integrator="euler")  # pyright: ignore


def test_qm9_form_refuses_elements_it_does_not_know() -> None:
    model = MoleculeEGNN(hidden_channels=8, num_layers=1)
    with pytest.raises(ValueError, match=r"\[26\] are unknown"):
        model.input_features(torch.tensor([1, 26]))


def test_a_propagator_without_forward_says_so(system) -> None:
    with pytest.raises(NotImplementedError, match="Propagator does not define forward"):
        Propagator()(*system)


def test_sticks_keep_their_length_and_the_motion_its_frame(system) -> None:
    pos, velocities, nodes, edges, edge_index = system
    sticks = torch.tensor([[0, 1], [6, 8]])
    model = SEGNOMotion(1, 2, hidden_channels=16)
    for parameter in model.parameters():
        parameter.data += 0.003 * torch.randn_like(parameter)
    model = model.double()
    moved, speeds = model(pos, velocities, nodes, edges, edge_index, sticks)
    before, after = (p[sticks[:, 0]] - p[sticks[:, 1]] for p in (pos, moved))
    assert (after.norm(dim=1) - before.norm(dim=1)).abs().max() <= EXACT
    quaternion = torch.nn.functional.normalize(torch.randn(4, dtype=torch.float64), dim=0)
    turn = -rotation_matrix(quaternion).T
    again, spun = model(pos @ turn, velocities @ turn, nodes, edges, edge_index, sticks)
    assert (again - moved @ turn).abs().max() <= EXACT * moved.abs().max()
    assert (spun - speeds @ turn).abs().max() <= EXACT * moved.abs().max()
    free, _ = model(pos, velocities, nodes, edges, edge_index, sticks[:0])
    assert not torch.allclose(free, moved)


def hinge_step(model: SEGNOMotion, h: Tensor, pos: Tensor, v: Tensor, force: Tensor) -> Tensor:
    """GMN's hinge of particles 0 (pivot), 1 and 2, a vector at a time; returns their positions."""
    accelerations = []
    for k in range(3):
        basis = [force[k], pos[k] - pos[0], v[k] - v[0]]
        gram = torch.stack([a @ b for a in basis for b in basis])
        weights = model.f_hinge_mlp(gram / gram.norm())
        accelerations.append(sum(w * a for w, a in zip(weights, basis, strict=True)))
    acceleration = torch.stack(accelerations).mean(0)
    pivot = pos[0] + v[0] + acceleration
    places = [pivot]
    for k in (1, 2):
        arm = pos[k] - pos[0]
        spin = torch.linalg.cross(arm, v[k] - v[0]) / (arm @ arm)
        turn = torch.linalg.cross(arm, force[k] - acceleration) / (arm @ arm)
        spin = model.coord_mlp_w_vel(h[k]) * spin + turn
        x, y, z = spin
        generator = torch.stack([0 * x, -z, y, z, 0 * x, -x, -y, x, 0 * x]).view(3, 3)
        places.append(pivot + torch.matrix_exp(generator) @ arm)
    return torch.stack(places)


def test_hinges_keep_their_arms_and_swing_as_published(system) -> None:
    pos, velocities, nodes, edges, edge_index = system
    hinges, sticks = torch.tensor([[0, 1, 2], [7, 5, 9]]), torch.tensor([[6, 8]])
    model = SEGNOMotion(1, 2, hidden_channels=16, num_steps=1)
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    model = model.double()
    moved, speeds = model(pos, velocities, nodes, edges, edge_index, sticks, hinges)
    for pivot, *ends in hinges.tolist():
        for end in ends:
            before, after = (float((p[end] - p[pivot]).norm()) for p in (pos, moved.detach()))
            assert after == pytest.approx(before, rel=EXACT)
    h = model.embedding(nodes)  # arms turn by the features of before the step
    _, force = model.force(h, pos, edges, edge_index)
    expected = hinge_step(model, h, pos, velocities, force)
    assert (moved[:3] - expected).abs().max() <= EXACT * expected.abs().max()
    quaternion = torch.nn.functional.normalize(torch.randn(4, dtype=torch.float64), dim=0)
    turn = -rotation_matrix(quaternion).T
    again, spun = model(pos @ turn, velocities @ turn, nodes, edges, edge_index, sticks, hinges)
    assert (again - moved @ turn).abs().max() <= EXACT * moved.abs().max()
    assert (spun - speeds @ turn).abs().max() <= EXACT * speeds.abs().max()
    without, _ = model(pos, velocities, nodes, edges, edge_index, sticks)
    assert torch.equal(without[[3, 4, 6, 8]], moved[[3, 4, 6, 8]])


def test_a_particle_belongs_to_one_body(system) -> None:
    with pytest.raises(ValueError, match="one stick or one hinge"):
        SEGNOMotion(1, 2).double()(*system, torch.tensor([[0, 1]]), torch.tensor([[1, 2, 3]]))
