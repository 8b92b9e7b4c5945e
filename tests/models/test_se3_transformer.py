"""SE(3)-Transformer: gradients against differences, mirrors, the iterative form, refusals."""

import pytest
import torch
from ase.build import molecule
from torch import Tensor

from atomeq.models.se3_transformer import (
    IterativeSE3Transformer,
    SE3Transformer,
    SE3TransformerPropagator,
)
from atomeq.nn.tensor_field import EdgeData, SE3Attention, TensorFieldLayer
from atomeq.ops.edge.wigner import rotation_matrix
from atomeq.ops.harmonics.operations import spherical_harmonics
from atomeq.potential.potential import Potential
from atomeq.propagation.particles import fully_connected

EXACT = 1e-11  # float64 through some layers
STEP = 1e-5
DIFFERENCES = 1e-6  # of central differences with that step

EDGES = fully_connected(1, 4)


def particles() -> tuple[Tensor, ...]:
    """Four of them, two of which lie along the second axis."""
    pos, velocities = torch.randn(2, 4, 3, dtype=torch.float64)
    pos[1] = pos[0] + torch.tensor([0.0, 1.0, 0.0])
    features = torch.randn(4, 1).double(), torch.randn(EDGES.shape[1], 2).double()
    return pos, velocities, *features, EDGES


def test_gradients_by_positions_are_those_of_differences_also_along_an_axis() -> None:
    """The reference's miss the harmonics (125 %), or are NaN here."""
    model = SE3TransformerPropagator(hidden_channels=4, num_layers=1).double()
    pos, *rest = particles()

    def number(pos: Tensor) -> Tensor:
        return torch.cat(model(pos, *rest)).sin().sum()

    leaf = pos.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(number(leaf), leaf)
    for atom, axis in ((0, 0), (1, 1), (1, 2), (3, 0)):
        shift = torch.zeros_like(pos)
        shift[atom, axis] = STEP
        slope = (number(pos + shift) - number(pos - shift)) / (2 * STEP)
        assert abs(slope - gradient[atom, axis]) <= DIFFERENCES * gradient.abs().max()


@pytest.mark.parametrize(("chiral", "mirrors"), [(False, True), (True, False)])
def test_only_chiral_paths_break_mirrors(chiral: bool, mirrors: bool) -> None:
    model = SE3TransformerPropagator(hidden_channels=4, num_layers=2, chiral=chiral).double()
    pos, velocities, *rest = particles()
    moved, _ = model(pos, velocities, *rest)
    mirrored, _ = model(-pos, -velocities, *rest)
    error = (mirrored + moved).abs().max() / (moved - pos).abs().max()
    assert bool(error <= EXACT) == mirrors
    assert mirrors or error > 1e-4


def test_points_move_between_the_blocks_and_turn_with_the_frame() -> None:
    model = IterativeSE3Transformer(num_iterations=3, hidden_channels=4).double()
    pos = particles()[0]
    quaternion = torch.nn.functional.normalize(torch.randn(4, dtype=torch.float64), dim=0)
    turn = -rotation_matrix(quaternion).T
    places, turned = (model(p, EDGES, torch.cos) for p in (pos, pos @ turn))
    for one, other in zip(places, turned, strict=True):
        assert (one @ turn - other).abs().max() <= EXACT * one.abs().max()
    leaf = pos.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf, EDGES, torch.cos)[-1].sin().sum(), leaf)
    assert torch.isfinite(gradient).all()
    # The second block sees where the first has left the points, not where they were.
    model.blocks[0].attentions[0].project.weights["1"].data *= 2.0
    again = model(pos, EDGES, torch.cos)
    second, before = (b - a for a, b in ((again[0], again[1]), (places[0], places[1])))
    assert (second - before).abs().max() > 1e-6


@pytest.mark.parametrize("flavor", ["skip", "TFN"])
def test_tensor_field_layers_turn_with_their_input(flavor) -> None:
    layer = TensorFieldLayer({0: 2, 1: 3}, {1: 2}, 1, flavor=flavor).double()
    vectors = torch.randn(EDGES.shape[1], 3, dtype=torch.float64)
    quaternion = torch.nn.functional.normalize(torch.randn(4, dtype=torch.float64), dim=0)
    turn = -rotation_matrix(quaternion)
    h0, h1 = torch.randn(4, 1, 2).double(), torch.randn(4, 3, 3).double()

    def convolve(vectors: Tensor, h1: Tensor) -> Tensor:
        harmonics = spherical_harmonics(vectors, 2, normalization="integral")
        edges = EdgeData(EDGES, vectors.norm(dim=1, keepdim=True), harmonics, vectors)
        return layer({0: h0, 1: h1}, edges)[1]

    expected = turn @ convolve(vectors, h1)
    found = convolve(vectors @ turn.T, turn @ h1)
    assert (found - expected).abs().max() <= EXACT * expected.abs().max()


def test_every_weight_of_the_energy_is_trained() -> None:
    """Distributed training waits for every gradient it was promised."""
    model = SE3Transformer(4.0, hidden_channels=4, num_layers=2, num_heads=2, num_radial=4)
    potential = Potential(model)
    for parameter in model.energy.parameters():
        parameter.data += 0.1  # its last layer starts at zero
    graph = potential.build_graph(molecule("H2O"))
    found = potential(graph, ("energy", "forces"), create_graph=True)
    (found["energy"].sum() + found["forces"].square().sum()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_heads_must_divide_the_channels() -> None:
    with pytest.raises(ValueError, match="3 heads can not share"):
        SE3Attention({0: 4}, {0: 4}, 1, num_heads=3)
