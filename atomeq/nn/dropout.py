"""What is dropped at random while a network learns; nothing is in evaluation mode."""

import torch
from torch import Tensor, nn


class GraphDropPath(nn.Module):
    """Leave out a residual branch, for a whole structure at a time.

    Args:
        probability: That a structure's branch is dropped.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor, batch: Tensor, n_graphs: int) -> Tensor:
        """Scale ``x`` (n_atoms, n_sph, channels) so that its mean stays."""
        if not self.training or self.probability == 0.0:
            return x
        kept = nn.functional.dropout(x.new_ones(n_graphs), self.probability)
        return x * kept[batch][:, None, None]


class EquivariantDropout(nn.Module):
    """Leave out channels of an atom, all their coefficients together.

    Args:
        probability: That a channel is dropped.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``x`` (n_atoms, n_sph, channels) so that its mean stays."""
        if not self.training or self.probability == 0.0:
            return x
        shape = (x.shape[0], 1, x.shape[2])
        return x * nn.functional.dropout(torch.ones(shape).to(x), self.probability)
