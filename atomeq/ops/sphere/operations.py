"""Pointwise functions on the sphere: coefficients to grid values, a function, and back.

A function between the two steps is only as equivariant as the grid is fine: it raises the
bandwidth, and what lies above is aliased.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from atomeq.ops.blocks import blocks
from atomeq.ops.dispatch import operation
from atomeq.ops.orders import coefficient_index
from atomeq.ops.specification import Size, size_of
from atomeq.ops.sphere import examples, registered
from atomeq.ops.sphere.grid import SphereGrid
from atomeq.ops.sphere.silu import silu_on_grid


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


@operation(_verified, by_kernels=registered.sphere_silu, example=examples.features)
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
    return silu_on_grid(x, grid)
