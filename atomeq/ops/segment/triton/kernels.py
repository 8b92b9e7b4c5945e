"""Sums and softmax over segments: one program owns a segment, so nothing is added out of order."""

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
    launch,
    power_of_2,
)
from atomeq.ops.triton_launch import refusal as launch_refusal

_MEMBERS = 16  # of a segment at a time
_FEATURES = 64


def refusal(spec: OpSpec) -> str | None:
    """Return None if these kernels serve the call, else the reason why not."""
    return launch_refusal(spec, any_channels=True)


def segment_total(call: SimpleNamespace) -> Tensor:
    """Return the sums of the members of each segment in their order, (n_segments, ...)."""
    result = call.x.new_empty(call.n_segments, *call.x.shape[1:])
    _launch(_segment_sum, call, result)
    return result


def segment_weights(call: SimpleNamespace) -> Tensor:
    """Return positive weights that sum to 1 in each segment, (n_members, ...)."""
    result = torch.empty_like(call.x)
    _launch(_segment_softmax, call, result)
    return result


def _launch(kernel: object, call: SimpleNamespace, result: Tensor) -> None:
    pointer, order = segments_of(call.index, call.n_segments)
    x, features = call.x, math.prod(call.x.shape[1:])
    block = min(_FEATURES, power_of_2(max(1, features)))
    launch(
        kernel,
        (call.n_segments, ceil_div(features, block)),
        x,
        pointer,
        order,
        result,
        like=x,
        FEATURES=features,
        SUM=accumulator(x.dtype),
        MEMBERS=_MEMBERS,
        BLOCK=block,
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
def _segment_sum(x, pointer, order, result, FEATURES: tl.constexpr, SUM: tl.constexpr,
                 MEMBERS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    begin, last = tl.load(pointer + segment), tl.load(pointer + segment + 1)
    total = tl.zeros((MEMBERS, BLOCK), dtype=SUM)
    while begin < last:
        at, inside = _members(begin, last, order, FEATURES, MEMBERS, BLOCK)
        total += tl.load(x + at, mask=inside, other=0.0).to(SUM)
        begin += MEMBERS
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
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
