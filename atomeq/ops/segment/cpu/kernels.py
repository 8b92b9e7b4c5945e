"""Sums and softmax over segments by the C kernel."""

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from atomeq.ops.c_compiler import c_library, checked_index, refusal, threads_for

__all__ = ["refusal", "segment_total", "segment_weights"]

_NUMBERS_PER_THREAD = 2**16  # fewer do not pay for a thread


def segment_total(call: SimpleNamespace) -> Tensor:
    """Return the sums of the members of each segment, (n_segments, ...)."""
    totals = call.x.new_empty(call.n_segments, *call.x.shape[1:])
    _run("segment_total", call, totals)
    return totals


def segment_weights(call: SimpleNamespace) -> Tensor:
    """Return positive weights that sum to 1 in each segment, (n_members, ...)."""
    scratch = call.x.new_empty(2, call.n_segments, math.prod(call.x.shape[1:]))
    weights = torch.empty_like(call.x)
    _run("segment_softmax", call, weights, *scratch)
    return weights


def _run(name: str, call: SimpleNamespace, *results: Tensor) -> None:
    x, n_segments = call.x, call.n_segments
    index = checked_index(call.index, n_segments, "index names a segment")
    getattr(c_library("segment/cpu/segments.c", x.dtype), name)(
        *(x, index, len(x), math.prod(x.shape[1:]), n_segments, *results),
        threads_for(x.numel(), _NUMBERS_PER_THREAD),
    )
