"""SiLU on the sphere in plain torch, a few features at a time, keeping only the coefficients.

A grid of 18 x 18 points holds 17 times as many numbers as the 19 coefficients it was made from: to
keep its values for the backward pass is what makes training run out of memory. They are made
again instead, a block that fits into the processor's cache at a time.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import silu

if TYPE_CHECKING:
    from atomeq.ops.sphere import SphereGrid

_BLOCK = 2**18  # numbers on the grid at a time: 1 MB in float32, about a core's own cache
_BLOCK_ON_GPU = 2**28


def silu_on_grid(x: Tensor, grid: "SphereGrid") -> Tensor:
    """Apply SiLU to the values of ``x`` (n, n_rows, channels) on every point of the sphere."""
    return _SphereSiLU.apply(x, grid)  # type: ignore[no-any-return]


def blocks(x: Tensor, n_points: int) -> Iterator[slice]:
    """Cut the first axis of ``x`` (n, n_rows, channels) into pieces that fit into the cache."""
    size = _BLOCK_ON_GPU if x.is_cuda else _BLOCK
    step = max(1, size // max(1, n_points * x.shape[-1]))
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


class _SphereSiLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: "SphereGrid") -> Tensor:
        ctx.grid = grid
        ctx.save_for_backward(x)
        to_grid, from_grid = grid.to_matrix(like=x), grid.from_matrix(like=x)
        result = torch.empty_like(x)
        for block in blocks(x, grid.n_points):
            values = silu(to_grid @ x[block], inplace=True)
            torch.matmul(from_grid, values, out=result[block])
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: plain torch, all at once
            return _gradient(x, grad, ctx.grid), None
        result = torch.empty_like(x)
        for block in blocks(x, ctx.grid.n_points):
            result[block] = _gradient(x[block], grad[block], ctx.grid)
        return result, None


def _gradient(x: Tensor, grad: Tensor, grid: "SphereGrid") -> Tensor:
    to_grid, from_grid = grid.to_matrix(like=x), grid.from_matrix(like=x)
    values = to_grid @ x
    steepness = torch.sigmoid(values)
    slope = steepness * (1 + values * (1 - steepness))
    return to_grid.mT @ (slope * (from_grid.mT @ grad))
