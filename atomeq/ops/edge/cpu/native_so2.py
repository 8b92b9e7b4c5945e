"""The C kernels of SO(2) maps, called on contiguous tensors."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from atomeq.ops.c_compiler import load, n_threads, source_of
from atomeq.ops.edge.cpu import memory
from atomeq.ops.edge.cpu.native_edge import pointer, pointers
from atomeq.ops.edge.so2_shape import SO2Shape
from atomeq.ops.harmonics.cpu.kernels import REALS

_EDGES_PER_THREAD = 48  # fewer do not pay for a thread


class PackedMap:
    """The weights of a map, or of its transpose, in the order in which the kernel reads them.

    Args:
        weights: One of each order.
        shape: Sizes of the map.
        transposed: Whether to multiply by M^T.
    """

    def __init__(self, weights: list[Tensor], shape: SO2Shape, *, transposed: bool) -> None:
        like = weights[0]
        self.library = _library(like.dtype, shape.lmax, shape.mmax)
        self.given = (_complex(weights), int(transposed))
        self.sizes = _sizes(shape)
        self.packed = memory.empty((self.library.packed_size(self.given[1], *self.sizes),), like)
        weights = [weight.contiguous() for weight in weights]
        self.library.pack_map(pointers(weights), *self.given, *self.sizes, pointer(self.packed))

    def multiply(self, rows: Tensor, out: Tensor) -> Tensor:
        """Write M rows, or M^T rows, to ``out``; return it."""
        self.library.map_rows(
            *(pointer(rows), pointer(self.packed), *self.given, *self.sizes, pointer(out)),
            *(len(rows), _threads(len(rows))),
        )
        return out


def add_weight_gradients(rows: Tensor, grad: Tensor, into: list[Tensor], shape: SO2Shape) -> None:
    """Add the gradients of <grad, M rows> with respect to the weights to ``into``."""
    library = _library(rows.dtype, shape.lmax, shape.mmax)
    panels = memory.empty((library.panels_size(shape.c_in),), rows)
    library.map_weights(
        *(pointer(rows), pointer(grad), _complex(into), *_sizes(shape), pointers(into)),
        *(pointer(panels), len(rows), _threads(len(rows))),
    )


@cache
def _library(dtype: torch.dtype, lmax: int, mmax: int) -> ctypes.CDLL:
    library = load(source_of("edge/cpu/so2.c", {"REAL": REALS[dtype], "LMAX": lmax, "MMAX": mmax}))
    address, size = ctypes.c_void_p, ctypes.c_int64
    sizes = (size, size, size)
    library.packed_size.argtypes = (size, *sizes)
    library.panels_size.argtypes = (size,)
    library.packed_size.restype = library.panels_size.restype = size
    library.pack_map.argtypes = (address, address, size, *sizes, address)
    library.map_rows.argtypes = (address, address, address, size, *sizes, address, size, size)
    library.map_weights.argtypes = (*[address] * 3, *sizes, address, address, size, size)
    library.pack_map.restype = library.map_rows.restype = library.map_weights.restype = None
    return library


def _complex(weights: list[Tensor]) -> ctypes.Array:
    return (ctypes.c_int64 * len(weights))(*(weight.ndim == 3 for weight in weights))


def _sizes(shape: SO2Shape) -> tuple[int, int, int]:
    return shape.c_in, shape.c_out, shape.n_scalars


def _threads(n_edges: int) -> int:
    return max(1, min(n_threads(), n_edges // _EDGES_PER_THREAD))
