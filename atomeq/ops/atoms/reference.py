"""The operations of atoms in plain torch: the truth, and what is differentiated more than once."""

import math

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, silu

from atomeq.ops.tables import constant_table, table_like

Linear = tuple[Tensor, Tensor | None]  # weight and bias


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """Return what :func:`~atomeq.ops.atoms.operations.rms_norm` does."""
    if bias is not None:
        scalars, higher = x.split([1, x.shape[1] - 1], dim=1)
        scalars = scalars - scalars.mean(dim=2, keepdim=True)
        x = torch.cat([scalars, higher], dim=1)
    lmax = len(weight) - 1
    mean_square = ((x * x).mean(dim=2) / table_like(_orders, lmax, like=x)).sum(dim=1) / len(weight)
    scale = torch.rsqrt(mean_square + epsilon)[:, None, None]
    x = x * scale * weight.index_select(0, table_like(_degrees, lmax, like=weight))
    return x if bias is None else x + pad(bias[None], (0, 0, 0, x.shape[1] - 1))


@constant_table
def _degrees(lmax: int) -> Tensor:
    """Return the degree of each coefficient, (n_sph,)."""
    return torch.tensor([math.isqrt(row) for row in range((lmax + 1) ** 2)])


@constant_table
def _orders(lmax: int) -> Tensor:
    """Return how many orders the degree of each coefficient has, (n_sph,)."""
    return 2.0 * _degrees(lmax) + 1.0


def so3_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map channels by one matrix per degree.

    Args:
        x: (n_atoms, n_sph, in_channels).
        weight: (lmax + 1, out_channels, in_channels).
        bias: Added to l = 0, (out_channels,).

    Returns:
        (n_atoms, n_sph, out_channels).
    """
    # split, not slices: the backward of a slice fills a tensor of zeros, that of split is a cat
    degrees = x.split([2 * l + 1 for l in range(len(weight))], dim=1)
    blocks = [
        block @ matrix.transpose(0, 1)
        for block, matrix in zip(degrees, weight.unbind(0), strict=True)
    ]
    if bias is not None:
        blocks[0] = blocks[0] + bias
    return torch.cat(blocks, dim=1)


def gated_update(x: Tensor, first: Linear, gates: Linear, second: Linear) -> Tensor:
    """Return what :func:`~atomeq.ops.atoms.operations.gated_update` does."""
    rows = so3_linear(x, *first)
    scalars, *higher = rows.split([2 * l + 1 for l in range(len(first[0]))], dim=1)
    opened = torch.sigmoid(linear(x[:, 0], *gates)).unflatten(1, (len(first[0]) - 1, -1))
    gated = [part * gate[:, None] for part, gate in zip(higher, opened.unbind(1), strict=True)]
    return so3_linear(torch.cat([silu(scalars), *gated], dim=1), *second)
