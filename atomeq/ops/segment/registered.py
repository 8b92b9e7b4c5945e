"""Sums and softmax over segments as registered operations.

The sum S and the gather S^T are linear and each other's gradient. With w the softmax of logits, the
gradient is w (g - S^T S (w g)), made of both.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from atomeq.ops.registration import kernels_of, registered

Gradients = dict[str, Tensor | list[Tensor] | None]


def _fake_total(call: SimpleNamespace) -> Tensor:
    return call.x.new_empty(call.n_segments, *call.x.shape[1:])


def _total_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> Gradients:
    return {"x": grad.index_select(0, saved.index)}


@registered(outputs=_fake_total, gradient=_total_gradient, only_for={"x": ()})
def segment_sum(x: Tensor, index: Tensor, n_segments: int, kernels: str) -> Tensor:
    """Return the sums of the members of each segment, (n_segments, ...)."""
    return kernels_of("segment", kernels).segment_sum(x, index, n_segments)


def _fake_softmax(call: SimpleNamespace) -> Tensor:
    return torch.empty_like(call.x)


def _softmax_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> Gradients:
    weights = segment_softmax(saved.x, saved.index, saved.n_segments, saved.kernels)
    moved = weights * grad
    totals = segment_sum(moved, saved.index, saved.n_segments, saved.kernels)
    return {"x": moved - weights * totals.index_select(0, saved.index)}


@registered(outputs=_fake_softmax, gradient=_softmax_gradient)
def segment_softmax(x: Tensor, index: Tensor, n_segments: int, kernels: str) -> Tensor:
    """Return positive weights that sum to 1 in each segment, (n_members, ...)."""
    return kernels_of("segment", kernels).segment_softmax(x, index, n_segments)
