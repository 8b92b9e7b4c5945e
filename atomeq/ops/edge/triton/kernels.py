"""The Triton kernels of edges, by the names under which the registered operations call them."""

import torch
from torch import Tensor

from atomeq.ops.edge.blockwise import gradient as escn_conv_gradient
from atomeq.ops.edge.blockwise import second_gradient as escn_conv_second_gradient
from atomeq.ops.edge.blockwise import value as escn_conv
from atomeq.ops.edge.so2_map import SO2Shape
from atomeq.ops.edge.triton.gate import Gate
from atomeq.ops.edge.triton.rotation import (
    gather_gradient,
    gather_rotate,
    gradient_along,
    leave_gradient,
    rotate_along,
    rotate_scatter,
    scatter_along,
    torque,
)
from atomeq.ops.edge.triton.row_scale import row_products, scaled_rows
from atomeq.ops.edge.triton.so2 import SO2Map, add_weight_gradients
from atomeq.ops.edge.triton.wigner import vector_gradient, wigner_rows
from atomeq.ops.precision import operand_dtype
from atomeq.ops.specification import OpSpec
from atomeq.ops.triton_launch import refusal as launch_refusal

__all__ = [
    "Gate",
    "SO2Map",
    "add_weight_gradients",
    "escn_conv",
    "escn_conv_gradient",
    "escn_conv_second_gradient",
    "gather_gradient",
    "gather_rotate",
    "gradient_along",
    "leave_gradient",
    "rotate_along",
    "rotate_scatter",
    "row_products",
    "scaled_rows",
    "scatter_along",
    "torque",
    "vector_gradient",
    "wigner_rows",
]


_BYTES_AT_ONCE = 2**31  # of the widest tensor of a layer while it works on some of the edges


def refusal(spec: OpSpec) -> str | None:
    """Return None if these kernels serve the call, else the reason why not."""
    return launch_refusal(spec, any_channels=spec.op == "edge_wigner")


def empty(size: tuple[int, ...], like: Tensor, *, passing: bool = False) -> Tensor:
    """Return memory; torch keeps what is freed on a GPU.

    What is only passing, from one kernel to the next, may have the precision of operands.
    """
    return like.new_empty(size, dtype=operand_dtype(like) if passing else like.dtype)


def edges_at_once(first: SO2Shape) -> int:
    """Return how many edges a layer works on at a time: what fits, since a GPU wants all."""
    return max(1, _BYTES_AT_ONCE // (max(first.width, first.width_in) * torch.float64.itemsize))
