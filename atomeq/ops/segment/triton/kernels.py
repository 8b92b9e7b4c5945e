"""Sums and softmax over segments: one program owns a segment, so nothing is added out of order.

Where segments are long, such as the atoms of a graph, the sorted members are cut at multiples of
``_PIECE``: programs of their own first sum the pieces that lie inside one segment, and the program
of a segment adds these to what is left at its ends. No number of a device is asked for, and the
order of a sum follows from the segments alone.
"""

import math
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomeq.ops.edge.frame import segments_of
from atomeq.ops.specification import OpSpec
from atomeq.ops.triton_launch import (
    accumulator,
    ceil_div,
    contiguous,
    launch,
    power_of_2,
)
from atomeq.ops.triton_launch import refusal as launch_refusal

_MEMBERS = 16  # of a segment at a time
_FEATURES = 64
_PIECE = 128  # members, a multiple of those at a time
_LONG = 64  # members of a segment on average, from which on pieces are summed first


def refusal(spec: OpSpec) -> str | None:
    """Return None if these kernels serve the call, else the reason why not."""
    return launch_refusal(spec, any_channels=True)


def segment_total(call: SimpleNamespace) -> Tensor:
    """Return the sums of the members of each segment in their order, (n_segments, ...)."""
    x, n_members = call.x, len(call.x)
    pieces = None
    if n_members >= max(2 * _PIECE, _LONG * call.n_segments):
        kept = torch.float64 if x.dtype == torch.float64 else torch.float32
        pieces = x.new_empty(n_members // _PIECE, *x.shape[1:], dtype=kept)
    result = x.new_empty(call.n_segments, *x.shape[1:])
    _launch(call, result, pieces)
    return result


def segment_weights(call: SimpleNamespace) -> Tensor:
    """Return positive weights that sum to 1 in each segment, (n_members, ...)."""
    result = torch.empty_like(call.x)
    _launch(call, result, None, softmax=True)
    return result


def _launch(
    call: SimpleNamespace, result: Tensor, pieces: Tensor | None, *, softmax: bool = False
) -> None:
    pointer, order = segments_of(call.index, call.n_segments)
    x, features = call.x, math.prod(call.x.shape[1:])
    block = min(_FEATURES, power_of_2(max(1, features)))
    n_blocks = ceil_div(features, block)
    sizes = {"FEATURES": features, "SUM": accumulator(x.dtype), "MEMBERS": _MEMBERS, "BLOCK": block}
    if softmax:
        launch(
            _segment_softmax,
            (call.n_segments, n_blocks),
            x,
            pointer,
            order,
            result,
            like=x,
            **sizes,
        )
        return
    if pieces is not None:
        index = contiguous(call.index)
        launch(
            _piece_sum,
            (len(pieces), n_blocks),
            x,
            index,
            order,
            pieces,
            like=x,
            PIECE=_PIECE,
            **sizes,
        )
    launch(
        _segment_sum,
        (call.n_segments, n_blocks),
        x,
        pointer,
        order,
        pieces,
        result,
        like=x,
        PIECE=_PIECE,
        **sizes,
    )


@triton.jit
def _members(begin, last, order, FEATURES: tl.constexpr, MEMBERS: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    """Return the offsets of some members of a segment, and which of them there are."""
    place = begin + tl.arange(0, MEMBERS)
    there = place < last
    member = tl.load(order + place, mask=there, other=0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = there[:, None] & (feature < FEATURES)[None, :]
    return (member * FEATURES)[:, None] + feature[None, :], inside


@triton.jit
def _sum_of_members(total, x, begin, last, order, FEATURES: tl.constexpr, SUM: tl.constexpr,
                    MEMBERS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    while begin < last:
        at, inside = _members(begin, last, order, FEATURES, MEMBERS, BLOCK)
        total += tl.load(x + at, mask=inside, other=0.0).to(SUM)
        begin += MEMBERS
    return total


@triton.jit
def _piece_sum(x, index, order, pieces, FEATURES: tl.constexpr, SUM: tl.constexpr,
               MEMBERS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr):  # fmt: skip
    """Sum a piece if it lies inside one segment; nobody reads the others."""
    piece = tl.program_id(0).to(tl.int64)
    begin = piece * PIECE
    ends = tl.load(order + begin), tl.load(order + begin + PIECE - 1)
    if tl.load(index + ends[0]) == tl.load(index + ends[1]):
        total = tl.zeros((MEMBERS, BLOCK), dtype=SUM)
        total = _sum_of_members(total, x, begin, begin + PIECE, order, FEATURES, SUM, MEMBERS,
                                BLOCK)  # fmt: skip
        feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        out = pieces + piece * FEATURES + feature
        tl.store(out, tl.sum(total, axis=0), mask=feature < FEATURES)


@triton.jit
def _segment_sum(x, pointer, order, pieces, result, FEATURES: tl.constexpr, SUM: tl.constexpr,
                 MEMBERS: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    begin, last = tl.load(pointer + segment), tl.load(pointer + segment + 1)
    total = tl.zeros((MEMBERS, BLOCK), dtype=SUM)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if pieces is not None:
        first, beyond = (begin + PIECE - 1) // PIECE, last // PIECE
        if first < beyond:  # before them, they, and what is behind them
            total = _sum_of_members(total, x, begin, first * PIECE, order, FEATURES, SUM, MEMBERS,
                                    BLOCK)  # fmt: skip
            piece = first
            while piece < beyond:
                number = piece + tl.arange(0, MEMBERS)
                inside = (number < beyond)[:, None] & (feature < FEATURES)[None, :]
                at = (number * FEATURES)[:, None] + feature[None, :]
                total += tl.load(pieces + at, mask=inside, other=0.0)
                piece += MEMBERS
            begin = beyond * PIECE
    total = _sum_of_members(total, x, begin, last, order, FEATURES, SUM, MEMBERS, BLOCK)
    out = result + segment * FEATURES + feature
    tl.store(out, tl.sum(total, axis=0), mask=feature < FEATURES)


@triton.jit
def _segment_softmax(x, pointer, order, result, FEATURES: tl.constexpr, SUM: tl.constexpr,
                     MEMBERS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    first, last = tl.load(pointer + segment), tl.load(pointer + segment + 1)
    # One pass finds the peak and the sum: where the peak rises, the sum so far shrinks.
    peak = tl.full((BLOCK,), float("-inf"), dtype=SUM)
    total = tl.zeros((BLOCK,), dtype=SUM)
    begin = first
    while begin < last:
        at, inside = _members(begin, last, order, FEATURES, MEMBERS, BLOCK)
        value = tl.load(x + at, mask=inside, other=float("-inf")).to(SUM)
        higher = tl.maximum(peak, tl.max(value, axis=0))
        shift = tl.where(higher > float("-inf"), higher, 0.0)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(value - shift[None, :]), axis=0)
        peak = higher
        begin += MEMBERS
    begin = first
    while begin < last:
        at, inside = _members(begin, last, order, FEATURES, MEMBERS, BLOCK)
        value = tl.load(x + at, mask=inside, other=0.0).to(SUM)
        tl.store(result + at, tl.exp(value - peak[None, :]) / total[None, :], mask=inside)
        begin += MEMBERS
