"""The whole eSCN edge layer in C: value, gradient and gradient of the gradient in one call each."""

import ctypes
import functools

import torch
from torch import Tensor

from atomeq.ops.c_compiler import BuildError, load, source_of
from atomeq.ops.edge.cpu.arguments import (
    address,
    addresses,
    generator_elements,
    numbers_of_atoms,
    source,
    threads_for,
)
from atomeq.ops.edge.layer import EdgeLayer, Named

_EDGES_PER_THREAD = 500  # fewer do not pay for a thread
# Some dozens of edges go through all steps before they leave the cache. 24 are as fast in small
# layers, and a tenth slower in large ones.
_EDGES_AT_ONCE = 64
_MOST_INPUTS = 768  # of order 0: products of larger matrices outgrow the cache, and so2.c cuts them
_MOVED = {"x", "vectors", "radial", "envelope"}


def layer_value(layer: EdgeLayer, *, keep: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the sums on the atoms, y and u in one call of C, or None where it does not serve."""
    if not _whole_layer_serves(layer):
        return None
    x = layer.tensors["x"]
    total = x.new_zeros(x.shape[0], x.shape[1], layer.shapes[1].c_out)
    n_kept, (_, width, _, width_out) = layer.n_edges if keep else 0, layer.widths
    y, u = x.new_empty(n_kept, width), x.new_empty(n_kept, width_out)
    _call_layer(layer, "layer_value", {"total": total} | ({"y": y, "u": u} if keep else {}), {})
    return total, y, u


def layer_gradient(layer: EdgeLayer, grad: Tensor, inside: Named, found: Named) -> bool:
    """Write dE/de of the inputs that are ``found``; False where this does not serve.

    Args:
        layer: The layer.
        grad: dE/d(out).
        inside: As layer.c names them: y, u, what E feels of them, and where dE/da and dE/dz go.
        found: As :func:`~atomeq.ops.edge.layer.empty_gradients` makes it.
    """
    if not _whole_layer_serves(layer):
        return False
    _call_layer(layer, "layer_gradient", inside | {"grad": grad}, found)
    return True


def layer_second(layer: EdgeLayer, grad: Tensor, inside: Named, along: Named, found: Named) -> bool:
    """Write the gradients of the gradient along inputs; False where this does not serve.

    It does not for directions of weights: training on forces has none.
    """
    if not _whole_layer_serves(layer) or not along.keys() <= _MOVED:
        return False
    moved = {f"moved_{name}": tensor for name, tensor in along.items()}
    _call_layer(layer, "layer_second", inside | moved | {"grad": grad}, found)
    return True


def _whole_layer_serves(layer: EdgeLayer) -> bool:
    """Say whether layer.c gains by it, and knows what there is: no chiral weights, no biases."""
    if layer.tensors.keys() & {"first_bias", "second_bias"}:
        return False
    weights = [*layer.weights["first"], *layer.weights["second"]]
    return all([w.ndim == 2 for w in weights]) and weights[0].shape[1] <= _MOST_INPUTS


def _call_layer(layer: EdgeLayer, name: str, given: Named, found: Named) -> None:
    x, (first, second) = layer.tensors["x"], layer.shapes
    library, kind = _layer_library(x.dtype, first.lmax, first.mmax)
    results = {f"to_{key}": tensor for key, tensor in found.items()}
    tensors = layer.tensors | given | {key: results[key] for key in results.keys() & set(_FIELDS)}
    tensors |= zip(_FIELDS[-3:], generator_elements(x.dtype, x.shape[1]), strict=True)
    for end in ("source", "target"):
        tensors[end] = numbers_of_atoms(tensors[end], x)
    weights = {key: [w.contiguous() for w in some] for key, some in layer.weights.items()}
    orders = range(first.mmax + 1)
    for key in layer.weights.keys() & found.keys():
        weights[f"to_{key}"] = [found[f"{key}.{m}"] for m in orders]
    arguments = kind(
        n_edges=layer.n_edges,
        n_atoms=x.shape[0],
        channels=x.shape[2],
        hidden=first.c_out,
        c_out=second.c_out,
        n_radial=tensors["radial"].shape[1] if "radial" in tensors else 0,
        at_once=_EDGES_AT_ONCE,
        n_parts=threads_for(layer.n_edges, _EDGES_PER_THREAD),
        **{key: addresses(some) for key, some in weights.items()},
        **{field: address(tensor) for field, tensor in tensors.items()},
    )
    if not getattr(library, name)(ctypes.byref(arguments)):
        raise MemoryError(f"no memory for the blocks of {layer.n_edges} edges")


_SIZES = (
    *("n_edges", "n_atoms", "channels", "hidden", "c_out", "n_radial"),
    *("at_once", "n_parts"),
)
_FIELDS = (
    *("x", "wigner", "source", "target", "radial", "radial_weight", "radial_bias", "envelope"),
    *("y", "u", "ga", "gz", "total", "grad", "also_y", "also_u"),
    *("moved_x", "moved_vectors", "moved_radial", "moved_envelope"),
    *("to_x", "to_vectors", "to_radial", "to_radial_weight", "to_radial_bias", "to_envelope"),
    *("to_grad", "to_y", "to_u", "generator", "place", "count"),
)
_OF_ORDERS = {"y": ("first", "second"), "generator": ("to_first", "to_second")}  # before these


@functools.cache
def _layer_library(dtype: torch.dtype, lmax: int, mmax: int) -> tuple[ctypes.CDLL, type]:
    """Return the kernel and the type of layer_t in layer.c, whose fields these are."""
    pointer = ctypes.c_void_p
    fields: list[tuple[str, type]] = [(name, ctypes.c_int64) for name in _SIZES]
    for name in _FIELDS:
        fields += [(own, pointer * (mmax + 1)) for own in _OF_ORDERS.get(name, ())]
        fields.append((name, pointer))
    kind = type("layer_t", (ctypes.Structure,), {"_fields_": fields})
    library = load(source("edge", dtype, lmax, mmax) + source_of("edge/cpu/layer.c", {}))
    names = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "layer_names")))
    known = names.decode().split()
    places = list((ctypes.c_int64 * (len(known) + 1)).in_dll(library, "layer_places"))
    own = [getattr(kind, name).offset for name, _ in fields]
    if known != [name for name, _ in fields] or places != [*own, ctypes.sizeof(kind)]:
        raise BuildError("layer_t in layer.c is not what this module writes; see _SIZES, _FIELDS")
    return library, kind
