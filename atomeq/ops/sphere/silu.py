"""SiLU on the sphere in plain torch, a few features at a time, keeping only the coefficients.

A grid of 18 x 18 points holds 17 times as many numbers as the 19 coefficients it was made from: to
keep its values for the backward pass is what makes training run out of memory. They are made
again instead, a block that fits into the processor's cache at a time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import silu

from atomeq.ops.blocks import blocks
from atomeq.ops.sphere.grid import SphereGrid


def silu_on_grid(x: Tensor, grid: SphereGrid) -> Tensor:
    """Apply SiLU to the values of ``x`` (n, n_rows, channels) on every point of the sphere."""
    if torch.compiler.is_compiling():
        # The compiler differentiates a Function once only, and takes that for a constant of further
        # derivatives; it need not keep what it can make again.
        return grid.from_matrix(like=x) @ silu(grid.to_matrix(like=x) @ x)
    return _SphereSiLU.apply(x, grid)  # type: ignore[no-any-return]


class _SphereSiLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: SphereGrid) -> Tensor:
        ctx.grid = grid
        ctx.save_for_backward(x)
        to_grid, from_grid = grid.to_matrix(like=x), grid.from_matrix(like=x)
        result = torch.empty_like(x)
        for block in blocks(x.shape[0], grid.n_points * x.shape[2], x.device):
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
        for block in blocks(x.shape[0], ctx.grid.n_points * x.shape[2], x.device):
            result[block] = _gradient(x[block], grad[block], ctx.grid)
        return result, None


def _gradient(x: Tensor, grad: Tensor, grid: SphereGrid) -> Tensor:
    to_grid, from_grid = grid.to_matrix(like=x), grid.from_matrix(like=x)
    values = to_grid @ x
    steepness = torch.sigmoid(values)
    slope = steepness * (1 + values * (1 - steepness))
    return to_grid.mT @ (slope * (from_grid.mT @ grad))
