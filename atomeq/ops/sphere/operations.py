"""Pointwise functions on the sphere: coefficients to grid values, a function, and back.

A function between the two steps is only as equivariant as the grid is fine: it raises the
bandwidth, and what lies above is aliased.

Kernels have one operation closed under derivatives. With A_i the matrices from coefficients t_i to
values on a grid, B that from values to coefficients, and f the k-th derivative of SiLU (or nothing,
k < 0, where t_0 is a factor like the others)

    S_k(t_0, t_1, ...)  =  B [ f^(k)(A_0 t_0) * (A_1 t_1) * ... ].

SiLU on the sphere is S_0(x), a product of two functions S(x, y). If h is the cotangent of S, then

    dS/dt_i = A_i^T [ f^(k)(A_0 t_0) * ... * (B^T h) ]  without the factor i > 0,
    dS/dt_0 = A_0^T [ f^(k+1)(A_0 t_0) * (A_1 t_1) * ... * (B^T h) ],

of the same form: what is kept is the coefficients, never a grid.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import silu

from atomeq.ops.blocks import blocks
from atomeq.ops.dispatch import operation, size_of
from atomeq.ops.orders import coefficient_index
from atomeq.ops.registration import kernel
from atomeq.ops.self_check import Example, random
from atomeq.ops.specification import Size
from atomeq.ops.sphere.grid import SphereGrid
from atomeq.traces import has_values


def _verified(x: Tensor, grid: SphereGrid) -> Size:
    n_rows = len(coefficient_index(grid.lmax, grid.mmax))
    if x.shape[-2] != n_rows:
        raise ValueError(
            f"x is {tuple(x.shape)}; a grid of lmax={grid.lmax}, mmax={grid.mmax} has {n_rows} rows"
        )
    return size_of(x, math.prod(x.shape[:-2]), lmax=grid.lmax, mmax=grid.mmax, channels=x.shape[-1])


@operation(lambda x, fn, grid: _verified(x, grid))
def sphere_pointwise(
    x: Float[Tensor, "*batch n_rows channels"],
    fn: Callable[[Float[Tensor, "*batch n_points channels"]], Tensor],
    grid: SphereGrid,
) -> Float[Tensor, "*batch n_rows c_out"]:
    """Apply a function to the values on every point of the sphere.

    Args:
        x: Coefficients, (*, n_rows, channels).
        fn: From values (*, n_points, channels) to values (*, n_points, c_out), treating every
            point alike: an activation, or a perceptron on the channels.
        grid: The grid.

    Returns:
        Coefficients of the result, (*, n_rows, c_out).

    Raises:
        ValueError: If x has not the grid's number of rows.
    """
    to_grid, from_grid = grid.to_matrix(like=x), grid.from_matrix(like=x)
    flat = x.reshape(-1, *x.shape[-2:])
    results = []
    for block in blocks(flat.shape[0], grid.n_points * x.shape[-1], x.device):
        results.append(from_grid @ fn(to_grid @ flat[block]))
        if results[0].requires_grad:  # all at once: every block would keep a graph of its own
            return from_grid @ fn(to_grid @ x)
    if not results:
        return from_grid @ fn(to_grid @ x)
    return torch.cat(results).reshape(*x.shape[:-2], *results[0].shape[1:])


def _example(size: Size) -> Example:
    """Return coefficients and a grid of their degree."""
    grid = SphereGrid(size.lmax, size.mmax, order="m")
    x = random(size, 5, len(grid.from_matrix(like=random(size, 1))), size.channels)
    return [x], lambda operation, x: operation(x, grid)


def _silu_by_kernels(x: Tensor, grid: SphereGrid, kernels: str) -> Tensor:
    return sphere_form([x], [grid.to_matrix(like=x)], grid.from_matrix(like=x), 0, kernels)


@operation(_verified, by_kernels=_silu_by_kernels, example=_example)
def sphere_silu(
    x: Float[Tensor, "n n_rows channels"], grid: SphereGrid
) -> Float[Tensor, "n n_rows channels"]:
    """Apply SiLU to the values on every point of the sphere.

    The same numbers as :func:`sphere_pointwise`, but no grid is kept for the backward pass and few
    are in memory at a time.

    Args:
        x: Coefficients, (n, n_rows, channels).
        grid: The grid.

    Returns:
        Coefficients of the result, (n, n_rows, channels).

    Raises:
        ValueError: If x has not the grid's number of rows.
    """
    if not has_values(x):
        # The compiler differentiates a Function once only, and takes that for a constant of further
        # derivatives; it need not keep what it can make again. A trace has no place for one at all.
        return grid.from_matrix(like=x) @ silu(grid.to_matrix(like=x) @ x)
    return _SphereSiLU.apply(x, grid)  # type: ignore[no-any-return]


class _SphereSiLU(Function):
    """SiLU in plain torch, a few features at a time, keeping only the coefficients.

    A grid of 18 x 18 points holds 17 times as many numbers as the 19 coefficients it was made from:
    to keep its values for the backward pass is what makes training run out of memory. They are made
    again instead, a block that fits into the processor's cache at a time.
    """

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


def _fake_form(call: SimpleNamespace) -> Tensor:
    n, _, channels = call.factors[0].shape
    return call.factors[0].new_empty(n, call.back.shape[0], channels)


def _form_gradient(
    saved: SimpleNamespace, wanted: set[str], grad: Tensor
) -> dict[str, list[Tensor | None]]:
    found: list[Tensor | None] = []
    for place, matrix in enumerate(saved.matrices):
        if f"factors.{place}" not in wanted:
            found.append(None)
            continue
        inside = place == 0 and saved.order >= 0
        rest = [number for number in range(len(saved.factors)) if inside or number != place]
        found.append(
            sphere_form(
                [*(saved.factors[number] for number in rest), grad],
                [*(saved.matrices[number] for number in rest), saved.back.mT],
                matrix.mT,
                saved.order + 1 if inside else saved.order,
                saved.kernels,
            )
        )
    return {"factors": found}


@kernel(outputs=_fake_form, gradient=_form_gradient)
def sphere_form(
    factors: list[Tensor], matrices: list[Tensor], back: Tensor, order: int, kernels: str
) -> Tensor:
    """Return S_order of factors (n, rows of each, channels), (n, rows of B, channels).

    ``matrices`` are (n_points, rows of each) and ``back`` is (rows, n_points).
    """
    ...
