"""One convolution of many tensors: the numbers of one for each, derivatives and tables."""

import pytest
import torch
from torch import Tensor

from atomeq.ops.coupling.irreps_conv import irreps_conv
from atomeq.ops.coupling.weight_table import WeightTable, tabulated
from atomeq.ops.dispatch import use_backend
from atomeq.ops.paths import Path

EXACT = 1e-12  # float64 rounding
CHANNELS = (3, 18)  # a rest below one vector, and above two
ROUTES = [
    (Path(0, 0, 0), 0, 0),
    (Path(0, 1, 1), 0, 1),
    (Path(1, 0, 1), 1, 1),
    (Path(1, 1, 0), 1, 0),
    (Path(1, 1, 1), 1, 1),
    (Path(1, 1, 2), 1, 2),
]
N_WEIGHTS = 2 * 3 + 4 * 18
EDGES = torch.tensor([[0, 1, 2, 1, 0, 3], [2, 0, 0, 2, 2, 0]])


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def features() -> list[Tensor]:
    return [random(4, 2 * l + 1, c) for l, c in enumerate(CHANNELS)]


def convolve(*given: Tensor, polynomials: Tensor | None = None) -> tuple[Tensor, ...]:
    *x, y, edge = given
    weights = edge if polynomials is None else WeightTable(edge, polynomials)
    return tuple(irreps_conv(x, y, weights, EDGES, 4, ROUTES))


def inputs(tabled: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    if not tabled:
        return [*features(), random(6, 4), random(6, N_WEIGHTS)], {}
    lengths = torch.tensor([0.4, 6.1, 2.5, 3.3, 5.9, 9.0], dtype=torch.float64)
    polynomials = torch.randn(7, 6, N_WEIGHTS, dtype=torch.float64)
    return [*features(), random(6, 4), lengths.requires_grad_()], {"polynomials": polynomials}


@pytest.mark.parametrize("tabled", [False, True])
def test_sums_and_gradients_are_those_of_one_convolution_for_each(tabled: bool) -> None:
    given, table = inputs(tabled)
    results = []
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            sums = convolve(*given, **table)
            probe = sum((one * torch.arange(one.numel()).view_as(one).cos()).sum() for one in sums)
            results.append([*sums, *torch.autograd.grad(probe, given)])
    assert [tuple(one.shape) for one in results[0][:3]] == [(4, 1, 21), (4, 3, 39), (4, 5, 18)]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("tabled", [False, True])
def test_derivatives_of_both_orders_are_true(tabled: bool) -> None:
    given, table = inputs(tabled)
    assert torch.autograd.gradcheck(lambda *some: convolve(*some, **table), given)
    assert torch.autograd.gradgradcheck(lambda *some: convolve(*some, **table), given)


def test_threads_share_the_edges() -> None:
    edge_index = torch.randint(0, 9, (2, 300))
    x = [random(9, 2 * l + 1, c) for l, c in enumerate(CHANNELS)]
    y, weights = random(300, 4), random(300, N_WEIGHTS)
    results, before = [], torch.get_num_threads()
    for n in (1, 3):
        torch.set_num_threads(n)
        sums = irreps_conv(x, y, weights, edge_index, 9, ROUTES)
        total = sum(one.square().sum() for one in sums)
        results.append([*sums, *torch.autograd.grad(total, [*x, y, weights])])
    torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_without_edges_the_sums_are_zero() -> None:
    none = torch.empty(2, 0, dtype=torch.long)
    sums = irreps_conv(features(), random(0, 4), random(0, N_WEIGHTS), none, 4, ROUTES)
    assert all(len(one) == 4 and not one.any() for one in sums)


def test_what_does_not_fit_is_refused() -> None:
    x, y = features(), random(6, 4)
    with pytest.raises(ValueError, match="78 weights"):
        irreps_conv(x, y, random(6, N_WEIGHTS - 1), EDGES, 4, ROUTES)
    with pytest.raises(IndexError, match="atom"):
        irreps_conv(x, y, random(6, N_WEIGHTS), EDGES + 1, 4, ROUTES)
    with pytest.raises(ValueError, match="rows"):
        irreps_conv(x, y, random(6, 2 * 3), EDGES, 4, [*ROUTES[:1], (Path(0, 1, 1), 0, 0)])


def test_a_table_follows_its_function_and_ends_where_it_ends() -> None:
    def function(r: Tensor) -> Tensor:
        return torch.stack((torch.sin(3 * r), torch.exp(-r)), dim=1)

    polynomials = tabulated(function, 0.025, 200)
    r = torch.tensor([0.0, 1.2345, 4.4999, 5.0, 7.0], dtype=torch.float64)
    values, slopes = WeightTable(r / 0.025, polynomials).weights()
    assert (values - function(r.clamp(max=5.0))).abs().max() < 1e-12
    assert (slopes[:3, 0] / 0.025 - 3 * torch.cos(3 * r[:3])).abs().max() < 1e-8
    assert not slopes[3:].any()
