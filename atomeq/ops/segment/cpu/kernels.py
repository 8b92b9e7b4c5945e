"""Sums and softmax over segments by the C kernel."""

import ctypes
import functools
import math

import torch
from torch import Tensor

from atomeq.ops.c_compiler import REALS, load, n_threads, refusal, source_of

__all__ = ["refusal", "segment_softmax", "segment_sum"]

_NUMBERS_PER_THREAD = 2**16  # fewer do not pay for a thread


def segment_sum(x: Tensor, index: Tensor, n_segments: int) -> Tensor:
    """Return the sums of the members of each segment, (n_segments, ...)."""
    library, x, index, size = _arguments(x, index, n_segments)
    totals = x.new_empty(n_segments, *x.shape[1:])
    library.segment_total(
        *(x.data_ptr(), index.data_ptr(), len(x), size, n_segments),
        *(totals.data_ptr(), _parts(x)),
    )
    return totals


def segment_softmax(x: Tensor, index: Tensor, n_segments: int) -> Tensor:
    """Return positive weights that sum to 1 in each segment, (n_members, ...)."""
    library, x, index, size = _arguments(x, index, n_segments)
    weights = torch.empty_like(x)
    scratch = x.new_empty(2, n_segments, size)
    library.segment_softmax(
        *(x.data_ptr(), index.data_ptr(), len(x), size, n_segments),
        *(weights.data_ptr(), scratch[0].data_ptr(), scratch[1].data_ptr(), _parts(x)),
    )
    return weights


def _arguments(
    x: Tensor, index: Tensor, n_segments: int
) -> tuple[ctypes.CDLL, Tensor, Tensor, int]:
    library = _library(x.dtype)
    x, index = x.contiguous(), index.to(torch.long).contiguous()
    if not library.segments_in_range(index.data_ptr(), len(index), n_segments):
        raise IndexError(f"index names a segment that is not among the {n_segments} given")
    return library, x, index, math.prod(x.shape[1:])


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    library = load(source_of("segment/cpu/segments.c", {"REAL": REALS[dtype]}))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    first = (pointer, pointer, size, size, size)
    library.segment_total.argtypes = (*first, pointer, ctypes.c_int)
    library.segment_softmax.argtypes = (*first, pointer, pointer, pointer, ctypes.c_int)
    library.segment_total.restype = library.segment_softmax.restype = None
    library.segments_in_range.argtypes = (pointer, size, size)
    return library


def _parts(x: Tensor) -> int:
    n = x.numel() // _NUMBERS_PER_THREAD
    return min(n_threads(), n) if n > 1 else 1
