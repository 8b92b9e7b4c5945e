"""Normalisations that commute with rotations; they act on one atom at a time, never on a batch.

Those of EquiformerV2 (Liao et al., arXiv:2306.12059) and V3, told apart by what shares one scale:
each degree has its own, all degrees but l = 0 share one, or all degrees do.
"""

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from atomeq.ops.atoms.operations import rms_norm

NormName = Literal["layer_norm", "layer_norm_sh", "rms_norm_sh", "bare_rms_norm_sh"]


def equivariant_norm(name: NormName, lmax: int, channels: int) -> nn.Module:
    """Build a normalisation by the name it has in EquiformerV2's configuration files.

    Raises:
        ValueError: The name is unknown.
    """
    norms = {
        "layer_norm": EquivariantLayerNorm,
        "layer_norm_sh": SeparableLayerNorm,
        "rms_norm_sh": EquivariantRMSNorm,
        "bare_rms_norm_sh": partial(EquivariantRMSNorm, bare=True),
    }
    if name not in norms:
        raise ValueError(f"norm {name!r} is unknown; choose one of {', '.join(norms)}")
    return norms[name](lmax, channels)


class EquivariantRMSNorm(nn.Module):
    """Divide all coefficients of an atom by one rotation-invariant root mean square.

    The degrees share the scale, each weighted so that it counts alike however many m it has; the
    channel mean of l = 0 is removed first (``rms_norm_sh`` in the code of EquiformerV2,
    Liao et al., arXiv:2306.12059).

    Args:
        lmax: Highest degree of the features.
        channels: Channels of the features.
        bare: Neither remove the mean nor add a bias.
        epsilon: Keeps atoms without features finite.
    """

    def __init__(
        self, lmax: int, channels: int, *, bare: bool = False, epsilon: float = 1e-5
    ) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(lmax + 1, channels))
        self.bias = None if bare else nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (n_atoms, n_sph, channels); returns the same shape."""
        return rms_norm(x, self.weight, self.bias, epsilon=self.epsilon)


class EquivariantLayerNorm(nn.Module):
    """Divide each degree by a root mean square of its own (``layer_norm``).

    Args:
        lmax: Highest degree of the features.
        channels: Channels of the features.
        epsilon: Keeps atoms without features finite.
    """

    def __init__(self, lmax: int, channels: int, *, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.lmax = lmax
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(lmax + 1, channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (n_atoms, n_sph, channels); returns the same shape."""
        degrees = list(x.split([2 * l + 1 for l in range(self.lmax + 1)], dim=1))
        degrees[0] = degrees[0] - degrees[0].mean(dim=2, keepdim=True)
        for l, degree in enumerate(degrees):
            mean_square = (degree * degree).mean(dim=(1, 2), keepdim=True)
            degrees[l] = degree * (torch.rsqrt(mean_square + self.epsilon) * self.weight[l])
        degrees[0] = degrees[0] + self.bias
        return torch.cat(degrees, dim=1)


class SeparableLayerNorm(nn.Module):
    """Layer normalisation of l = 0, and one scale that all l > 0 share (``layer_norm_sh``).

    Args:
        lmax: Highest degree of the features.
        channels: Channels of the features.
        epsilon: Keeps atoms without features finite.
    """

    degree_of_row: Tensor  # of the rows with l > 0, less one

    def __init__(self, lmax: int, channels: int, *, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.scalar_norm = nn.LayerNorm(channels, eps=epsilon)
        self.weight = nn.Parameter(torch.ones(lmax, channels))
        rows = range(1, (lmax + 1) ** 2)
        degrees = torch.tensor([math.isqrt(row) - 1 for row in rows], dtype=torch.int64)
        self.register_buffer("degree_of_row", degrees, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (n_atoms, n_sph, channels); returns the same shape."""
        scalars, higher = x.split([1, x.shape[1] - 1], dim=1)
        scalars = self.scalar_norm(scalars)
        if not len(self.weight):
            return scalars
        rows_of_degree = (2 * self.degree_of_row + 3).to(x.dtype)
        mean_square = ((higher * higher).mean(dim=2) / rows_of_degree).sum(dim=1)
        scale = torch.rsqrt(mean_square / len(self.weight) + self.epsilon)[:, None, None]
        return torch.cat([scalars, higher * scale * self.weight[self.degree_of_row]], dim=1)
