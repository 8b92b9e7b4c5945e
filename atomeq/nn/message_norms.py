"""Normalisations of summed messages: of one atom, or over the atoms of a segment (FAENet)."""

from typing import Literal

import torch
from torch import Tensor, nn

from atomeq.ops.segment.operations import segment_mean

#: Over which values; "graph" and "batch" are one module, told apart by the segments it is fed.
Normalisation = Literal["none", "atom", "graph", "batch"]


class AtomNorm(nn.LayerNorm):
    """LayerNorm of one atom; the large epsilon keeps an atom at the edge of a cutoff smooth."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-2)

    def forward(self, x: Tensor, segment: Tensor, n_segments: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Normalise ``x`` (n_atoms, C); segments play no part."""
        return super().forward(x)


class GraphNorm(nn.Module):
    """Mean and variance over the atoms of a segment (Cai et al., arXiv:2009.03294)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.mean_scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, segment: Tensor, n_segments: int) -> Tensor:
        """Normalise ``x`` (n_atoms, C) over each of its segments."""
        x = x - segment_mean(x, segment, n_segments)[segment] * self.mean_scale
        variance = segment_mean(x * x, segment, n_segments)[segment]
        return self.weight * x / torch.sqrt(variance + 1e-5) + self.bias


def message_norm(normalisation: Normalisation, channels: int) -> AtomNorm | GraphNorm | None:
    """Return the module of that name."""
    if normalisation == "none":
        return None
    return AtomNorm(channels) if normalisation == "atom" else GraphNorm(channels)
