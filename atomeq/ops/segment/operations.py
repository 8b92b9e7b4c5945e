"""Sums, means and softmax over the members of segments: edges of an atom, atoms of a graph.

Segments need not be sorted, and may be empty. All are differentiable any number of times and, on a
CPU, repeatable to the bit.
"""

import math

from jaxtyping import Float, Int
from torch import Tensor

from atomeq.ops.dispatch import Backend, select

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

    Raises:
        ValueError: If index and x disagree about the number of members.
    """
    return _backend("segment_sum", x, index).segment_sum(x, index, n_segments)


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

    Raises:
        ValueError: If index and logits disagree about the number of members.
    """
    backend = _backend("segment_softmax", logits, index)
    return backend.segment_softmax(logits, index, n_segments)


def _backend(op: str, x: Tensor, index: Tensor) -> Backend:
    if index.shape != x.shape[:1]:
        raise ValueError(f"index is {tuple(index.shape)} for {x.shape[0]} members")
    channels = math.prod(x.shape[1:])
    return select(op, lmax=0, mmax=0, channels=channels, n_edges=x.shape[0], like=x)
