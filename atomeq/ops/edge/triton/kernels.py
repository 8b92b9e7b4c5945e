"""The Triton kernels of edges, by the names under which the registered operations call them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atomeq.ops.edge.blockwise import WayIn
from atomeq.ops.edge.blockwise import gradient as escn_conv_gradient
from atomeq.ops.edge.blockwise import second_gradient as escn_conv_second_gradient
from atomeq.ops.edge.blockwise import value as escn_conv
from atomeq.ops.edge.so2_map import SO2Shape
from atomeq.ops.edge.triton.gate import Gate
from atomeq.ops.edge.triton.rotation import gather_rotate, rotate_scatter, torque
from atomeq.ops.edge.triton.row_scale import (
    moved_scaled,
    row_products,
    scale_gradient,
    scaled_rows,
    scaled_second,
)
from atomeq.ops.edge.triton.so2 import SO2Map, add_weight_gradients
from atomeq.ops.specification import OpSpec
from atomeq.ops.triton_launch import refusal as launch_refusal

__all__ = [
    "Gate",
    "SO2Map",
    "add_weight_gradients",
    "escn_conv",
    "escn_conv_gradient",
    "escn_conv_second_gradient",
    "moved_scaled",
    "row_products",
    "scaled_rows",
    "scaled_second",
]


_BYTES_AT_ONCE = 2**31  # of the widest tensor of a layer while it works on some of the edges


def refusal(spec: OpSpec) -> str | None:
    """Return None if these kernels serve the call, else the reason why not."""
    return None if by_torch(spec) else launch_refusal(spec)


def by_torch(spec: OpSpec) -> bool:
    """Whether it is made once for all layers, a few hundredths of the time of one."""
    return spec.op == "edge_wigner"


def empty(size: tuple[int, ...], like: Tensor) -> Tensor:
    """Return memory; torch keeps what is freed on a GPU."""
    return like.new_empty(size)


def leave_gradient(
    x: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    rows: Tensor | None,
    factor: Tensor | None,
    to_factor: Tensor | None,
    turn: Tensor | None,
) -> Tensor:
    """Return f W G x, (n_edges, n_rows, channels), where <f W G x, rows> is differentiated.

    The gradient of f is written, and a turn of each edge is lessened by the torque; None is not
    wanted, and of neither are there rows.
    """
    found = gather_rotate(x, wigner, indices)
    if rows is not None and to_factor is not None:
        torch.linalg.vecdot(found.flatten(1), rows.flatten(1), out=to_factor)
    if rows is not None and turn is not None:
        own = torque(x, rows, wigner, indices)
        turn -= own if factor is None else own * factor[:, None]
    return found if factor is None else found.mul_(factor[:, None, None])


def gather_gradient(
    x: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    segments: Sequence[Tensor],
    grad: Tensor,
    scale: Tensor | None,
    shape: SO2Shape,
    into: WayIn,
) -> None:
    """Give the gradients of <grad, s W G x>, for grad (n_edges, n_rows * c_in)."""
    if scale is not None and into.scale is None:
        grad = scaled_rows(grad, scale, shape)
    elif scale is not None and into.scale is not None:
        rows = gather_rotate(x, wigner, indices).flatten(1)
        grad = scale_gradient(rows, grad, scale, shape, into.scale)
    rows = grad.unflatten(1, (shape.n_rows, -1))
    if into.x is not None:
        rotate_scatter(rows, wigner, indices, segments, len(x), total=into.x)
    if into.turn is not None:
        into.turn.sub_(torque(x, rows, wigner, indices))


def edges_at_once(first: SO2Shape) -> int:
    """Return how many edges a layer works on at a time: what fits, since a GPU wants all."""
    return max(1, _BYTES_AT_ONCE // (max(first.width, first.width_in) * torch.float64.itemsize))
