"""Nonlinearities of equivariant features: gates, functions on the sphere, products on the sphere.

The functions are those of EquiformerV2 (arXiv:2306.12059) and EquiformerV3 (arXiv:2604.09130).
"""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from atomeq.nn.so3 import Gate
from atomeq.nn.sphere import GridResolution, SphereBlock, with_scalars
from atomeq.ops.harmonics.polynomials import harmonic_polynomials
from atomeq.ops.orders import coefficient_index, m_primary_order
from atomeq.ops.sphere.gaunt import pointwise_product
from atomeq.ops.sphere.grid import GridNormalization
from atomeq.ops.sphere.grid import Order as RowOrder
from atomeq.ops.sphere.operations import sphere_silu
from atomeq.ops.tables import constant_table, table_like

ActivationName = Literal[
    "gate",
    "s2",
    "separable_s2",
    "s2_swiglu",
    "separable_s2_swiglu",
    "merged_s2_swiglu",
    "separable_s2_square",
    "product",
]


def swiglu(x: Tensor) -> Tensor:
    """Return SiLU of the first half of the channels times the second half."""
    first, second = x.chunk(2, dim=-1)
    return nn.functional.silu(first) * second


def product(x: Tensor) -> Tensor:
    """Return the first half of the channels times the second half."""
    first, second = x.chunk(2, dim=-1)
    return first * second


_Function = Callable[[Tensor], Tensor]
_SILU = nn.functional.silu
# The function at each point, that of the scalars beside it, and how these meet l = 0.
_POINTWISE: dict[str, tuple[_Function, _Function, Literal["none", "replace", "add"]]] = {
    "s2": (_SILU, _SILU, "none"),
    "separable_s2": (_SILU, _SILU, "replace"),
    "s2_swiglu": (swiglu, swiglu, "none"),
    "separable_s2_swiglu": (swiglu, swiglu, "replace"),
    "merged_s2_swiglu": (swiglu, swiglu, "add"),
    "separable_s2_square": (product, product, "replace"),
    "product": (product, swiglu, "add"),
}


#: Those that take two functions on the sphere and give one.
PAIRED = tuple(name for name, (function, *_) in _POINTWISE.items() if function is not _SILU)


def activation_of(
    name: ActivationName,
    lmax: int,
    mmax: int,
    channels: int,
    *,
    order: RowOrder = "l",
    normalization: GridNormalization = "component",
    grid_resolution: GridResolution = None,
) -> "Gate | ScalarsAndSphere":
    """Build a nonlinearity by its name; arguments as of :class:`ScalarsAndSphere`.

    Raises:
        ValueError: The name is unknown.
    """
    if name == "gate":
        rows = coefficient_index(lmax, mmax) if order == "l" else m_primary_order(lmax, mmax)
        return Gate(rows, channels)
    if name not in _POINTWISE:
        known = ", ".join(("gate", *_POINTWISE))
        raise ValueError(f"activation {name!r} is unknown; choose one of {known}")
    return ScalarsAndSphere(
        *(name, lmax, mmax, channels),
        order=order,
        normalization=normalization,
        grid_resolution=grid_resolution,
    )


class ScalarsAndSphere(SphereBlock):
    """A function of the channels at every point of the sphere, and one of scalars beside it.

    ``s2`` is SiLU; ``swiglu`` takes two functions on the sphere, SiLU of one times the other;
    ``square`` and ``product`` are the product of two without SiLU. The ``separable`` ones make
    l = 0 from scalars alone, the ``merged`` ones and ``product`` add that to it, and ``product``
    has a gate for each channel. A product of two functions has a known bandwidth: on the grid that
    it gets by default it is exact and commutes with every rotation to rounding, where SiLU does as
    far as the grid is fine.

    Args:
        name: Which one.
        lmax: Highest degree of the features.
        mmax: Highest order of the features.
        channels: Of the result.
        order: ``l`` for rows sorted by degree, ``m`` for those of an edge frame.
        normalization: See :class:`~atomeq.nn.sphere.SphereBlock`.
        grid_resolution: Likewise.

    Attributes:
        in_channels: Channels of what it is given.
        n_scalars: Number of scalars beside it.
    """

    def __init__(
        self,
        name: str,
        lmax: int,
        mmax: int,
        channels: int,
        *,
        order: RowOrder = "l",
        normalization: GridNormalization = "component",
        grid_resolution: GridResolution = None,
    ) -> None:
        self.function, self.of_scalars, self.meeting = _POINTWISE[name]
        super().__init__(
            lmax, mmax, order=order, normalization=normalization, grid_resolution=grid_resolution
        )
        factors = 1 if self.function is _SILU else 2
        self.gated = name == "product"
        self.in_channels = factors * channels
        self.sizes = (0 if self.meeting == "none" else factors * channels, channels * self.gated)
        self.n_scalars = sum(self.sizes)

    def set_resolution(self, grid_resolution: GridResolution) -> None:
        """Exchange the grid; without a resolution it is the least that is enough."""
        if grid_resolution is None and self.function is product:
            # the integral of three harmonics, 3 lmax in the polar angle, 3 mmax in the azimuth
            grid_resolution = (2 * (3 * self.lmax // 2 + 1), 3 * self.mmax + 1)
        super().set_resolution(grid_resolution)

    def forward(self, x: Tensor, scalars: Tensor | None) -> Tensor:
        """Map ``x`` (n, n_rows, in_channels) to (n, n_rows, channels).

        Args:
            x: Features.
            scalars: (n, n_scalars); None where there is none.
        """
        y = self.on_sphere(x)
        if scalars is None or not self.n_scalars:
            return y
        scalars, gates = scalars.split(self.sizes, dim=1)
        if self.gated:
            y = y * torch.sigmoid(gates).unsqueeze(1)
        return self.meet(y, self.of_scalars(scalars))

    def meet(self, y: Tensor, scalars: Tensor) -> Tensor:
        """Let scalars (n, channels) take the place of l = 0 of ``y``, or be added to it."""
        return with_scalars(y, scalars if self.meeting == "replace" else y[:, 0] + scalars)

    def on_sphere(self, x: Tensor) -> Tensor:
        """Apply the function at every point, (n, n_rows, in_channels) to (n, n_rows, channels)."""
        if self.function is _SILU:
            return sphere_silu(x, self.grid)
        if self.function is not product:
            to_grid, from_grid = self.grid.to_matrix(like=x), self.grid.from_matrix(like=x)
            return from_grid @ self.function(to_grid @ x)
        # of which nothing is kept but the coefficients
        to_grid, back = self._product_tables(like=x)
        return pointwise_product(*x.chunk(2, dim=-1), to_grid, to_grid, back)

    def _product_tables(self, *, like: Tensor) -> Tensor:
        """Return the way to a grid and, transposed, that back, (2, n_points, n_rows).

        Where the grid resolves a product, the integral of three functions, any other that does
        gives the same result: the least is Gauss and Legendre's.
        """
        n_beta, n_alpha = self.grid.shape
        if n_beta > 3 * self.lmax and n_alpha > 3 * self.mmax:
            kind = (self.lmax, self.mmax, self.normalization, self.rescale, self.order)
            return table_like(_gauss_legendre, *kind, like=like)
        return torch.stack((self.grid.to_matrix(like=like), self.grid.from_matrix(like=like).mT))


@constant_table
def _gauss_legendre(
    lmax: int, mmax: int, normalization: GridNormalization, rescale: bool, order: RowOrder
) -> Tensor:
    """Return the matrices of :class:`~atomeq.ops.sphere.grid.SphereGrid` on the least exact grid.

    Its heights integrate polynomials of degree 3 lmax, its azimuths orders up to 3 mmax.
    """
    heights, weights = np.polynomial.legendre.leggauss(3 * lmax // 2 + 1)
    azimuths = 2 * math.pi * np.arange(3 * mmax + 1) / (3 * mmax + 1)
    radii = np.sqrt(1 - heights**2)
    y = np.broadcast_to(heights[:, None], (len(heights), len(azimuths)))
    points = np.stack((np.outer(radii, np.sin(azimuths)), y, np.outer(radii, np.cos(azimuths))), -1)
    numbers = (coefficient_index if order == "l" else m_primary_order)(lmax, mmax)
    rows = torch.tensor(numbers)
    harmonics = harmonic_polynomials(torch.from_numpy(points.reshape(-1, 3)), lmax)[:, rows]
    degrees = torch.tensor([math.isqrt(number) for number in numbers], dtype=torch.float64)
    # of a coefficient's value on the sphere, as the grid has it
    scale = torch.full_like(degrees, (4 * math.pi) ** -0.5)
    if normalization == "component":
        scale = torch.rsqrt((2 * degrees + 1) * (lmax + 1))
    amplified = torch.sqrt((2 * degrees + 1) / (2 * mmax + 1)).clamp(min=1.0)
    amplified = amplified if rescale else torch.ones_like(scale)
    share = torch.from_numpy(np.repeat(weights / 2 / len(azimuths), len(azimuths)))[:, None]
    return torch.stack((harmonics * (scale * amplified), harmonics * (amplified / scale) * share))
