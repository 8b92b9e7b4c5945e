"""Sums, means and softmax over the members of segments: edges of an atom, atoms of a graph.

Segments need not be sorted, and may be empty. All are differentiable any number of times and, on a
CPU, repeatable to the bit.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Members = Float[Tensor, "n_members *features"]
SegmentIndex = Int[Tensor, " n_members"]


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
    """
    counts = torch.bincount(index, minlength=n_segments).clamp_(min=1).to(x.dtype)
    return segment_sum(x, index, n_segments) / counts.view(-1, *(1 for _ in x.shape[1:]))


def segment_softmax(
    logits: Members, index: SegmentIndex, n_segments: int
) -> Float[Tensor, "n_members *features"]:
    """Normalise the members of each segment to positive weights that sum to 1.

    Args:
        logits: Values, (n_members, ...); each trailing feature is normalised by itself.
        index: Segment of each member, (n_members,).
        n_segments: Number of segments.

    Returns:
        Weights, (n_members, ...).
    """
    # The shift cancels in the ratio, so it needs no gradient; it keeps exp from overflowing.
    rows = index.view(-1, *(1 for _ in logits.shape[1:])).expand_as(logits)
    lowest = logits.new_full((n_segments, *logits.shape[1:]), -torch.inf)
    peaks = lowest.scatter_reduce(0, rows, logits.detach(), reduce="amax")
    weights = (logits - peaks.index_select(0, index)).exp()
    return weights / segment_sum(weights, index, n_segments).index_select(0, index)
