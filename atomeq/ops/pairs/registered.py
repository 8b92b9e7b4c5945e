"""Reading tables as a registered operation, with its gradient by the vectors of the edges.

A gradient that is differentiated in its turn, as a Hessian asks, is that of plain torch.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from atomeq.ops.pairs import reference
from atomeq.ops.registration import differentiable_gradient, kernels_of, registered


def pair_functions(
    vectors: Tensor,
    edge_index: Tensor,
    kinds: Tensor,
    polynomials: Tensor,
    *,
    step: float,
    widths: Sequence[int],
    kernels: str,
) -> list[Tensor]:
    """Read tables by some kernels."""
    return read_pairs(vectors, edge_index, kinds, polynomials, step, list(widths), kernels)


def _fake_read(call: SimpleNamespace) -> list[Tensor]:
    return [call.vectors.new_empty(len(call.vectors), width) for width in call.widths]


def _read_gradient(
    saved: SimpleNamespace, wanted: set[str], grads: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    vectors, fixed = saved.vectors, (saved.edge_index, saved.kinds, saved.polynomials, saved.step)
    pulls = [
        vectors.new_zeros(len(vectors), width) if grad is None else grad
        for grad, width in zip(grads, saved.widths, strict=True)
    ]
    if not torch.is_grad_enabled():
        return {"vectors": read_pairs_gradient(vectors, *fixed, pulls, saved.kernels)}

    def read(vectors: Tensor) -> Tensor:
        return torch.cat(reference.pair_functions(vectors, *fixed, saved.widths), dim=1)

    return {"vectors": differentiable_gradient(read, vectors, torch.cat(pulls, dim=1))}


@registered(outputs=_fake_read, gradient=_read_gradient)
def read_pairs(
    vectors: Tensor,
    edge_index: Tensor,
    kinds: Tensor,
    polynomials: Tensor,
    step: float,
    widths: list[int],
    kernels: str,
) -> list[Tensor]:
    """Return the functions, a tensor (n_edges, width) for each width."""
    by = kernels_of("pairs", kernels)
    return by.read(vectors, edge_index, kinds, polynomials, step, widths)


@registered(outputs=lambda call: torch.empty_like(call.vectors))
def read_pairs_gradient(
    vectors: Tensor,
    edge_index: Tensor,
    kinds: Tensor,
    polynomials: Tensor,
    step: float,
    grads: list[Tensor],
    kernels: str,
) -> Tensor:
    """Return the gradient by the vectors, (n_edges, 3)."""
    by = kernels_of("pairs", kernels)
    return by.read_gradient(vectors, edge_index, kinds, polynomials, step, grads)
