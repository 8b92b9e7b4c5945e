"""Normalisations that commute with rotations; they act on one atom at a time, never on a batch."""

import torch
from torch import Tensor, nn


class EquivariantRMSNorm(nn.Module):
    """Divide all coefficients of an atom by one rotation-invariant root mean square.

    The degrees share the scale, each weighted so that it counts alike however many m it has; the
    channel mean of l = 0 is removed first (``rms_norm_sh`` in the code of EquiformerV2,
    Liao et al., arXiv:2306.12059).

    Args:
        lmax: Highest degree of the features.
        channels: Channels of the features.
        epsilon: Keeps atoms without features finite.
    """

    degree_of_row: Tensor

    def __init__(self, lmax: int, channels: int, *, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(lmax + 1, channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        degrees = torch.arange(lmax + 1).repeat_interleave(2 * torch.arange(lmax + 1) + 1)
        self.register_buffer("degree_of_row", degrees, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (n_atoms, n_sph, channels); returns the same shape."""
        scalars, higher = x.split([1, x.shape[1] - 1], dim=1)
        scalars = scalars - scalars.mean(dim=2, keepdim=True)
        x = torch.cat([scalars, higher], dim=1)
        rows_of_degree = (2 * self.degree_of_row + 1).to(x.dtype)
        mean_square = ((x * x).mean(dim=2) / rows_of_degree).sum(dim=1) / len(self.weight)
        scale = torch.rsqrt(mean_square + self.epsilon)[:, None, None]
        bias = nn.functional.pad(self.bias[None], (0, 0, 0, x.shape[1] - 1))
        return x * scale * self.weight[self.degree_of_row] + bias
