"""The eSCN edge layer in one call of C: value and gradient, but for the gradients of weights.

Block by block in Python (:mod:`atomeq.ops.edge.layer`) every step on some hundred edges
is a call, and its rows leave the cache before the next. In C some dozens of edges go through all
steps, with products of matrices that pack their weights once.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from atomeq.ops.c_compiler import BuildError, load, n_threads, source_of
from atomeq.ops.edge.cpu import native_edge
from atomeq.ops.edge.layer import EdgeLayer, Named, empty_gradients

_EDGES_AT_ONCE = 64  # 24 are as fast in small layers, and a tenth slower in large ones
# Of the first map, order 0. Products of larger matrices outgrow the cache, and so2.c cuts them up.
_MOST_INPUTS = 768
_EDGES_PER_THREAD = 500  # fewer do not pay for a thread
_RESULTS = {"x": "to_x", "vectors": "to_turn", "envelope": "to_envelope", "radial": "to_radial"}


class WholeLayer:
    """See :class:`~atomeq.ops.edge.kernel_sets.LayerKernel`."""

    def __init__(self, layer: EdgeLayer) -> None:
        self.layer = layer

    @staticmethod
    def serves(layer: EdgeLayer) -> bool:
        """Say whether the kernel knows the layer's dtype and weights, and gains by them.

        Chiral weights it does not know.
        """
        weights = [*layer.weights[0], *layer.weights[1]]
        known = native_edge.serves(layer.tensors["x"]) and all(w.ndim == 2 for w in weights)
        return known and weights[0].shape[1] <= _MOST_INPUTS

    def value(self, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums on the atoms, and y and u if they are to be kept."""
        layer, x = self.layer, self.layer.tensors["x"]
        total = x.new_zeros(x.shape[0], x.shape[1], layer.second.c_out)
        n_kept = layer.n_edges if keep else 0
        y, u = (x.new_empty(n_kept, shape.width) for shape in (layer.first, layer.second))
        given = {"total": total} | ({"y": y, "u": u} if keep else {})
        self._call("layer_value", given)
        return total, y, u

    def gradient(self, grad: Tensor, kept: list[Tensor], wanted: set[str]) -> Named | None:
        """Return dE/de of the wanted inputs, or None if gradients of weights are among them."""
        if not wanted <= _RESULTS.keys():
            return None
        found = empty_gradients(self.layer, wanted)
        given = {_RESULTS[name]: tensor for name, tensor in found.items()} | {"grad": grad}
        if len(kept[0]):
            given |= {"y": kept[0], "u": kept[1]}
        self._call("layer_gradient", given)
        return found

    def _call(self, name: str, given: Named) -> None:
        layer, x = self.layer, self.layer.tensors["x"]
        lmax, mmax = layer.first[:2]
        library, kind = _library(x.dtype, lmax, mmax)
        tensors = layer.tensors | given | native_edge.generator_tables(x, lmax)
        weights = [[w.contiguous() for w in some] for some in layer.weights]
        arguments = kind(
            n_edges=layer.n_edges,
            n_atoms=x.shape[0],
            channels=x.shape[2],
            hidden=layer.first.c_out,
            c_out=layer.second.c_out,
            n_radial=layer.tensors["radial"].shape[1] if "radial" in layer.tensors else 0,
            at_once=_EDGES_AT_ONCE,
            n_parts=max(1, min(n_threads(), layer.n_edges // _EDGES_PER_THREAD)),
            first=native_edge.pointers(weights[0]),
            second=native_edge.pointers(weights[1]),
            **{field: native_edge.pointer(tensors[field]) for field in _FIELDS if field in tensors}
            | {end: native_edge.index_pointer(tensors[end], x) for end in ("source", "target")},
        )
        if not getattr(library, name)(ctypes.byref(arguments)):
            raise MemoryError(f"no memory for the blocks of {layer.n_edges} edges")


_SIZES = (
    *("n_edges", "n_atoms", "channels", "hidden", "c_out", "n_radial"),
    *("at_once", "n_parts"),
)
_FIELDS = (
    *("x", "wigner", "source", "target", "radial", "radial_weight", "radial_bias", "envelope"),
    *("y", "u", "total", "grad", "to_x", "to_turn", "to_radial", "to_envelope"),
    *("generator", "place", "count"),
)


@cache
def _library(dtype: torch.dtype, lmax: int, mmax: int) -> tuple[ctypes.CDLL, type]:
    """Return the kernel and the type of layer_t in layer.c, whose fields these are."""
    pointer = ctypes.c_void_p
    weights = [(name, pointer * (mmax + 1)) for name in ("first", "second")]
    after = _FIELDS.index("y")
    fields = [(name, ctypes.c_int64) for name in _SIZES]
    fields += [(name, pointer) for name in _FIELDS[:after]] + weights
    fields += [(name, pointer) for name in _FIELDS[after:]]
    kind = type("layer_t", (ctypes.Structure,), {"_fields_": fields})
    library = load(native_edge.source(dtype, lmax, mmax) + source_of("edge/cpu/layer.c", {}))
    names = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "layer_names")))
    known = names.decode().split()
    places = list((ctypes.c_int64 * (len(known) + 1)).in_dll(library, "layer_places"))
    own = [getattr(kind, name).offset for name, _ in fields]
    if known != [name for name, _ in fields] or places != [*own, ctypes.sizeof(kind)]:
        raise BuildError("layer_t in layer.c is not what this module writes; see _SIZES, _FIELDS")
    return library, kind
