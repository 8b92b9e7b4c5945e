"""The Gaunt tensor product: two functions on the sphere are multiplied point by point.

The coefficients of f g are those of f and g coupled by Gaunt's integrals of three harmonics, so
this is a Clebsch-Gordan product whose path weights are fixed, at O(lmax^3) instead of O(lmax^6)
cost (Luo, Chen, Krishnapriyan, 2024, arXiv:2401.10216). What it can not express:

* f g = g f, so antisymmetric couplings such as the cross product 1 x 1 -> 1 are absent, and with
  them every path of odd l1 + l2 + l3;
* each path has its one weight, the Gaunt coefficient: weights per path do not exist, only products
  of weights per degree (:class:`atomeq.nn.gaunt.GauntProduct`).
"""

import math
from types import SimpleNamespace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from atomeq.ops.dispatch import operation, size_of
from atomeq.ops.harmonics.polynomials import harmonic_polynomials
from atomeq.ops.registration import registered
from atomeq.ops.self_check import Example, random
from atomeq.ops.specification import Size
from atomeq.ops.sphere.operations import sphere_form
from atomeq.ops.tables import constant_table, table_like


def _verified(x: Tensor, y: Tensor, lmax: int) -> Size:
    lmax1, lmax2 = _degree(x), _degree(y)
    if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"x is {tuple(x.shape)} and y {tuple(y.shape)}; all axes but the rows must be equal"
        )
    if not 0 <= lmax <= lmax1 + lmax2:
        raise ValueError(
            f"lmax is {lmax}; the product of degrees {lmax1} and {lmax2} has 0 to {lmax1 + lmax2}"
        )
    highest = max(lmax1, lmax2, lmax)
    n, channels = math.prod(x.shape[:-2]), x.shape[-1]
    return size_of(x, n, lmax=highest, mmax=highest, channels=channels)


def _by_kernels(x: Tensor, y: Tensor, lmax: int, kernels: str) -> Tensor:
    left, right, out = _tables(x, y, lmax)
    flat = [factor.reshape(-1, *factor.shape[-2:]) for factor in (x, y)]
    product = sphere_form(flat, [left, right], out.mT, -1, kernels)
    return product.reshape(*x.shape[:-2], *product.shape[1:])


def _example(size: Size) -> Example:
    """Return two functions of the same degree."""
    x, y = (random(size, 5, (size.lmax + 1) ** 2, size.channels) for _ in range(2))
    return [x, y], lambda operation, x, y: operation(x, y, size.lmax)


@operation(_verified, by_kernels=_by_kernels, example=_example)
def gaunt_product(
    x: Float[Tensor, "*batch n1 channels"],
    y: Float[Tensor, "*batch n2 channels"],
    lmax: int,
) -> Float[Tensor, "*batch n_sph channels"]:
    """Multiply the functions on the sphere that x and y are the coefficients of.

    Coefficients belong to orthonormal harmonics. The grid integrates every product of degrees
    exactly, so the result is equivariant to rounding, reflections included. For the derivatives
    nothing is kept but x and y; they are of the same form, to any order.

    Args:
        x: Coefficients of degrees 0 to lmax1, (*, (lmax1 + 1)^2, channels).
        y: Coefficients of degrees 0 to lmax2, (*, (lmax2 + 1)^2, channels).
        lmax: Highest degree of the result; lmax1 + lmax2 keeps all of it.

    Returns:
        Coefficients of the product, (*, (lmax + 1)^2, channels).

    Raises:
        ValueError: If the rows are no whole degrees, the other axes differ, or lmax is out of
            range.
    """
    return pointwise_product(x, y, *_tables(x, y, lmax))


def _tables(x: Tensor, y: Tensor, lmax: int) -> list[Tensor]:
    """Return the values of harmonics on the grid for x, y and the product."""
    lmax1, lmax2 = _degree(x), _degree(y)
    exact = lmax1 + lmax2 + lmax
    return [table_like(grid_values, l, exact, like=x) for l in (lmax1, lmax2, lmax)]


@constant_table
def grid_values(lmax: int, exact: int) -> Tensor:
    """Return orthonormal harmonics times sqrt[3](weight) on a grid, (n_points, n_sph).

    Three of them multiply to the integrand of a Gaunt coefficient with its weight. The grid, Gauss
    and Legendre's heights y by equal azimuths, integrates polynomials up to degree ``exact``.
    """
    heights, weights = np.polynomial.legendre.leggauss(exact // 2 + 1)
    n_azimuths = exact + 1
    angles = 2 * math.pi * np.arange(n_azimuths) / n_azimuths
    radius = np.sqrt(1 - heights**2)
    points = np.stack(
        (
            np.outer(radius, np.sin(angles)),
            np.repeat(heights[:, None], n_azimuths, axis=1),
            np.outer(radius, np.cos(angles)),
        ),
        axis=-1,
    )
    harmonics = harmonic_polynomials(torch.from_numpy(points.reshape(-1, 3)), lmax, "integral")
    solid_angles = np.repeat(weights * 2 * math.pi / n_azimuths, n_azimuths)
    return harmonics * torch.from_numpy(np.cbrt(solid_angles))[:, None]


def _degree(x: Tensor) -> int:
    lmax = math.isqrt(x.shape[-2]) - 1 if x.ndim >= 2 else -1
    if lmax < 0 or x.shape[-2] != (lmax + 1) ** 2:
        raise ValueError(
            f"features are {tuple(x.shape)}; the axis before the channels must hold whole degrees, "
            f"1, 4, 9, ... rows"
        )
    return lmax


def _like_product(call: SimpleNamespace) -> Tensor:
    x = call.x
    return x.new_empty(*x.shape[:-2], call.out.shape[1], x.shape[-1])


def _exchanged(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> dict[str, Tensor]:
    """Exchange the output for one of the factors: the form is symmetric in all three."""
    x, y, left, right, out = saved.x, saved.y, saved.left, saved.right, saved.out
    gradients = {}
    if "x" in wanted:
        gradients["x"] = pointwise_product(grad, y, out, right, left)
    if "y" in wanted:
        gradients["y"] = pointwise_product(grad, x, out, left, right)
    return gradients


@registered(outputs=_like_product, gradient=_exchanged)
def pointwise_product(x: Tensor, y: Tensor, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Return out^T ((left x) * (right y)), each table of size (n_points, its rows)."""
    return out.mT @ ((left @ x) * (right @ y))
