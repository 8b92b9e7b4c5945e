"""Norms and updates of atoms by kernels: the reference's numbers, its refusals, its derivatives."""

import pytest
import torch
from operations import fixed

from atomeq.ops.atoms.operations import gated_update, rms_norm
from atomeq.ops.c_compiler import unavailable
from atomeq.ops.dispatch import use_backend

SINGLE = 1e-5  # of the largest number: rounding of sums in another order
DOUBLE = 1e-12


@pytest.mark.skipif(unavailable() is not None, reason=f"no C kernels: {unavailable()}")
@pytest.mark.parametrize(("lmax", "channels"), [(1, 3), (3, 16), (2, 65)])
@pytest.mark.parametrize("n_atoms", [0, 1, 7])
def test_kernels_give_the_numbers_of_plain_torch(n_atoms: int, lmax: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (n_atoms, (lmax + 1) ** 2, channels)
    given = torch.randn(shape, generator=generator, dtype=torch.float64)
    n, hidden = lmax + 1, channels + 2
    weights = [fixed(n, hidden, channels, like=given), fixed(hidden, like=given)]
    gates = [fixed(lmax * hidden, channels, like=given), fixed(lmax * hidden, like=given)]
    second = [fixed(n, 4, hidden, like=given), fixed(4, like=given)]

    def normed(x: torch.Tensor) -> torch.Tensor:
        weight, bias = fixed(n, channels, like=x), fixed(channels, like=x)
        return rms_norm(x, weight, bias) + rms_norm(x, weight, epsilon=0.1)

    def updated(x: torch.Tensor) -> torch.Tensor:
        return gated_update(x, tuple(weights), tuple(gates), tuple(second))

    def multiplied(x: torch.Tensor) -> torch.Tensor:
        inward = [(fixed(n, 6, channels, like=x), fixed(6, like=x)) for _ in range(2)]
        products = *inward, (fixed(n, 4, 6, like=x), fixed(4, like=x))
        return gated_update(x, tuple(weights), tuple(gates), tuple(second), products=products)

    for function in (normed, updated, multiplied):
        found = []
        for backend in ("cpu", "reference"):
            x = given.clone().requires_grad_()
            with use_backend(backend):
                value = function(x)
                (first,) = torch.autograd.grad(value.square().sum(), x)  # the kernel's gradient
                (graph,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
                (hessian,) = torch.autograd.grad(graph.square().sum(), x)
            found.append((value, first, graph, hessian))
        for one, other in zip(*found, strict=True):
            scale = float(other.detach().abs().max()) if other.numel() else 1.0
            torch.testing.assert_close(one, other, rtol=0, atol=DOUBLE * scale)


@pytest.mark.skipif(unavailable() is not None, reason=f"no C kernels: {unavailable()}")
def test_update_of_many_atoms_has_the_same_bits_on_any_number_of_threads() -> None:
    """Several blocks of atoms for each thread, the last one smaller; float32 has wider vectors."""
    given = torch.randn(1500, 4, 12, generator=torch.Generator().manual_seed(0))
    maps = [(fixed(2, n, 12, like=given), fixed(n, like=given)) for n in (9, 7, 7)]
    gates = fixed(9, 12, like=given), fixed(9, like=given)
    second, out = ((fixed(2, 5, n, like=given), fixed(5, like=given)) for n in (9, 7))

    def derivatives(backend: str, n_threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(n_threads)
        x = given.clone().requires_grad_()
        with use_backend(backend):
            value = gated_update(x, maps[0], gates, second, products=(maps[1], maps[2], out))
            return [value.detach(), *torch.autograd.grad(value.square().sum(), x)]

    before = torch.get_num_threads()
    try:
        one, three = derivatives("cpu", 1), derivatives("cpu", 3)
        expected = derivatives("reference", 1)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    for found, other in zip(one, expected, strict=True):
        torch.testing.assert_close(found, other, rtol=0, atol=SINGLE * float(other.abs().max()))


def test_weights_that_are_trained_get_their_gradients() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    weight = fixed(2, 5, like=x).requires_grad_()
    (found,) = torch.autograd.grad(rms_norm(x, weight).square().sum(), weight)
    with use_backend("reference"):
        (expected,) = torch.autograd.grad(rms_norm(x, weight).square().sum(), weight)
    assert torch.equal(found, expected)
    assert found.abs().max() > 0


def test_shapes_that_do_not_fit_are_refused() -> None:
    x = torch.randn(3, 4, 5)
    with pytest.raises(ValueError, match=r"x is \(3, 4, 5\); 3 degrees have 9 rows"):
        rms_norm(x, torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"bias is \(4,\); expected \(5,\)"):
        rms_norm(x, torch.ones(2, 5), torch.zeros(4))
    first, second = torch.ones(2, 6, 5), torch.ones(2, 5, 6)
    with pytest.raises(ValueError, match=r"weight of the gates is \(5, 5\); expected \(6, 5\)"):
        gated_update(x, (first, None), (torch.ones(5, 5), None), (second, None))
    with pytest.raises(ValueError, match="weight of the second map"):
        gated_update(x, (first, None), (torch.ones(6, 5), None), (first, None))
    maps = (first, torch.ones(6)), (first, torch.ones(6)), (first, torch.ones(5))
    with pytest.raises(
        ValueError, match=r"third map of products is \(2, 6, 5\); expected \(2, 5, 6\)"
    ):
        gated_update(x, (first, None), (torch.ones(6, 5), None), (second, None), products=maps)
