"""Nonlinearities on a grid on the sphere, as eSCN and EquiformerV2 publish them.

They are equivariant up to what the grid cannot resolve; :class:`atomeq.nn.so3.Gate` is exactly so.
The resolution of the grid is no part of the weights: a finer one may be set at any time.
"""

import torch
from torch import Tensor, nn

from atomeq.ops.sphere import SphereGrid, sphere_pointwise, sphere_silu
from atomeq.ops.sphere import Order as RowOrder


class SphereBlock(nn.Module):
    """What has a grid on the sphere.

    Args:
        lmax: Highest degree of the features.
        mmax: Highest order of the features.
        order: ``l`` for rows sorted by degree, ``m`` for those of an edge frame.
        grid_resolution: Polar angles and azimuths; None is the least that resolves the features.
    """

    def __init__(
        self, lmax: int, mmax: int, *, order: RowOrder = "l", grid_resolution: int | None = None
    ) -> None:
        super().__init__()
        self.lmax = lmax
        self.mmax = mmax
        self.order: RowOrder = order
        self.set_resolution(grid_resolution)

    def set_resolution(self, grid_resolution: int | None) -> None:
        """Exchange the grid for one with this many polar angles and azimuths."""
        self.grid = SphereGrid(
            self.lmax,
            self.mmax,
            n_beta=grid_resolution,
            n_alpha=grid_resolution,
            normalization="component",
            rescale=True,
            order=self.order,
        )


class SphereActivation(SphereBlock):
    """SiLU at every point of the sphere."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (n, n_rows, channels) to the same shape."""
        return sphere_silu(x, self.grid)


class GridMLP(SphereBlock):
    """A perceptron on the channels at every point of the sphere, alike, without biases.

    Args:
        lmax: Highest degree of the features.
        channels: Of the features and of the hidden layers.
        grid_resolution: See :class:`SphereBlock`.
    """

    def __init__(self, lmax: int, channels: int, *, grid_resolution: int | None = None) -> None:
        super().__init__(lmax, lmax, grid_resolution=grid_resolution)
        self.layers = nn.ModuleList(nn.Linear(channels, channels, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (n_atoms, n_sph, channels) to the same shape."""
        return sphere_pointwise(x, self._at_points, self.grid)

    def _at_points(self, values: Tensor) -> Tensor:
        for layer in self.layers[:2]:
            values = layer(values)
            values = nn.functional.silu(values, inplace=not values.requires_grad)
        return self.layers[2](values)


def with_scalars(x: Tensor, scalars: Tensor) -> Tensor:
    """Exchange the first row of ``x`` (n, n_rows, channels) for ``scalars`` (n, channels)."""
    return torch.cat([scalars.unsqueeze(1), x[:, 1:]], dim=1)
