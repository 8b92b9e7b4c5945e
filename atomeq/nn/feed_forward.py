"""The feed-forward network of EquiformerV2: linear maps per degree around a nonlinearity."""

from typing import Literal, get_args

from torch import Tensor, nn

from atomeq.nn.so3 import Gate, SO3Linear
from atomeq.nn.sphere import GridMLP, GridResolution, SphereActivation, with_scalars
from atomeq.ops.sphere.grid import GridNormalization

Nonlinearity = Literal["gate", "silu_gate", "s2", "separable_s2", "grid_mlp", "separable_grid_mlp"]


class FeedForward(nn.Module):
    """Update each atom by itself: linear map, nonlinearity, linear map.

    Args:
        lmax: Highest degree of the features.
        in_channels: Channels in.
        hidden_channels: Channels of the nonlinearity.
        out_channels: Channels out.
        nonlinearity: ``gate``; ``silu_gate``, whose gates pass SiLU before the sigmoid and so
            never close, as eSEN publishes them; ``s2``, SiLU on a grid on the sphere;
            ``grid_mlp``, a perceptron on the channels at every point of it. The ``separable`` ones
            make the scalars from scalars alone.
        normalization: Of values on the grid (:class:`~atomeq.nn.sphere.SphereBlock`).
        grid_resolution: Polar angles and azimuths of the grid.

    Raises:
        ValueError: The nonlinearity is unknown.
    """

    def __init__(
        self,
        lmax: int,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        *,
        nonlinearity: Nonlinearity = "gate",
        normalization: GridNormalization = "component",
        grid_resolution: GridResolution = None,
    ) -> None:
        super().__init__()
        if nonlinearity not in get_args(Nonlinearity):
            known = ", ".join(get_args(Nonlinearity))
            raise ValueError(f"nonlinearity {nonlinearity!r} is unknown; choose one of {known}")
        self.first = SO3Linear(lmax, in_channels, hidden_channels)
        self.separable = nonlinearity.startswith("separable")
        self.silu_gates = nonlinearity == "silu_gate"
        n_scalars = hidden_channels if self.separable else 0
        if nonlinearity.endswith("gate"):
            self.activation = Gate(range((lmax + 1) ** 2))
            n_scalars = lmax * hidden_channels
        elif nonlinearity.endswith("grid_mlp"):
            self.activation = GridMLP(
                *(lmax, hidden_channels),
                normalization=normalization,
                grid_resolution=grid_resolution,
            )
        else:
            self.activation = SphereActivation(
                lmax, lmax, normalization=normalization, grid_resolution=grid_resolution
            )
        self.scalars = nn.Linear(in_channels, n_scalars) if n_scalars else None
        self.second = SO3Linear(lmax, hidden_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (n_atoms, n_sph, in_channels) to (n_atoms, n_sph, out_channels)."""
        scalars = self.scalars(x[:, 0]) if self.scalars is not None else None
        if scalars is not None and self.silu_gates:
            scalars = nn.functional.silu(scalars)
        y = self.first(x)
        if isinstance(self.activation, Gate):
            return self.second(self.activation(y, scalars))
        y = self.activation(y)
        if scalars is not None:
            y = with_scalars(y, nn.functional.silu(scalars))
        return self.second(y)

    def invariants(self, x: Tensor) -> Tensor:
        """Return the l = 0 outputs, (n_atoms, out_channels), without what they do not depend on."""
        if self.separable and self.scalars is not None:
            hidden = nn.functional.silu(self.scalars(x[:, 0]))
            return nn.functional.linear(hidden, self.second.weight[0], self.second.bias)
        return self.forward(x)[:, 0]
