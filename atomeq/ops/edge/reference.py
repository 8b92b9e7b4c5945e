"""The operations on edges as one reads them: plain torch, differentiated by autograd.

The one thing that torch can not know is how a Wigner matrix turns with its edge.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from atomeq.ops.edge.frame import EdgeFrame, Side
from atomeq.ops.edge.rotation import turning_wigner
from atomeq.ops.edge.so2_map import SO2Shape
from atomeq.ops.orders import row_degrees
from atomeq.ops.tables import table_like


def rotate_to_edge(x: Tensor, frame: EdgeFrame, side: Side) -> Tensor:
    """Gather the atoms of a side, join the channels, rotate into the edge frames."""
    members = [x.index_select(0, index) for index in frame.ends(side)]
    return _wigner(frame) @ torch.cat(members, dim=2)


def rotate_from_edge(
    y: Tensor, frame: EdgeFrame, envelope: Tensor | None, *, total: bool
) -> Tensor:
    """Rotate back to the lab frame and, if total, sum on the targets."""
    lab = _wigner(frame).mT @ y
    if envelope is not None:
        lab = lab * envelope[:, None, None]
    if not total:
        return lab
    return lab.new_zeros(frame.n_atoms, *lab.shape[1:]).index_add(0, frame.target, lab)


def _wigner(frame: EdgeFrame) -> Tensor:
    """Return W, as a function of the edges if they have a gradient."""
    if not frame.vectors.requires_grad:
        return frame.wigner
    return turning_wigner(frame.vectors, frame.wigner)


def so2_map(
    x: Tensor,
    weights: Sequence[Tensor],
    shape: SO2Shape,
    bias: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Mix degrees and channels within each order by one matrix product per order."""
    c_in, c_out = shape.c_in, shape.c_out
    degrees = [shape.lmax - m + 1 for m in range(shape.mmax + 1)]
    sizes = [n * min(m + 1, 2) for m, n in enumerate(degrees)]
    # One split: its gradient is one concatenation, where slices would each fill a tensor.
    rows = [part.flatten(1) for part in x.split(sizes, dim=1)]
    if scale is not None:
        factors = scale.split([n * c_in for n in degrees], dim=1)
        rows = [_scaled(part, factor) for part, factor in zip(rows, factors, strict=True)]
    mixed = [torch.nn.functional.linear(rows[0], weights[0], bias)]
    mixed += [_mix_pair(pair, w) for pair, w in zip(rows[1:], weights[1:], strict=True)]
    scalars, mixed[0] = mixed[0].split([shape.n_scalars, sizes[0] * c_out], dim=1)
    return torch.cat(mixed, dim=1).unflatten(1, (sum(sizes), c_out)), scalars


def gated(rows: Tensor, gates: Tensor, lmax: int, mmax: int) -> Tensor:
    """Return SiLU of l = 0 and, by gates (n_edges, lmax * channels), gated rows of l > 0."""
    scalars, higher = rows.split([1, rows.shape[1] - 1], dim=1)
    if lmax:
        degrees = table_like(row_degrees, lmax, mmax, like=rows)[1:]
        factors = torch.sigmoid(gates.unflatten(1, (lmax, rows.shape[2])))
        higher = higher * factors.index_select(1, degrees - 1)
    return torch.cat((torch.nn.functional.silu(scalars), higher), dim=1)


def _scaled(rows: Tensor, factor: Tensor) -> Tensor:
    """Multiply +m and -m, side by side in a row, by the same factors."""
    return (rows.unflatten(1, (-1, factor.shape[1])) * factor.unsqueeze(1)).flatten(1)


def _mix_pair(pair: Tensor, weight: Tensor) -> Tensor:
    """Multiply +m and -m, side by side in a row, by a real or by a complex matrix."""
    if weight.ndim == 2:
        return (pair.unflatten(1, (2, -1)) @ weight.T).flatten(1)
    real, imaginary = weight.unbind(0)
    # [[W_1, -W_2], [W_2, W_1]]: one matrix product instead of four and two sums
    matrix = torch.cat(
        (torch.cat((real, -imaginary), dim=1), torch.cat((imaginary, real), dim=1)), dim=0
    )
    return pair @ matrix.T
