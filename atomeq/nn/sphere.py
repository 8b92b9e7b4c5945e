"""Nonlinearities on a grid on the sphere, as eSCN and EquiformerV2 publish them.

They are equivariant up to what the grid cannot resolve; :class:`atomeq.nn.so3.Gate` is exactly so.
The resolution of the grid is no part of the weights: a finer one may be set at any time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from atomeq.ops.sphere.grid import GridNormalization, SphereGrid
from atomeq.ops.sphere.grid import Order as RowOrder
from atomeq.ops.sphere.operations import sphere_pointwise, sphere_silu

GridResolution = int | Sequence[int] | None


class SphereBlock(nn.Module):
    """What has a grid on the sphere.

    Args:
        lmax: Highest degree of the features.
        mmax: Highest order of the features.
        order: ``l`` for rows sorted by degree, ``m`` for those of an edge frame.
        normalization: ``component`` as in EquiformerV2, or ``integral`` as in eSCN and eSEN.
        rescale: Amplify degrees above mmax (:class:`~atomeq.ops.sphere.grid.SphereGrid`), as all
            but eSCN do.
        grid_resolution: Polar angles and azimuths, one number for both or two; None is the least
            that resolves the features.
    """

    def __init__(
        self,
        lmax: int,
        mmax: int,
        *,
        order: RowOrder = "l",
        normalization: GridNormalization = "component",
        rescale: bool = True,
        grid_resolution: GridResolution = None,
    ) -> None:
        super().__init__()
        self.lmax = lmax
        self.mmax = mmax
        self.order: RowOrder = order
        self.normalization: GridNormalization = normalization
        self.rescale = rescale
        self.set_resolution(grid_resolution)

    def set_resolution(self, grid_resolution: GridResolution) -> None:
        """Exchange the grid for one with this many polar angles and azimuths."""
        if grid_resolution is None or isinstance(grid_resolution, int):
            n_beta = n_alpha = grid_resolution
        else:
            n_beta, n_alpha = grid_resolution
        self.grid = SphereGrid(
            self.lmax,
            self.mmax,
            n_beta=n_beta,
            n_alpha=n_alpha,
            normalization=self.normalization,
            rescale=self.rescale,
            order=self.order,
        )


class SphereActivation(SphereBlock):
    """SiLU at every point of the sphere."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (n, n_rows, channels) to the same shape."""
        return sphere_silu(x, self.grid)


class GridMLP(SphereBlock):
    """A perceptron on the channels at every point of the sphere, alike, without biases.

    Linear maps of channels commute with the way to the grid and back, so the first and the last
    act on coefficients, of which there are fewer than points.

    Args:
        lmax: Highest degree of the features.
        channels: Of the features and of the hidden layers.
        normalization: See :class:`SphereBlock`.
        grid_resolution: Likewise.
    """

    def __init__(
        self,
        lmax: int,
        channels: int,
        *,
        normalization: GridNormalization = "component",
        grid_resolution: GridResolution = None,
    ) -> None:
        super().__init__(lmax, lmax, normalization=normalization, grid_resolution=grid_resolution)
        self.first = nn.Linear(channels, channels, bias=False)
        self.second = nn.Linear(channels, channels, bias=False)
        self.third = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (n_atoms, n_sph, channels) to the same shape."""
        return self.third(sphere_pointwise(self.first(x), self._at_points, self.grid))

    def _at_points(self, values: Tensor) -> Tensor:
        return point_silu(self.second(point_silu(values)))


def point_silu(values: Tensor) -> Tensor:
    """SiLU, in place where no gradient needs what was there."""
    return nn.functional.silu(values, inplace=not values.requires_grad)


def with_scalars(x: Tensor, scalars: Tensor) -> Tensor:
    """Exchange the first row of ``x`` (n, n_rows, channels) for ``scalars`` (n, channels)."""
    return torch.cat([scalars.unsqueeze(1), x[:, 1:]], dim=1)


def set_resolution(model: nn.Module, grid_resolution: int | None) -> None:
    """Let every block of a model that goes by a grid compute on another one.

    Args:
        model: The model.
        grid_resolution: Polar angles and azimuths, as in :class:`SphereBlock`.
    """
    for module in model.modules():
        if isinstance(module, SphereBlock):
            module.set_resolution(grid_resolution)
