"""Blocks on features by irreps: maps by the atom's element."""

from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from atomeq.nn.irreps import Irrep, SpeciesLinear


@pytest.mark.parametrize("species", [[], [2], [2, 0, 2, 5, 0]])
def test_each_atom_is_mapped_by_the_matrix_of_its_element(species):
    torch.manual_seed(0)
    irreps = {Irrep(0, 1): 3, Irrep(1, -1): 4}
    block = SpeciesLinear(irreps, irreps, 6).double()
    index = torch.tensor(species, dtype=torch.long)
    x = {
        irrep: torch.randn(len(index), 2 * irrep.l + 1, n, dtype=torch.float64, requires_grad=True)
        for irrep, n in irreps.items()
    }
    found = block(x, index)
    for irrep, n in irreps.items():
        weight = block.weights[str(irrep)]
        expected = torch.einsum("nmc,cnd->nmd", x[irrep], weight[:, index]) / (n * 6) ** 0.5
        torch.testing.assert_close(found[irrep], expected, rtol=0, atol=1e-13)
        slopes = [
            torch.autograd.grad(y.sin().sum(), (x[irrep], weight), retain_graph=True)
            for y in (found[irrep], expected)
        ]
        for one, other in zip(*slopes, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_a_trace_sees_one_graph_for_any_elements():
    block = SpeciesLinear({Irrep(0, 1): 3}, {Irrep(0, 1): 3}, 4)
    x = torch.randn(3, 1, 3)

    def of(x, species):
        return block({Irrep(0, 1): x}, species)[Irrep(0, 1)]

    trace = partial(make_fx, tracing_mode="symbolic", _allow_non_fake_inputs=True)
    traced = trace(of)(x, torch.tensor([0, 1, 1]))
    other = torch.tensor([3, 2, 0])
    torch.testing.assert_close(traced(x, other), of(x, other))
