"""The feed-forward network of EquiformerV2: linear maps per degree around a nonlinearity."""

from typing import Literal, get_args

from torch import Tensor, nn

from atomeq.nn.activations import ActivationName, ScalarsAndSphere, activation_of
from atomeq.nn.so3 import Gate, SO3Linear
from atomeq.nn.sphere import GridMLP, GridResolution, with_scalars
from atomeq.ops.atoms.operations import gated_update
from atomeq.ops.sphere.grid import GridNormalization

Nonlinearity = ActivationName | Literal["silu_gate", "grid_mlp", "separable_grid_mlp"]
_NAMES = [name for part in get_args(Nonlinearity) for name in get_args(part)]


class FeedForward(nn.Module):
    """Update each atom by itself: linear map, nonlinearity, linear map.

    Args:
        lmax: Highest degree of the features.
        in_channels: Channels in.
        hidden_channels: Channels of the nonlinearity.
        out_channels: Channels out.
        nonlinearity: ``gate``; ``silu_gate``, whose gates pass SiLU before the sigmoid and so
            never close, as eSEN publishes them; ``s2``, SiLU on a grid on the sphere, and the
            others of :class:`~atomeq.nn.activations.ScalarsAndSphere`; ``grid_mlp``, a perceptron
            on the channels at every point of it. The ``separable`` ones make the scalars from
            scalars alone.
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
        if nonlinearity not in _NAMES:
            known = ", ".join(_NAMES)
            raise ValueError(f"nonlinearity {nonlinearity!r} is unknown; choose one of {known}")
        self.silu_gates = nonlinearity == "silu_gate"
        width, n_scalars = hidden_channels, 0
        if nonlinearity == "grid_mlp" or nonlinearity == "separable_grid_mlp":
            self.activation = GridMLP(
                *(lmax, hidden_channels),
                normalization=normalization,
                grid_resolution=grid_resolution,
            )
            n_scalars = hidden_channels if nonlinearity == "separable_grid_mlp" else 0
        else:
            self.activation = activation_of(
                *("gate" if nonlinearity == "silu_gate" else nonlinearity, lmax, lmax),
                hidden_channels,
                normalization=normalization,
                grid_resolution=grid_resolution,
            )
            width, n_scalars = self.activation.in_channels, self.activation.n_scalars
        self.first = SO3Linear(lmax, in_channels, width)
        self.scalars = nn.Linear(in_channels, n_scalars) if n_scalars else None
        self.second = SO3Linear(lmax, hidden_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (n_atoms, n_sph, in_channels) to (n_atoms, n_sph, out_channels)."""
        if isinstance(self.activation, Gate) and self.scalars is not None and not self.silu_gates:
            gates = self.scalars.weight, self.scalars.bias
            return gated_update(x, self.first.parts, gates, self.second.parts)
        return self.second(self._hidden(x))

    def _hidden(self, x: Tensor) -> Tensor:
        scalars = self.scalars(x[:, 0]) if self.scalars is not None else None
        if scalars is not None and self.silu_gates:
            scalars = nn.functional.silu(scalars)
        y = self.first(x)
        if not isinstance(self.activation, GridMLP):
            return self.activation(y, scalars)
        y = self.activation(y)
        return y if scalars is None else with_scalars(y, nn.functional.silu(scalars))

    def invariants(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is invariant, without computing what it does not depend on.

        Returns:
            The l = 0 outputs, (n_atoms, out_channels), and what the last map makes them of,
            (n_atoms, hidden_channels).
        """
        hidden = self._separate_scalars(x)
        if hidden is None:
            hidden = self._hidden(x)[:, 0]
        return nn.functional.linear(hidden, self.second.weight[0], self.second.bias), hidden

    def _separate_scalars(self, x: Tensor) -> Tensor | None:
        """Return l = 0 in front of the second map where it is made from scalars alone."""
        if self.scalars is None:
            return None
        if isinstance(self.activation, GridMLP):
            return nn.functional.silu(self.scalars(x[:, 0]))
        if isinstance(self.activation, ScalarsAndSphere) and self.activation.meeting == "replace":
            return self.activation.of_scalars(self.scalars(x[:, 0]))
        return None
