"""The eSCN convolution with biases: one operation for it all, and the same numbers step by step."""

import pytest
import torch

from atomeq.nn.activations import activation_of
from atomeq.nn.edge_convolution import EdgeConvolution
from atomeq.nn.pair_mlp import PairFeatures
from atomeq.ops.edge.wigner import build_edge_frame

LMAX, MMAX, CHANNELS, HIDDEN, N_ATOMS, N_EDGES = 2, 1, 3, 4, 5, 12
EXACT = 1e-12  # rounding of float64


def outputs(layer: EdgeConvolution, enveloped: bool) -> list[torch.Tensor]:
    """Return sums on atoms, their gradients, and gradients of these by everything."""
    made = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    edges = torch.randint(N_ATOMS, (2, N_EDGES), generator=made)
    x, vectors = random(N_ATOMS, (LMAX + 1) ** 2, CHANNELS), random(N_EDGES, 3)
    leaves = [x.requires_grad_(), vectors.requires_grad_()]
    frame = build_edge_frame(vectors, edges, n_atoms=N_ATOMS, lmax=LMAX, mmax=MMAX)
    pairs = PairFeatures(random(N_EDGES, 6), random(N_ATOMS, 0), random(N_ATOMS, 0), edges)
    total = layer(x, frame, pairs, random(N_EDGES) if enveloped else None)
    first = torch.autograd.grad(total.sin().sum(), leaves, create_graph=True)
    loss = torch.stack([gradient.square().sum() for gradient in first]).sum()
    return [total, *first, *torch.autograd.grad(loss, [*leaves, *layer.parameters()])]


@pytest.mark.parametrize("enveloped", [True, False])
@pytest.mark.parametrize("chiral", [True, False])
def test_one_operation_with_biases_is_its_steps(chiral, enveloped):
    torch.manual_seed(0)
    sizes = (LMAX, MMAX, CHANNELS, HIDDEN, 4, 6)
    layer = EdgeConvolution(*sizes, chiral=chiral, bias=True).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    assert layer.activation is None  # nothing between the maps is kept
    whole = outputs(layer, enveloped)
    layer.activation = activation_of("gate", LMAX, MMAX, HIDDEN, order="m")
    for found, expected in zip(whole, outputs(layer, enveloped), strict=True):
        torch.testing.assert_close(found, expected, atol=EXACT, rtol=EXACT)
