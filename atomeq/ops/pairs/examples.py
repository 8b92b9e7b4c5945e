"""Small random problems by which kernels prove themselves."""

import torch

from atomeq.ops.coupling.weight_table import ROWS
from atomeq.ops.self_check import Example, indices, random
from atomeq.ops.specification import Size

_EDGES, _ATOMS, _INTERVALS = 30, 5, 4


def pairs(size: Size) -> Example:
    """Return edges, some of them longer than the tables of two kinds reach."""
    vectors = random(size, _EDGES, 3)
    polynomials = random(size, 2, 2, _INTERVALS, ROWS, size.channels)
    ends, kinds = indices(size, _ATOMS, 2, _EDGES), indices(size, 3, _ATOMS)
    widths = [size.channels - size.channels // 2, size.channels // 2]
    return [vectors], lambda operation, vectors: torch.cat(
        operation(vectors, ends, kinds, polynomials, step=0.7, widths=widths), dim=1
    )
