"""Pointwise functions on the sphere: coefficients to grid values, a function, and back.

A function between the two steps is only as equivariant as the grid is fine: it raises the
bandwidth, and what lies above is aliased.
"""

import math
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from atomeq.ops.dispatch import Backend, select
from atomeq.ops.orders import coefficient_index
from atomeq.ops.sphere.grid import SphereGrid


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
    _check_rows(x, grid)
    return _backend("sphere_pointwise", x, grid).sphere_pointwise(x, fn, grid)


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
    _check_rows(x, grid)
    return _backend("sphere_silu", x, grid).sphere_silu(x, grid)


def _backend(op: str, x: Tensor, grid: SphereGrid) -> Backend:
    return select(
        op,
        lmax=grid.lmax,
        mmax=grid.mmax,
        channels=x.shape[-1],
        n_edges=math.prod(x.shape[:-2]),
        like=x,
    )


def _check_rows(x: Tensor, grid: SphereGrid) -> None:
    n_rows = len(coefficient_index(grid.lmax, grid.mmax))
    if x.shape[-2] != n_rows:
        raise ValueError(
            f"x is {tuple(x.shape)}; a grid of lmax={grid.lmax}, mmax={grid.mmax} has {n_rows} rows"
        )
