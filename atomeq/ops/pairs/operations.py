"""Functions of the length of a pair, and of the kinds of its two atoms, read off tables.

A table has a polynomial of degree five for each of equal intervals of the length and for each
ordered pair of kinds. Where a model's weights are fixed, such tables stand for its radial networks.
"""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from atomeq.ops.coupling.weight_table import ROWS
from atomeq.ops.dispatch import operation
from atomeq.ops.pairs import examples, reference, registered
from atomeq.ops.specification import Size, size_of
from atomeq.typing import EdgeIndex, EdgeVectors


def _verified(
    vectors: EdgeVectors,
    edge_index: EdgeIndex,
    kinds: Int[Tensor, " n_atoms"],
    polynomials: Tensor,
    *,
    step: float,
    widths: Sequence[int],
) -> Size:
    n_edges = vectors.shape[0]
    if vectors.shape != (n_edges, 3) or edge_index.shape != (2, n_edges):
        raise ValueError(
            f"vectors {tuple(vectors.shape)} and edge_index {tuple(edge_index.shape)} must be "
            "(n_edges, 3) and (2, n_edges)"
        )
    n_kinds, other, _, rows, width = polynomials.shape
    if n_kinds != other or rows != ROWS or sum(widths) != width:
        raise ValueError(
            f"polynomials are {tuple(polynomials.shape)}; expected (n_kinds, n_kinds, n_intervals, "
            f"{ROWS}, {sum(widths)})"
        )
    if polynomials.dtype != vectors.dtype:
        raise TypeError(f"the table is {polynomials.dtype} but the vectors {vectors.dtype}")
    return size_of(vectors, n_edges, channels=width)


@operation(_verified, by_kernels=registered.pair_functions, example=examples.pairs)
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
    return reference.pair_functions(vectors, edge_index, kinds, polynomials, step, widths)
