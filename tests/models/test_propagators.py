"""Laws of the learned propagators: E(3) equivariance, refinement of the time step, refusals."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from atomeq.data.nbody import fully_connected
from atomeq.models.base import Propagator
from atomeq.models.egnn_published import QM9EGNN, VelocityEGNN
from atomeq.models.segno import SEGNOPropagator, md22_form, nbody_form
from atomeq.ops.wigner import rotation_matrix

EXACT = 1e-11  # float64 through some layers
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


@pytest.mark.parametrize("integrator", ["symplectic_euler", "leapfrog"])
def test_finer_steps_converge_with_the_same_weights(integrator: str, system) -> None:
    model = generic(SEGNOPropagator(hidden_channels=16, feature_rate=1.0, integrator=integrator))
    results = []
    for num_steps in (32, 64, 128, 256):
        model.num_steps = num_steps
        results.append(model(*system)[0].detach())
    changes = [float((b - a).abs().max()) for a, b in pairwise(results)]
    for coarse, fine in pairwise(changes):
        assert fine < 0.6 * coarse  # first order at least: features move by explicit Euler


def test_published_step_does_not_follow_the_number_of_steps() -> None:
    assert [nbody_form(n).horizon / n for n in (4, 8)] == [1 / 8, 1 / 8]


def test_horizon_and_steps_must_be_positive() -> None:
    with pytest.raises(ValueError, match="0 steps"):
        SEGNOPropagator(num_steps=0)


def test_qm9_form_refuses_elements_it_does_not_know() -> None:
    model = QM9EGNN(8, num_layers=1)
    with pytest.raises(ValueError, match=r"\[26\] are unknown"):
        model.input_features(torch.tensor([1, 26]))


def test_a_propagator_without_forward_says_so(system) -> None:
    with pytest.raises(NotImplementedError, match="Propagator does not define forward"):
        Propagator()(*system)
