"""The Triton kernels of edges, by the names under which the registered operations call them."""

from collections.abc import Sequence

from torch import Tensor, float64

from atomeq.ops.edge.layer import EdgeLayer, Named, WayIn
from atomeq.ops.edge.so2_shape import SO2Shape
from atomeq.ops.edge.triton.gate import Gate
from atomeq.ops.edge.triton.rotation import gather_rotate, rotate_scatter, torque
from atomeq.ops.edge.triton.row_scale import (
    moved_scaled,
    row_products,
    scale_gradient_,
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
    """Give the gradients of <grad, s W G x> by one kernel after the other; grad may change."""
    if scale is not None and into.scale is None:
        grad = scaled_rows(grad, scale, shape, out=grad)
    elif scale is not None and into.scale is not None:
        rows = gather_rotate(x, wigner, indices).flatten(1)
        into.scale.copy_(scale_gradient_(rows, grad, scale, shape))
    rows = grad.unflatten(1, (shape.n_rows, -1))
    if into.x is not None:
        rotate_scatter(rows, wigner, indices, segments, len(x), total=into.x)
    if into.turn is not None:
        into.turn.copy_(torque(x, rows, wigner, indices))


def edges_at_once(first: SO2Shape) -> int:
    """Return how many edges a layer works on at a time: what fits, since a GPU wants all."""
    return max(1, _BYTES_AT_ONCE // (max(first.width, first.width_in) * float64.itemsize))


def layer_value(layer: EdgeLayer, *, keep: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return None: a layer goes block by block, and these are as large as memory allows."""


def layer_gradient(layer: EdgeLayer, grad: Tensor, inside: Named, found: Named) -> bool:
    """Return False: nothing is written, for the reason that :func:`layer_value` has."""
    return False


def layer_second(layer: EdgeLayer, grad: Tensor, inside: Named, along: Named, found: Named) -> bool:
    """Return False, as :func:`layer_gradient` does."""
    return False
