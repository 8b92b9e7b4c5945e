"""Sums and softmax over segments: one program owns a segment, so nothing is added out of order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomeq.ops.backends.triton.launch import accumulator, contiguous, launch

_MEMBERS = 16  # of a segment at a time
_FEATURES = 64


def segments(index: Tensor, n_segments: int) -> tuple[Tensor, Tensor]:
    """Return where each segment begins in the list of sorted members, and that list.

    Args:
        index: Segment of each member, (n_members,).
        n_segments: Number of segments.

    Returns:
        (n_segments + 1,) and (n_members,), int64.
    """
    ordered, order = index.sort(stable=True)  # members of a segment keep their order
    bounds = torch.arange(n_segments + 1, device=index.device, dtype=index.dtype)
    return torch.searchsorted(ordered, bounds), order  # no number travels to the host


def segment_sum(x: Tensor, index: Tensor, n_segments: int) -> Tensor:
    """Sum the members of each segment in their order, (n_members, ...) -> (n_segments, ...)."""
    flat = contiguous(x.flatten(1) if x.ndim > 1 else x[:, None])
    result = flat.new_empty(n_segments, flat.shape[1])
    _launch(_segment_sum, flat, index, n_segments, result)
    return result.view(n_segments, *x.shape[1:])


def segment_softmax(logits: Tensor, index: Tensor, n_segments: int) -> Tensor:
    """Normalise the members of each segment, (n_members, ...)."""
    flat = contiguous(logits.flatten(1) if logits.ndim > 1 else logits[:, None])
    result = torch.empty_like(flat)
    _launch(_segment_softmax, flat, index, n_segments, result)
    return result.view(logits.shape)


def segment_softmax_gradient(
    weights: Tensor, grad: Tensor, index: Tensor, n_segments: int
) -> Tensor:
    """Return w (g - sum of w g over the segment), the transpose of the softmax's derivative.

    The Jacobian is symmetric, so it serves tangents as well as cotangents.
    """
    flat = contiguous(weights.flatten(1) if weights.ndim > 1 else weights[:, None])
    result = torch.empty_like(flat)
    pull = contiguous(grad.reshape(flat.shape))
    _launch(_segment_softmax_gradient, flat, index, n_segments, pull, result)
    return result.view(weights.shape)


def _launch(kernel: object, x: Tensor, index: Tensor, n_segments: int, *others: Tensor) -> None:
    pointer, order = segments(index, n_segments)
    features = x.shape[1]
    block = min(_FEATURES, triton.next_power_of_2(max(1, features)))
    launch(
        kernel,
        (n_segments, triton.cdiv(features, block)),
        x,
        pointer,
        order,
        *others,
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


@triton.jit
def _segment_softmax_gradient(weights, pointer, order, grad, result, FEATURES: tl.constexpr,
                              SUM: tl.constexpr, MEMBERS: tl.constexpr,
                              BLOCK: tl.constexpr):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    first, last = tl.load(pointer + segment), tl.load(pointer + segment + 1)
    total = tl.zeros((MEMBERS, BLOCK), dtype=SUM)
    begin = first
    while begin < last:
        at, inside = _members(begin, last, order, FEATURES, MEMBERS, BLOCK)
        weight = tl.load(weights + at, mask=inside, other=0.0).to(SUM)
        total += weight * tl.load(grad + at, mask=inside, other=0.0).to(SUM)
        begin += MEMBERS
    mean = tl.sum(total, axis=0)
    begin = first
    while begin < last:
        at, inside = _members(begin, last, order, FEATURES, MEMBERS, BLOCK)
        weight = tl.load(weights + at, mask=inside, other=0.0).to(SUM)
        pull = tl.load(grad + at, mask=inside, other=0.0).to(SUM)
        tl.store(result + at, weight * (pull - mean[None, :]), mask=inside)
        begin += MEMBERS
