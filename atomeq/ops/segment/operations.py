"""Sums, means and softmax over the members of segments: edges of an atom, atoms of a graph.

Segments need not be sorted, and may be empty. All are differentiable any number of times and, on a
CPU, repeatable to the bit. The sum S and the gather S^T are linear and each other's gradient. With
w the softmax of logits, the gradient is w (g - S^T S (w g)), made of both.
"""

import math
from types import SimpleNamespace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atomeq.ops.dispatch import operation, size_of
from atomeq.ops.registration import kernel
from atomeq.ops.self_check import Example, indices, random
from atomeq.ops.specification import Size

Members = Float[Tensor, "n_members *features"]
SegmentIndex = Int[Tensor, " n_members"]


def _verified(x: Tensor, index: Tensor, n_segments: int) -> Size:
    if index.shape != x.shape[:1]:
        raise ValueError(f"index is {tuple(index.shape)} for {x.shape[0]} members")
    return size_of(x, x.shape[0], channels=math.prod(x.shape[1:]))


def _example(size: Size) -> Example:
    """Return members of segments, one of which is empty, and so many that kernels sum by pieces."""
    index = indices(size, 3, 600)
    return [random(size, 600, size.channels)], lambda operation, x: operation(x, index, 3)


@operation(_verified, by_kernels=lambda **given: segment_total(**given), example=_example)
def segment_sum(
    x: Members, index: SegmentIndex, n_segments: int
) -> Float[Tensor, "n_segments *features"]:
    """Sum the members of each segment; an empty one gives 0.

    Args:
        x: Values, (n_members, ...).
        index: Segment of each member, (n_members,).
        n_segments: Number of segments.

    Returns:
        (n_segments, ...).

    Raises:
        ValueError: If index and x disagree about the number of members.
    """
    return x.new_zeros(n_segments, *x.shape[1:]).index_add(0, index, x)


def segment_mean(
    x: Members, index: SegmentIndex, n_segments: int
) -> Float[Tensor, "n_segments *features"]:
    """Average the members of each segment; an empty one gives 0.

    Args:
        x: Values, (n_members, ...).
        index: Segment of each member, (n_members,).
        n_segments: Number of segments.

    Returns:
        (n_segments, ...).

    Raises:
        ValueError: If index and x disagree about the number of members.
    """
    counts = x.new_zeros(n_segments).index_add(0, index, x.new_ones(index.shape)).clamp_(min=1)
    return segment_sum(x, index, n_segments) / counts.view(-1, *(1 for _ in x.shape[1:]))


@operation(_verified, by_kernels=lambda **given: segment_weights(**given), example=_example)
def segment_softmax(
    x: Members, index: SegmentIndex, n_segments: int
) -> Float[Tensor, "n_members *features"]:
    """Normalise the members of each segment to positive weights that sum to 1.

    Args:
        x: Logits, (n_members, ...); each trailing feature is normalised by itself.
        index: Segment of each member, (n_members,).
        n_segments: Number of segments.

    Returns:
        Weights, (n_members, ...).

    Raises:
        ValueError: If index and x disagree about the number of members.
    """
    # The shift cancels in the ratio, so it needs no gradient; it keeps exp from overflowing.
    rows = index.view(-1, *(1 for _ in x.shape[1:])).expand_as(x)
    lowest = x.new_full((n_segments, *x.shape[1:]), -torch.inf)
    peaks = lowest.scatter_reduce(0, rows, x.detach(), reduce="amax")
    weights = (x - peaks.index_select(0, index)).exp()
    totals = segment_sum(weights, index, n_segments)
    return weights / totals.index_select(0, index)


def _total_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> dict[str, Tensor]:
    return {"x": grad.index_select(0, saved.index)}


@kernel(
    outputs=lambda call: call.x.new_empty(call.n_segments, *call.x.shape[1:]),
    gradient=_total_gradient,
    only_for={"x": ()},
)
def segment_total(x: Tensor, index: Tensor, n_segments: int, kernels: str) -> Tensor:
    """Return the sums of the members of each segment, (n_segments, ...)."""
    ...


def _weights_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> dict[str, Tensor]:
    given = saved.index, saved.n_segments, saved.kernels
    weights = segment_weights(saved.x, *given)
    moved = weights * grad
    return {"x": moved - weights * segment_total(moved, *given).index_select(0, saved.index)}


@kernel(outputs=lambda call: torch.empty_like(call.x), gradient=_weights_gradient)
def segment_weights(x: Tensor, index: Tensor, n_segments: int, kernels: str) -> Tensor:
    """Return positive weights that sum to 1 in each segment, (n_members, ...)."""
    ...
