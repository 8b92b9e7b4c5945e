"""Each block commutes with rotations, and norms treat every atom by itself."""

import pytest
import torch

from atomeq.nn.norms import EquivariantRMSNorm
from atomeq.nn.so3 import Gate, SO2Convolution, SO3Linear
from atomeq.ops.edge.wigner import block_diagonal, wigner_matrices
from atomeq.ops.orders import m_primary_order

LMAX, CHANNELS = 3, 8
EXACT = 1e-12


@pytest.fixture
def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, (LMAX + 1) ** 2, CHANNELS, generator=generator, dtype=torch.float64)


@pytest.fixture
def rotation() -> torch.Tensor:
    quaternion = torch.tensor([0.3, -0.8, 0.4, 0.33], dtype=torch.float64)
    return block_diagonal(wigner_matrices(quaternion / quaternion.norm(), LMAX))


@pytest.mark.parametrize(
    "block",
    [SO3Linear(LMAX, CHANNELS, 6), EquivariantRMSNorm(LMAX, CHANNELS)],
    ids=lambda block: type(block).__name__,
)
def test_blocks_commute_with_rotation(block, features, rotation):
    block = block.double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    torch.testing.assert_close(
        block(rotation @ features), rotation @ block(features), atol=EXACT, rtol=0
    )


def test_gate_commutes_with_rotation(features, rotation):
    gate = Gate(range((LMAX + 1) ** 2), CHANNELS)
    gates = torch.randn(5, LMAX * CHANNELS, dtype=torch.float64)
    torch.testing.assert_close(
        gate(rotation @ features, gates), rotation @ gate(features, gates), atol=EXACT, rtol=0
    )


@pytest.mark.parametrize("chiral", [False, True])
@pytest.mark.parametrize("mmax", [0, 1, LMAX])
def test_so2_convolution_commutes_with_rotation_about_the_edge(mmax, chiral, features):
    torch.manual_seed(0)
    convolution = SO2Convolution(LMAX, mmax, CHANNELS, 6, extra_scalars=4, chiral=chiral).double()
    radial = torch.randn(5, convolution.n_radial_weights, dtype=torch.float64)
    about_y = torch.tensor([0.6, 0.0, 0.8, 0.0], dtype=torch.float64)
    order = torch.as_tensor(m_primary_order(LMAX, mmax))
    turn = block_diagonal(wigner_matrices(about_y, LMAX))[order][:, order]
    x = features[:, order]
    expected, scalars = convolution(x, radial)
    result, turned_scalars = convolution(turn @ x, radial)
    torch.testing.assert_close(result, turn @ expected, atol=EXACT, rtol=0)
    torch.testing.assert_close(turned_scalars, scalars, atol=EXACT, rtol=0)
    assert scalars.shape == (5, 4)


@pytest.mark.parametrize("chiral", [False, True])
def test_only_a_chiral_so2_convolution_sees_a_mirror(chiral, features):
    torch.manual_seed(0)
    convolution = SO2Convolution(LMAX, LMAX, CHANNELS, 6, chiral=chiral).double()
    order = torch.as_tensor(m_primary_order(LMAX, LMAX))
    l = order.double().sqrt().floor()
    mirror = torch.where(order < l * l + l, -1.0, 1.0).double()[:, None]  # x -> -x turns m < 0
    x = features[:, order]
    difference = convolution(mirror * x)[0] - mirror * convolution(x)[0]
    assert (difference.abs().max() > 0.1) if chiral else (difference.abs().max() < EXACT)


def test_norm_of_an_atom_does_not_see_its_batch(features):
    norm = EquivariantRMSNorm(LMAX, CHANNELS).double()
    torch.testing.assert_close(norm(features)[:1], norm(features[:1]), atol=0, rtol=0)


def test_norm_gives_unit_mean_square(features):
    norm = EquivariantRMSNorm(LMAX, CHANNELS, epsilon=0.0).double()
    square = norm(features).square().mean(dim=2)
    per_degree = [square[:, l * l : (l + 1) ** 2].mean(dim=1) for l in range(LMAX + 1)]
    torch.testing.assert_close(sum(per_degree) / (LMAX + 1), torch.ones(5, dtype=torch.float64))
