"""The C kernels of edges, by the names under which the registered operations call them.

A whole layer is one call of layer.c where that serves; the steps of others are the functions of the
modules beside this one, called block by block.
"""

from types import SimpleNamespace

from torch import Tensor

from atomeq.ops.c_compiler import c_library, refusal, threads_for
from atomeq.ops.edge import blockwise
from atomeq.ops.edge.along import gradient_along, rotate_along, scatter_along
from atomeq.ops.edge.cpu.memory import empty
from atomeq.ops.edge.cpu.rotation import (
    checked_atoms,
    gather_gradient,
    gather_rotate,
    generator_elements,
    leave_gradient,
    rotate_scatter,
    torque,
)
from atomeq.ops.edge.cpu.so2 import (
    Gate,
    SO2Map,
    add_weight_gradients,
    moved_scaled,
    row_products,
    scaled_rows,
)
from atomeq.ops.edge.cpu.wigner import vector_gradient, wigner_rows
from atomeq.ops.edge.escn_conv import EdgeLayer, Named, flat, grouped
from atomeq.ops.edge.so2_map import SO2Shape

__all__ = [
    "Gate",
    "SO2Map",
    "add_weight_gradients",
    "empty",
    "gather_gradient",
    "gather_rotate",
    "gradient_along",
    "leave_gradient",
    "moved_scaled",
    "refusal",
    "rotate_along",
    "rotate_scatter",
    "row_products",
    "scaled_rows",
    "scatter_along",
    "torque",
    "vector_gradient",
    "wigner_rows",
]

_LAYER_BLOCK = 2**18  # numbers of the widest rows of an edge layer
_LEAST_EDGES, _MOST_EDGES = 400, 1024  # of a block; matrix products want some rows
_LAYER_EDGES_PER_THREAD = 500
# Some dozens of edges go through all steps before they leave the cache. 24 are as fast in small
# layers, and a tenth slower in large ones.
_EDGES_AT_ONCE = 64
_MOST_INPUTS = 768  # of order 0: products of larger matrices outgrow the cache, and so2.c cuts them
_MOVED = {"x", "vectors", "radial", "envelope"}


def escn_conv(call: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums on the atoms, y and u, in one call of C where that serves."""
    layer = EdgeLayer(call)
    if not _whole_layer_serves(layer):
        return blockwise.value(call)
    x, (first, second) = layer.tensors["x"], layer.shapes
    total = x.new_zeros(x.shape[0], x.shape[1], second.c_out)
    y, u = layer.kept(call.n_kept, first.width, second.width)
    inside = {"total": total} | dict(zip(("y", "u")[: call.n_kept], (y, u), strict=False))
    _call_layer(layer, "layer_value", inside)
    return total, y, u


def escn_conv_gradient(call: SimpleNamespace) -> list[Tensor]:
    """Return the wanted gradients, dE/da and dE/dz."""
    layer = EdgeLayer(call)
    if not _whole_layer_serves(layer):
        return blockwise.gradient(call)
    first, second = layer.shapes
    found = layer.gradients(call.wanted)
    ga, gz = layer.kept(call.n_kept, second.width_in, first.width_in)
    inside = {"grad": call.grad} | ({"ga": ga, "gz": gz} if call.n_kept else {})
    inside |= zip(("y", "u"), call.kept, strict=False)  # or nothing
    inside |= zip(("also_y", "also_u"), call.also, strict=False)
    _call_layer(layer, "layer_gradient", inside, found)
    return [*flat(call.wanted, found), ga, gz]


def escn_conv_second_gradient(call: SimpleNamespace) -> list[Tensor]:
    """Return the gradients of the gradient; along weights, as no force has it, blockwise."""
    layer = EdgeLayer(call)
    along = grouped(call.along, call.directions)
    if not _whole_layer_serves(layer) or not along.keys() <= _MOVED:
        return blockwise.second_gradient(call)
    found, inside = blockwise.second_gradients(call, layer)
    moved = {f"moved_{name}": tensor for name, tensor in along.items()}
    _call_layer(layer, "layer_second", inside | moved | {"grad": call.grad}, found)
    return flat(call.wanted, found)


def _whole_layer_serves(layer: EdgeLayer) -> bool:
    """Say whether layer.c gains by it, and knows what there is: no chiral weights, no biases."""
    if layer.tensors.keys() & {"first_bias", "second_bias"}:
        return False
    weights = [*layer.weights["first"], *layer.weights["second"]]
    return all([w.ndim == 2 for w in weights]) and weights[0].shape[1] <= _MOST_INPUTS


def _call_layer(layer: EdgeLayer, name: str, given: Named, found: Named | None = None) -> None:
    """Call a function of layer.c; the names of what it is given are those of layer_t."""
    x, (first, second) = layer.tensors["x"], layer.shapes
    library = c_library("edge/cpu/layer.c", x.dtype, LMAX=first.lmax, MMAX=first.mmax)
    tensors = layer.tensors | layer.weights | given
    tensors |= {f"to_{key}": result for key, result in (found or {}).items()}
    tensors |= zip(
        ("generator", "place", "count"), generator_elements(x.dtype, x.shape[1]), strict=True
    )
    for end in ("source", "target"):
        tensors[end] = checked_atoms(tensors[end], x)
    arguments = library.layer_t(
        n_edges=layer.n_edges,
        n_atoms=x.shape[0],
        channels=x.shape[2],
        hidden=first.c_out,
        c_out=second.c_out,
        n_radial=tensors["radial"].shape[1] if "radial" in tensors else 0,
        at_once=_EDGES_AT_ONCE,
        n_parts=threads_for(layer.n_edges, _LAYER_EDGES_PER_THREAD),
        **tensors,
    )
    if not getattr(library, name)(arguments):
        raise MemoryError(f"no memory for the blocks of {layer.n_edges} edges")


def edges_at_once(first: SO2Shape) -> int:
    """Return how many edges keep a layer's rows in the cache."""
    return min(max(_LAYER_BLOCK // max(1, first.width_in), _LEAST_EDGES), _MOST_EDGES)
