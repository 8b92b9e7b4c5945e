"""Sums and softmax over segments as registered operations.

The sum S and the gather S^T are linear and each other's gradient. With w the softmax of logits, the
gradient is w (g - S^T S (w g)), made of both.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from atomeq.ops.kernel_sets import segment_kernels
from atomeq.ops.registration import registered

Gradients = dict[str, Tensor | list[Tensor] | None]


def _fake_total(call: SimpleNamespace) -> Tensor:
    return call.x.new_empty(call.n_segments, *call.x.shape[1:])


def _total_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> Gradients:
    return {"x": grad.index_select(0, saved.index)}


@registered(outputs=_fake_total, gradient=_total_gradient, only_for={"x": ()})
def segment_total(x: Tensor, index: Tensor, n_segments: int, kernels: str) -> Tensor:
    """Return the sums of the members of each segment, (n_segments, ...)."""
    return segment_kernels(kernels).total(x, index, n_segments)


def _fake_softmax(call: SimpleNamespace) -> Tensor:
    return torch.empty_like(call.logits)


def _softmax_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> Gradients:
    weights = segment_softmax(saved.logits, saved.index, saved.n_segments, saved.kernels)
    moved = weights * grad
    totals = segment_total(moved, saved.index, saved.n_segments, saved.kernels)
    return {"logits": moved - weights * totals.index_select(0, saved.index)}


@registered(outputs=_fake_softmax, gradient=_softmax_gradient)
def segment_softmax(logits: Tensor, index: Tensor, n_segments: int, kernels: str) -> Tensor:
    """Return positive weights that sum to 1 in each segment, (n_members, ...)."""
    return segment_kernels(kernels).softmax(logits, index, n_segments)
