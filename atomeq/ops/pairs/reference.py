"""Reading tables in plain torch: the truth, differentiable any number of times."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atomeq.ops.coupling.weight_table import WeightTable


def pair_functions(
    vectors: Tensor,
    edge_index: Tensor,
    kinds: Tensor,
    polynomials: Tensor,
    step: float,
    widths: Sequence[int],
) -> list[Tensor]:
    """Return what :func:`~atomeq.ops.pairs.operations.pair_functions` does."""
    at = torch.linalg.vector_norm(vectors, dim=1) / step
    n_kinds, n_intervals = polynomials.shape[1:3]
    source, target = edge_index
    pairs = kinds.index_select(0, source) * n_kinds + kinds.index_select(0, target)
    values, _ = WeightTable(at, polynomials.flatten(0, 2)).weights(pairs * n_intervals, n_intervals)
    return list(values.split(list(widths), dim=1))
