"""The grid on the sphere and the matrices between its values and the coefficients.

It is that of Kostelec and Rockmore: equally spaced polar angles beta (from +y) and azimuths alpha,
with weights that integrate exactly what the grid resolves.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from atomeq.ops.harmonics.polynomials import harmonic_polynomials
from atomeq.ops.orders import coefficient_index, m_primary_order
from atomeq.ops.tables import constant_table, table_like

GridNormalization = Literal["integral", "component"]
Order = Literal["l", "m"]


@dataclass(frozen=True, slots=True)
class SphereGrid:
    """A grid on the sphere and the two matrices between it and the coefficients.

    Attributes:
        lmax: Highest degree.
        mmax: Highest order; coefficients with larger order are absent.
        n_beta: Polar angles, even; 2 (lmax + 1) when not given.
        n_alpha: Azimuths; 2 mmax + 1 when not given, and 2 more where mmax = lmax.
        normalization: ``integral`` (to the grid by orthonormal-on-the-sphere harmonics, eSCN) or
            ``component`` (unit variance of coefficients gives unit variance of values,
            EquiformerV2).
        rescale: Multiply both matrices by sqrt((2l + 1) / (2 mmax + 1)) for l > mmax, as
            EquiformerV2 does; the way there and back is then no identity.
        order: ``l`` for rows sorted by degree, ``m`` for the m-primary rows of an edge frame.
    """

    lmax: int
    mmax: int
    n_beta: int | None = None
    n_alpha: int | None = None
    normalization: GridNormalization = "integral"
    rescale: bool = False
    order: Order = "l"

    def __post_init__(self) -> None:
        coefficient_index(self.lmax, self.mmax)  # refuses orders above the degree
        if self.normalization not in get_args(GridNormalization) or self.order not in ("l", "m"):
            raise ValueError(
                f"normalization {self.normalization!r} or order {self.order!r} is unknown; choose "
                f"from {', '.join(get_args(GridNormalization))} and l, m"
            )
        n_beta, n_alpha = self.shape
        if n_beta % 2 or n_beta < 2 * (self.lmax + 1) or n_alpha < 2 * self.mmax + 1:
            raise ValueError(
                f"a grid of {n_beta} x {n_alpha} (beta x alpha) cannot resolve lmax={self.lmax}, "
                f"mmax={self.mmax}: n_beta must be even and at least {2 * (self.lmax + 1)}, "
                f"n_alpha at least {2 * self.mmax + 1}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Number of polar angles and of azimuths."""
        n_alpha = 2 * self.mmax + 1 + (2 if self.mmax == self.lmax else 0)
        return self.n_beta or 2 * (self.lmax + 1), self.n_alpha or n_alpha

    @property
    def n_points(self) -> int:
        """Number of points, beta slower than alpha."""
        return self.shape[0] * self.shape[1]

    def to_matrix(self, *, like: Tensor) -> Float[Tensor, "n_points n_rows"]:
        """Return the matrix from coefficients to values, in dtype and on device of ``like``."""
        return table_like(_to_grid, *self._sizes, like=like)

    def from_matrix(self, *, like: Tensor) -> Float[Tensor, "n_rows n_points"]:
        """Return the matrix from values to coefficients, in dtype and on device of ``like``."""
        return table_like(_from_grid, *self._sizes, like=like)

    @property
    def _sizes(self) -> tuple[int | str | None, ...]:
        """The fields: what a table is told by, in a trace too, which takes no object for a key."""
        grid = (self.lmax, self.mmax, self.n_beta, self.n_alpha)
        return (*grid, self.normalization, self.rescale, self.order)


@constant_table
def _to_grid(*sizes: Any) -> Tensor:
    grid = SphereGrid(*sizes)
    harmonics, degrees = _harmonics_on(grid)
    if grid.normalization == "component":
        degrees_scale = 1 / np.sqrt((2 * degrees + 1) * (grid.lmax + 1))
    else:
        degrees_scale = np.full(degrees.shape, 1 / math.sqrt(4 * math.pi))
    return torch.from_numpy(harmonics * degrees_scale * _rescaling(grid, degrees))


@constant_table
def _from_grid(*sizes: Any) -> Tensor:
    grid = SphereGrid(*sizes)
    harmonics, degrees = _harmonics_on(grid)
    if grid.normalization == "component":
        degrees_scale = np.sqrt((2 * degrees + 1) * (grid.lmax + 1))
    else:
        degrees_scale = np.full(degrees.shape, math.sqrt(4 * math.pi))
    n_beta, n_alpha = grid.shape
    weights = np.repeat(_polar_weights(n_beta) / n_alpha, n_alpha)
    matrix = harmonics * degrees_scale * _rescaling(grid, degrees) * weights[:, None]
    return torch.from_numpy(matrix.T.copy())


def _harmonics_on(grid: SphereGrid) -> tuple[np.ndarray, np.ndarray]:
    """Return 'component' harmonics on the points, (n_points, n_rows), and each row's degree."""
    n_beta, n_alpha = grid.shape
    beta = math.pi * (np.arange(n_beta) + 0.5) / n_beta
    alpha = 2 * math.pi * np.arange(n_alpha) / n_alpha
    points = np.stack(
        np.broadcast_arrays(
            np.sin(beta)[:, None] * np.sin(alpha),
            np.cos(beta)[:, None],
            np.sin(beta)[:, None] * np.cos(alpha),
        ),
        axis=-1,
    )
    order = coefficient_index if grid.order == "l" else m_primary_order
    rows = np.array(order(grid.lmax, grid.mmax))
    harmonics = harmonic_polynomials(torch.from_numpy(points.reshape(-1, 3)), grid.lmax).numpy()
    return harmonics[:, rows], np.sqrt(rows).astype(int)


def _rescaling(grid: SphereGrid, degrees: np.ndarray) -> np.ndarray:
    absent = degrees > grid.mmax if grid.rescale else np.zeros_like(degrees, dtype=bool)
    return np.where(absent, np.sqrt((2 * degrees + 1) / (2 * grid.mmax + 1)), 1.0)


def _polar_weights(n_beta: int) -> np.ndarray:
    """Return Kostelec and Rockmore's weights of the polar angles; they sum to 1."""
    half = n_beta // 2
    odd = 2 * np.arange(n_beta) + 1
    k = 2 * np.arange(half) + 1
    angles = odd * math.pi / (4 * half)
    series = (np.sin(np.outer(angles, k)) / k).sum(1)
    return np.sin(angles) * series * 2 / half / 2
