"""Tables of functions of the edges' lengths, read by the C kernels."""

import ctypes
import functools

import torch
from torch import Tensor

from atomeq.ops.c_compiler import REALS, load, n_threads, refusal, source_of

__all__ = ["read", "read_gradient", "refusal"]

_NUMBERS_PER_THREAD = 2**14  # fewer do not pay for a thread


def read(
    vectors: Tensor,
    edge_index: Tensor,
    kinds: Tensor,
    polynomials: Tensor,
    step: float,
    widths: list[int],
) -> list[Tensor]:
    """Return the functions, a tensor (n_edges, width) for each width."""
    found = [vectors.new_empty(len(vectors), width) for width in widths]
    _call("read_tables", (vectors, edge_index, kinds, polynomials), step, found, None)
    return found


def read_gradient(
    vectors: Tensor,
    edge_index: Tensor,
    kinds: Tensor,
    polynomials: Tensor,
    step: float,
    grads: list[Tensor],
) -> Tensor:
    """Return the gradient by the vectors, (n_edges, 3)."""
    result = vectors.new_empty(len(vectors), 3)
    given = vectors, edge_index, kinds, polynomials
    _call("read_tables_gradient", given, step, [grad.contiguous() for grad in grads], result)
    return result


def _call(
    name: str,
    given: tuple[Tensor, Tensor, Tensor, Tensor],
    step: float,
    parts: list[Tensor],
    result: Tensor | None,
) -> None:
    vectors, ends, kinds, polynomials = (tensor.contiguous() for tensor in given)
    n_edges, n_parts = len(vectors), len(parts)
    n_kinds, n_intervals, _, width = polynomials.shape[1:]
    library = _library(vectors.dtype)
    if not library.pairs_in_range(
        ends.data_ptr(), ends.numel(), kinds.data_ptr(), len(kinds), n_kinds
    ):
        raise IndexError(f"an end of an edge is no atom, or a kind none of {n_kinds}")
    widths = (ctypes.c_int64 * n_parts)(*(part.shape[1] for part in parts))
    addresses = (ctypes.c_void_p * n_parts)(*(part.data_ptr() for part in parts))
    numbers = n_edges * width // _NUMBERS_PER_THREAD
    getattr(library, name)(
        *(vectors.data_ptr(), ends.data_ptr(), ends.data_ptr() + 8 * n_edges, kinds.data_ptr()),
        *(n_edges, polynomials.data_ptr(), n_kinds, n_intervals, width, step),
        *(widths, n_parts, addresses),
        *(() if result is None else (result.data_ptr(),)),
        max(1, min(n_threads(), numbers)),
    )


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    library = load(source_of("pairs/cpu/pairs.c", {"REAL": REALS[dtype]}))
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    first = (*[pointer] * 4, size, pointer, size, size, size, ctypes.c_double)
    library.read_tables.argtypes = (*first, pointer, number, pointer, number)
    library.read_tables_gradient.argtypes = (*first, pointer, number, pointer, pointer, number)
    library.read_tables.restype = library.read_tables_gradient.restype = None
    library.pairs_in_range.argtypes = (pointer, size, pointer, size, size)
    return library
