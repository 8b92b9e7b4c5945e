"""The symmetric contraction of MACE: products of up to n features of an atom, coupled to degree l.

B_lm = Σ_n Σ_q W_nq Σ_(i1 ≤ … ≤ in) S_n[m, i1 … in, q] x_i1 … x_in, channel by channel and with
weights of each element (Batatia et al., arXiv:2206.07697, eq. 10 and 11), in the basis of
symmetric_contraction_basis.py.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atomeq.ops.coupling import symmetric_contraction_registered as registered
from atomeq.ops.coupling.examples import contraction
from atomeq.ops.coupling.symmetric_contraction_basis import SymmetricForm, Term, form_of
from atomeq.ops.dispatch import operation
from atomeq.ops.specification import Size, size_of
from atomeq.ops.tables import constant_table, table_like
from atomeq.typing import NodeFeatures


def _verified(
    x: Tensor, weights: Tensor, species: Tensor, *, degrees: Sequence[int], order: int
) -> Size:
    form = form_of(x.shape[1], degrees, order)
    if weights.shape[1:] != (form.n_columns, x.shape[2]):
        raise ValueError(
            f"weights are {tuple(weights.shape)}; products of {order} features up to degree "
            f"{form.lmax} have {form.n_columns} independent couplings to degrees {degrees}, of "
            f"{x.shape[2]} channels each"
        )
    if weights.dtype != x.dtype or weights.device != x.device:
        raise TypeError(
            f"weights are {weights.dtype} on {weights.device}, features {x.dtype} on {x.device}; "
            f"cast one of them"
        )
    if species.shape != x.shape[:1]:
        raise ValueError(f"species are {tuple(species.shape)} for {len(x)} atoms")
    return size_of(x, x.shape[0], lmax=form.lmax, channels=x.shape[2])


@operation(_verified, by_kernels=registered.symmetric_contraction, example=contraction)
def symmetric_contraction(
    x: NodeFeatures,
    weights: Float[Tensor, "n_species n_columns channels"],
    species: Int[Tensor, " n_atoms"],
    *,
    degrees: Sequence[int],
    order: int,
) -> Float[Tensor, "n_atoms n_rows channels"]:
    """Contract products of features with themselves.

    Args:
        x: Features of degrees 0 to lmax, of parity (-1)^l, (n_atoms, (lmax + 1)^2, channels).
        weights: Of all independent couplings: for each wanted degree those of order 1, 2, …, see
            :func:`~atomeq.ops.coupling.symmetric_contraction_basis.symmetric_basis`.
        species: Row of the weights that each atom takes.
        degrees: Which degrees are wanted.
        order: Number of factors of the highest products.

    Returns:
        The wanted degrees one after the other, (n_atoms, sum of 2l + 1, channels).

    Raises:
        ValueError: The features are of no whole degrees, or weights are of another shape.
        TypeError: Features and weights have different dtypes or devices.
    """
    form = form_of(x.shape[1], degrees, order)
    padded = torch.cat((torch.ones_like(x[:, :1]), x), dim=1)  # a factor of 1 where there is none
    factors = table_like(_factors, form, like=x)
    monomials = padded[:, factors[0]]
    for further in factors[1:]:
        monomials = monomials * padded[:, further]  # (n_atoms, n_monomials, C)
    column, row = table_like(_pairs, form, like=x)
    coupled = table_like(_coefficients, form, like=x) @ monomials  # (n_atoms, n_pairs, C)
    weighted = coupled * weights.index_select(0, species)[:, column]
    return x.new_zeros(x.shape[0], form.n_rows, x.shape[2]).index_add(1, row, weighted)


def _monomials_and_pairs(
    form: SymmetricForm,
) -> tuple[list[tuple[int, ...]], list[tuple[int, int]], list[Term]]:
    terms = form.terms()
    monomials = sorted({term.monomial for term in terms})
    return monomials, sorted({(term.column, term.row) for term in terms}), terms


@constant_table
def _factors(form: SymmetricForm) -> Tensor:
    """Return what each monomial multiplies, 0 for the factor of 1, (order, n_monomials)."""
    monomials, _, _ = _monomials_and_pairs(form)
    padded = [[0] * (form.order - len(m)) + [i + 1 for i in m] for m in monomials]
    return torch.tensor(padded, device="cpu").T.contiguous()


@constant_table
def _pairs(form: SymmetricForm) -> Tensor:
    """Return the columns and the rows that have terms, (2, n_pairs)."""
    _, pairs, _ = _monomials_and_pairs(form)
    return torch.tensor(pairs, device="cpu").view(-1, 2).T.contiguous()


@constant_table
def _coefficients(form: SymmetricForm) -> Tensor:
    """Return the polynomials of all pairs, (n_pairs, n_monomials)."""
    monomials, pairs, terms = _monomials_and_pairs(form)
    place = {m: k for k, m in enumerate(monomials)}
    number = {pair: k for k, pair in enumerate(pairs)}
    table = torch.zeros(len(pairs), len(monomials), dtype=torch.float64, device="cpu")
    for term in terms:
        table[number[term.column, term.row], place[term.monomial]] = term.coefficient
    return table
