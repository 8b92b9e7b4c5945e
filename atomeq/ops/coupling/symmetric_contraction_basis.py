"""The couplings of the symmetric contraction, as coefficients of monomials, and its form.

A product does not know the order of its factors, so what is kept of MACE's generalised
Clebsch-Gordan coefficients (Batatia et al., arXiv:2206.07697, eq. 10) are the coefficients of
monomials, and of the couplings the linearly independent ones: 8 of 23 for l = 0, 12 of 51 for l = 1
and 14 of 65 for l = 2 at lmax = 3 and three factors.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, combinations_with_replacement
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from atomeq.ops.coupling.clebsch_gordan import clebsch_gordan
from atomeq.ops.tables import constant_table, table_like
from atomeq.traces import constant_in_traces

_DEPENDENT = 1e-9  # of columns of norm 1 to 5: rounding where others span one, or where it vanishes
_ZERO = 1e-12  # of a coefficient, which is a sum of products of 3j symbols or nothing

# 3j symbols that e3nn 0.4 has with the other sign: the published couplings are made of them.
_EARLIER_SIGNS = """\
122 133 144 155 166 212 221 313 331 346 364 414 436 441 445 454 456 463 465 515 544 546 551 555 564
566 616 634 643 645 654 656 661 665"""


class Term(NamedTuple):
    """A monomial of the form: a coefficient times components of x, for a column and a row."""

    monomial: tuple[int, ...]
    column: int
    row: int
    coefficient: float


class SymmetricForm(NamedTuple):
    """F(x, w, z) = sum of c w_q z_m x_i1 ... x_in over the terms, channel by channel.

    Attributes:
        lmax: Highest degree of x.
        degrees: Wanted degrees; z has the rows of one after the other.
        order: Number of factors of the highest products.
    """

    lmax: int
    degrees: tuple[int, ...]
    order: int

    @property
    def n_components(self) -> int:
        """Number of components of x."""
        return (self.lmax + 1) ** 2

    @property
    def n_rows(self) -> int:
        """Number of rows of z."""
        return sum(2 * l + 1 for l in self.degrees)

    @property
    def n_columns(self) -> int:
        """Number of columns of w: those of a degree by order, one degree after the other."""
        return _n_columns(*self)

    def products(self) -> list[tuple[int, int]]:
        """Return degree and order of the products, in the order of the columns."""
        return [(l, n) for l in self.degrees for n in range(1, self.order + 1)]

    def terms(self) -> list[Term]:
        """Return all terms, by column, row and monomial."""
        return _terms(self)


def form_of(n_components: int, degrees: Sequence[int], order: int) -> SymmetricForm:
    """Return the form of features with a number of components.

    Raises:
        ValueError: They are of no whole degrees.
    """
    lmax = math.isqrt(n_components) - 1
    if (lmax + 1) ** 2 != n_components:
        raise ValueError(f"x has {n_components} components; whole degrees have 1, 4, 9, 16, …")
    return SymmetricForm(lmax, tuple(degrees), order)


@constant_in_traces
def _n_columns(lmax: int, degrees: tuple[int, ...], order: int) -> int:
    products = SymmetricForm(lmax, degrees, order).products()
    return sum(symmetric_basis(lmax, l, n).shape[2] for l, n in products)


@cache
def _terms(form: SymmetricForm) -> list[Term]:
    terms, column = [], 0
    sizes = accumulate((2 * l + 1 for l in form.degrees), initial=0)
    rows = dict(zip(form.degrees, sizes, strict=False))
    for l, order in form.products():
        basis = symmetric_basis(form.lmax, l, order)
        monomials = _monomials(form.lmax, order)
        for q, m, place in (basis.permute(2, 0, 1).abs() > _ZERO).nonzero().tolist():
            coefficient = float(basis[m, place, q])
            terms.append(Term(monomials[place], column + q, rows[l] + m, coefficient))
        column += basis.shape[2]
    return terms


@constant_table
def symmetric_basis(lmax: int, l: int, order: int) -> Tensor:
    """Return independent coefficients of monomials, (2l + 1, n_monomials, K) float64.

    Monomials are sorted, (0, 0), (0, 1), … of ``combinations_with_replacement``; columns are the
    first ones of :func:`published_columns` that are no sum of others.
    """
    columns = published_columns(lmax, l, order)
    found: list[Tensor] = []
    kept = []
    for number, column in enumerate(columns.flatten(0, 1).T):
        rest = column
        for _ in range(2):  # once more: the first pass leaves rounding errors
            for unit in found:
                rest = rest - (rest @ unit) * unit
        if rest.norm() > _DEPENDENT:
            found.append(rest / rest.norm())
            kept.append(number)
    return columns[:, :, kept]


def reduce_weights(
    weights: Float[Tensor, "n_species n_columns channels"], form: SymmetricForm
) -> Float[Tensor, "n_species n_independent channels"]:
    """Turn weights of all published couplings into those of the independent ones."""
    return table_like(_reduction, form, like=weights) @ weights


@constant_table
def published_columns(lmax: int, l: int, order: int) -> Tensor:
    """Return MACE's couplings as coefficients of monomials, (2l + 1, n_monomials, n_couplings).

    Factor by factor from the left, a feature of degree l1 is coupled with the next factor's l2 to
    all l3, by √(2 l3 + 1) times the 3j symbol; they are sorted by degree and parity, odd first.
    """
    monomials = torch.eye((lmax + 1) ** 2, dtype=torch.float64, device="cpu")
    entries = [((k, (-1) ** k), monomials[k * k : (k + 1) ** 2]) for k in range(lmax + 1)]
    for n in range(2, order + 1):
        highest = l + (order - n) * lmax  # from above there is no way to l any more
        made = []
        for (l1, p1), polynomials in entries:
            if order == 4 and p1 != (-1) ** l1:
                continue  # as published
            for l2 in range(lmax + 1):
                for l3 in range(abs(l1 - l2), min(l1 + l2, highest) + 1):
                    irrep = (l3, p1 * (-1) ** l2)
                    if n < order or irrep == (l, (-1) ** l):
                        made.append((irrep, _times(polynomials, lmax, n, (l3, l1, l2))))
        entries = sorted(made, key=lambda entry: entry[0])
    wanted = [polynomials for irrep, polynomials in entries if irrep == (l, (-1) ** l)]
    if not wanted:
        n_monomials = len(_monomials(lmax, order))
        return torch.zeros(2 * l + 1, n_monomials, 0, dtype=torch.float64, device="cpu")
    return torch.stack(wanted, dim=2)


def symmetrised(coupling: Tensor, order: int) -> Tensor:
    """Return coefficients of monomials, (2l + 1, n_monomials, K), of those of all products.

    Args:
        coupling: (2l + 1, n_sph, …, n_sph, K), with as many n_sph as the order.
        order: Number of factors.
    """
    n_sph = coupling.shape[1]
    places = {m: k for k, m in enumerate(_monomials(math.isqrt(n_sph) - 1, order))}
    products = torch.cartesian_prod(*[torch.arange(n_sph)] * order).reshape(-1, order)
    index = torch.tensor([places[tuple(m)] for m in products.sort(dim=1).values.tolist()])
    flat = coupling.flatten(1, order)
    return flat.new_zeros(len(flat), len(places), flat.shape[2]).index_add(1, index, flat)


def _times(polynomials: Tensor, lmax: int, order: int, degrees: tuple[int, int, int]) -> Tensor:
    """Couple polynomials of degree l1 with one more factor of degree l2 to degree l3."""
    l3, _, l2 = degrees
    sign = -1.0 if "".join(map(str, degrees)) in _EARLIER_SIGNS.split() else 1.0
    table = clebsch_gordan(*degrees) * (sign * math.sqrt(2 * l3 + 1))
    products = torch.einsum("mjk,jp->mkp", table, polynomials).flatten(1)
    places = {m: k for k, m in enumerate(_monomials(lmax, order))}
    index = [
        places[tuple(sorted((*m, i)))]
        for i in range(l2 * l2, (l2 + 1) ** 2)
        for m in _monomials(lmax, order - 1)
    ]
    result = products.new_zeros(2 * l3 + 1, len(places))
    return result.index_add(1, torch.tensor(index), products)


@cache
def _monomials(lmax: int, order: int) -> list[tuple[int, ...]]:
    return list(combinations_with_replacement(range((lmax + 1) ** 2), order))


@constant_table
def _reduction(form: SymmetricForm) -> Tensor:
    """Return (n_independent, n_couplings): what each coupling is in the independent ones."""
    blocks = []
    for l, order in form.products():
        basis = symmetric_basis(form.lmax, l, order).flatten(0, 1)
        columns = published_columns(form.lmax, l, order).flatten(0, 1)
        blocks.append(torch.linalg.lstsq(basis, columns).solution)
    return torch.block_diag(*blocks)
