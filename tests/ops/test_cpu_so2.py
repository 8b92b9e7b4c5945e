"""The C kernel of SO(2) maps against plain torch, in sizes that its tiles do not divide."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from atomeq.ops.c_compiler import unavailable
from atomeq.ops.edge import reference
from atomeq.ops.edge.cpu import kernels
from atomeq.ops.edge.so2_map import SO2Shape

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no C kernels: {unavailable()}")

# Of the largest element: rounding, of sums in another order.
PARITY = {torch.float64: 1e-13, torch.float32: 5e-6}
# lmax, mmax, c_in, c_out, n_scalars; and edges: beyond one block of rows, of terms, of edges
SHAPES = [
    (SO2Shape(0, 0, 1, 1, 0), 1),
    (SO2Shape(1, 1, 3, 2, 1), 7),
    (SO2Shape(2, 2, 7, 5, 3), 0),
    (SO2Shape(2, 2, 101, 37, 11), 450),
    (SO2Shape(3, 1, 64, 32, 96), 144),
]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def weights_of(shape: SO2Shape, chiral: bool, dtype: torch.dtype) -> list[Tensor]:
    sizes = [
        [part[0].stop - part[0].start for part in (block.outputs, block.inputs)]
        for block in shape.blocks
    ]
    return [
        torch.randn(2, *size, dtype=dtype) if chiral and m else torch.randn(*size, dtype=dtype)
        for m, size in enumerate(sizes)
    ]


def results(shape: SO2Shape, weights: list[Tensor], rows: Tensor, grad: Tensor) -> list[Tensor]:
    """Return M rows + 1, M^T grad and the gradients of the weights, added to ones."""
    made = kernels.SO2Map(weights, shape)
    into = [torch.ones_like(weight) for weight in weights]
    kernels.add_weight_gradients(rows, grad, into, shape)
    bias = torch.ones(shape.n_biases, dtype=rows.dtype)
    value = made.forward(rows, torch.full_like(grad, torch.nan), bias)
    return [value, made.transposed(grad, torch.full_like(rows, torch.nan)), *into]


def expected(shape: SO2Shape, weights: list[Tensor], rows: Tensor, grad: Tensor) -> list[Tensor]:
    """Return the same from the reference by autograd."""
    leaves = [tensor.clone().requires_grad_() for tensor in (rows, *weights)]
    x, bias = leaves[0].unflatten(1, (shape.n_rows, -1)), rows.new_ones(shape.n_biases)
    value, scalars = reference.so2_map(x, leaves[1:], shape, bias, None)
    value = torch.cat((scalars, value.flatten(1)), dim=1)
    to_rows, *to_weights = torch.autograd.grad(value, leaves, grad)
    return [value.detach(), to_rows, *(1 + gradient for gradient in to_weights)]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", PARITY)
@pytest.mark.parametrize("chiral", [False, True])
@pytest.mark.parametrize(("shape", "n_edges"), SHAPES)
def test_map_its_transpose_and_its_weights_equal_plain_torch(
    shape: SO2Shape,
    n_edges: int,
    chiral: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    weights = weights_of(shape, chiral, dtype)
    rows = torch.randn(n_edges, shape.n_rows * shape.c_in, dtype=dtype)
    grad = torch.randn(n_edges, shape.width, dtype=dtype)
    found = results(shape, weights, rows, grad)
    for one, other in zip(found, expected(shape, weights, rows, grad), strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        if other.numel():
            assert (one - other).abs().max() <= PARITY[dtype] * other.abs().max()


@pytest.mark.parametrize("place", [(0, 0), (3, 5)])
def test_nan_comes_out_where_nan_goes_in(place: tuple[int, int]) -> None:
    shape = SO2Shape(2, 2, 4, 4, 8)
    weights = weights_of(shape, True, torch.float32)
    rows = torch.randn(9, shape.n_rows * shape.c_in)
    rows[place] = torch.nan
    out = kernels.SO2Map(weights, shape).forward(rows, torch.empty(9, shape.width))
    assert out[place[0]].isnan().any()
    assert not out[torch.arange(9) != place[0]].isnan().any()
