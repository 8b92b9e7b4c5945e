"""SiLU on the sphere in blocks: the numbers and derivatives of the plain product."""

import pytest
import torch
from torch.nn.functional import silu

from atomeq.ops.blocks import blocks
from atomeq.ops.sphere.grid import SphereGrid
from atomeq.ops.sphere.operations import sphere_pointwise, sphere_silu

GRID = SphereGrid(2, 1, n_beta=8, n_alpha=8, normalization="component", rescale=True, order="m")


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 7, 3, dtype=torch.float64, requires_grad=True)


def test_same_as_pointwise(x):
    torch.testing.assert_close(sphere_silu(x, GRID), sphere_pointwise(x, silu, GRID))


def test_blocks_do_not_change_the_numbers(x, monkeypatch):
    together = sphere_silu(x, GRID)
    (gradient,) = torch.autograd.grad(together.square().sum(), x)
    monkeypatch.setattr("atomeq.ops.blocks._CPU_BLOCK", 400)  # two features at a time
    assert len(list(blocks(5, 64 * 3, x.device))) == 3
    apart = sphere_silu(x, GRID)
    torch.testing.assert_close(apart, together)
    torch.testing.assert_close(torch.autograd.grad(apart.square().sum(), x)[0], gradient)
    with torch.no_grad():
        torch.testing.assert_close(sphere_pointwise(x, silu, GRID), together)


def test_derivatives_of_first_and_second_order(x):
    assert torch.autograd.gradcheck(lambda v: sphere_silu(v, GRID), x)
    assert torch.autograd.gradgradcheck(lambda v: sphere_silu(v, GRID), x)


def test_nothing_in_nothing_out():
    empty = torch.zeros(0, 7, 3)
    assert sphere_silu(empty, GRID).shape == empty.shape
    assert sphere_pointwise(empty, silu, GRID).shape == empty.shape


def test_rows_must_fit_the_grid():
    with pytest.raises(ValueError, match="has 7 rows"):
        sphere_silu(torch.zeros(1, 9, 3), GRID)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_pointwise_function_may_change_the_number_of_channels(wanted: bool) -> None:
    grid = SphereGrid(2, 2)
    x = torch.randn(3, 9, 6, requires_grad=wanted)
    found = sphere_pointwise(x[:, None], lambda values: values[..., :4] * 2, grid)
    assert found.shape == (3, 1, 9, 4)
    expected = sphere_pointwise(x, lambda values: values * 2, grid)[..., :4]
    torch.testing.assert_close(found[:, 0], expected)
