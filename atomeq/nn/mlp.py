"""The multilayer perceptron of radial networks and readouts."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Sequential):
    """Linear layers with SiLU between them.

    Args:
        channels: Width of input, hidden layers and output, e.g. ``(8, 64, 64, 1)``.
        bias: Whether the linear layers have biases.
        final_activation: Apply SiLU to the output too.
        layer_norm: Normalise every hidden layer before its activation.
        zero_output: Start the last layer at zero: an untrained readout adds nothing to its
            reference, which training then has not to unlearn.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        bias: bool = True,
        final_activation: bool = False,
        layer_norm: bool = False,
        zero_output: bool = False,
    ) -> None:
        layers: list[nn.Module] = []
        for index, (n_in, n_out) in enumerate(pairwise(channels)):
            linear = nn.Linear(n_in, n_out, bias=bias)
            layers.append(linear)
            hidden = index < len(channels) - 2
            if zero_output and not hidden:
                for parameter in linear.parameters():
                    nn.init.zeros_(parameter)
            if hidden and layer_norm:
                layers.append(nn.LayerNorm(n_out))
            if hidden or final_activation:
                layers.append(nn.SiLU())
        super().__init__(*layers)
        self._last_linear = max(i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear))

    def with_hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, and what the last linear layer is given."""
        y = hidden = self.hidden(x)
        for layer in list(self)[self._last_linear :]:
            y = layer(y)
        return y, hidden

    def hidden(self, x: Tensor) -> Tensor:
        """Return what the last linear layer is given."""
        for layer in list(self)[: self._last_linear]:
            x = layer(x)
        return x
