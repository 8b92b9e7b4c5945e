"""Functions of the length of a pair, and of the kinds of its two atoms, read off tables.

A table has a polynomial of degree five for each of equal intervals of the length and for each
ordered pair of kinds. Where a model's weights are fixed, such tables stand for its radial networks.
A gradient that is differentiated in its turn, as a Hessian asks, is that of plain torch.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atomeq.ops.coupling.weight_table import ROWS, WeightTable
from atomeq.ops.dispatch import operation, size_of
from atomeq.ops.registration import differentiable_gradient, kernel
from atomeq.ops.self_check import Example, indices, random
from atomeq.ops.specification import Size
from atomeq.typing import EdgeIndex, EdgeVectors


def _verified(
    vectors: Tensor,
    edge_index: Tensor,
    polynomials: Tensor,
    widths: Sequence[int],
    **_: object,
) -> Size:
    n_edges = vectors.shape[0]
    if vectors.shape != (n_edges, 3) or edge_index.shape != (2, n_edges):
        raise ValueError(
            f"vectors {tuple(vectors.shape)} and edge_index {tuple(edge_index.shape)} must be "
            "(n_edges, 3) and (2, n_edges)"
        )
    n_kinds, other, _n_intervals, rows, width = polynomials.shape
    if n_kinds != other or rows != ROWS or sum(widths) != width:
        raise ValueError(
            f"polynomials are {tuple(polynomials.shape)}; expected (n_kinds, n_kinds, n_intervals, "
            f"{ROWS}, {sum(widths)})"
        )
    if polynomials.dtype != vectors.dtype:
        raise TypeError(f"the table is {polynomials.dtype} but the vectors {vectors.dtype}")
    return size_of(vectors, n_edges, channels=width)


def _example(size: Size) -> Example:
    """Return edges, some of them longer than the tables of two kinds reach."""
    vectors, polynomials = random(size, 30, 3), random(size, 2, 2, 4, ROWS, size.channels)
    ends, kinds = indices(size, 5, 2, 30), indices(size, 3, 5)
    widths = [size.channels - size.channels // 2, size.channels // 2]
    return [vectors], lambda operation, vectors: torch.cat(
        operation(vectors, ends, kinds, polynomials, step=0.7, widths=widths), dim=1
    )


@operation(_verified, by_kernels=lambda **given: read_pairs(**given), example=_example)
def pair_functions(
    vectors: EdgeVectors,
    edge_index: EdgeIndex,
    kinds: Int[Tensor, " n_atoms"],
    polynomials: Float[Tensor, "n_kinds n_kinds n_intervals 6 n_functions"],
    *,
    step: float,
    widths: Sequence[int],
) -> list[Tensor]:
    """Read functions of the edges' lengths off tables.

    Args:
        vectors: Of the edges, (n_edges, 3), Å.
        edge_index: Row 0 is the source, row 1 the target, (2, n_edges).
        kinds: Of each atom, from 0, (n_atoms,).
        polynomials: Coefficients by powers of the place in an interval, 0 to 1, for kinds of source
            and target, (n_kinds, n_kinds, n_intervals, 6, n_functions). Beyond the last interval
            functions stay as they are at its end.
        step: Width of an interval, Å.
        widths: How the functions are divided.

    Returns:
        Tensors (n_edges, width), one for each width.

    Raises:
        ValueError: If the shapes do not fit together.
        TypeError: If the dtypes differ.
    """
    return list(_read(vectors, edge_index, kinds, polynomials, step).split(list(widths), dim=1))


def _read(
    vectors: Tensor, edge_index: Tensor, kinds: Tensor, polynomials: Tensor, step: float
) -> Tensor:
    at = torch.linalg.vector_norm(vectors, dim=1) / step
    n_kinds, n_intervals = polynomials.shape[1:3]
    source, target = edge_index
    pairs = kinds.index_select(0, source) * n_kinds + kinds.index_select(0, target)
    table = WeightTable(at, polynomials.flatten(0, 2))
    return table.weights(pairs * n_intervals, n_intervals)[0]


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
    whole = torch.cat(pulls, dim=1)
    return {"vectors": differentiable_gradient(lambda v: _read(v, *fixed), vectors, whole)}


@kernel(
    outputs=lambda call: [call.vectors.new_empty(len(call.vectors), n) for n in call.widths],
    gradient=_read_gradient,
)
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
    ...


@kernel(outputs=lambda call: torch.empty_like(call.vectors))
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
    ...
