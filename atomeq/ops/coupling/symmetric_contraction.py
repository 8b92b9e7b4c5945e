"""The symmetric contraction of MACE: products of up to n features of an atom, coupled to degree l.

B_lm = Σ_n Σ_q W_nq Σ_(i1 ≤ … ≤ in) S_n[m, i1 … in, q] x_i1 … x_in, channel by channel and with
weights of each element (Batatia et al., arXiv:2206.07697, eq. 10 and 11). A product does not know
the order of its factors, so what is kept of the generalised Clebsch-Gordan coefficients are the
coefficients of monomials, and of the couplings the linearly independent ones: 8 of 23 for l = 0,
12 of 51 for l = 1 and 14 of 65 for l = 2 at lmax = 3 and n = 3.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations_with_replacement

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atomeq.ops.coupling.clebsch_gordan import clebsch_gordan
from atomeq.ops.tables import constant_table, table_like
from atomeq.typing import NodeFeatures

_DEPENDENT = 1e-9  # of columns of norm 1 to 5: rounding where others span one, or where it vanishes

# 3j symbols that e3nn 0.4 has with the other sign: the published couplings are made of them.
_EARLIER_SIGNS = """\
122 133 144 155 166 212 221 313 331 346 364 414 436 441 445 454 456 463 465 515 544 546 551 555 564
566 616 634 643 645 654 656 661 665"""


def symmetric_contraction(
    x: NodeFeatures,
    weights: Mapping[int, Sequence[Float[Tensor, "n_species n_columns channels"]]],
    species: Int[Tensor, " n_atoms"],
) -> dict[int, Float[Tensor, "n_atoms n_m channels"]]:
    """Contract products of features with themselves.

    Args:
        x: Features of degrees 0 to lmax, of parity (-1)^l, (n_atoms, (lmax + 1)^2, channels).
        weights: Of each wanted degree l those of order 1, 2, …, (n_species, K, channels) with the K
            of :func:`symmetric_basis`.
        species: Row of the weights that each atom takes.

    Returns:
        l -> (n_atoms, 2l + 1, channels).

    Raises:
        ValueError: The features are of no whole degrees, or weights have another K.
    """
    lmax = math.isqrt(x.shape[1]) - 1
    if (lmax + 1) ** 2 != x.shape[1]:
        raise ValueError(f"x has {x.shape[1]} components; whole degrees have 1, 4, 9, 16, …")
    result: dict[int, Tensor] = {}
    for order in range(1, max(map(len, weights.values())) + 1):
        degrees = tuple(l for l, some in weights.items() if len(some) >= order)
        factors = table_like(_factors, lmax, degrees, order, like=x)
        monomials = x[:, factors[0]]
        for further in factors[1:]:
            monomials = monomials * x[:, further]  # (n_atoms, n_monomials, C)
        rows = table_like(_rows, lmax, degrees, order, like=x) @ monomials
        shapes = [(2 * l + 1, symmetric_basis(lmax, l, order).shape[2]) for l in degrees]
        parts = rows.split([n_m * n_columns for n_m, n_columns in shapes], dim=1)
        for l, shape, part in zip(degrees, shapes, parts, strict=True):
            weight = weights[l][order - 1]
            if weight.shape[1] != shape[1]:
                raise ValueError(
                    f"weights of degree {l}, order {order} have {weight.shape[1]} columns; "
                    f"features up to degree {lmax} have {shape[1]} independent ones"
                )
            own = weight.index_select(0, species)[:, None]  # (n_atoms, 1, K, C)
            term = (part.unflatten(1, shape) * own).sum(dim=2)
            result[l] = result[l] + term if l in result else term
    return result


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
    weights: Float[Tensor, "n_species n_columns channels"], lmax: int, l: int, order: int
) -> Float[Tensor, "n_species n_independent channels"]:
    """Turn weights of all published couplings into those of the independent ones."""
    return table_like(_reduction, lmax, l, order, like=weights) @ weights


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
def _reduction(lmax: int, l: int, order: int) -> Tensor:
    """Return (n_independent, n_couplings): what each coupling is in the independent ones."""
    basis = symmetric_basis(lmax, l, order).flatten(0, 1)
    return torch.linalg.lstsq(basis, published_columns(lmax, l, order).flatten(0, 1)).solution


@constant_table
def _all_rows(lmax: int, degrees: tuple[int, ...], order: int) -> Tensor:
    bases = [symmetric_basis(lmax, l, order) for l in degrees]
    return torch.cat([basis.transpose(1, 2).flatten(0, 1) for basis in bases])


def _used(lmax: int, degrees: tuple[int, ...], order: int) -> Tensor:
    return _all_rows(lmax, degrees, order).abs().amax(dim=0) > 1e-12


@constant_table
def _rows(lmax: int, degrees: tuple[int, ...], order: int) -> Tensor:
    """Return the bases one below the other, (rows, n_used), without monomials that none has."""
    return _all_rows(lmax, degrees, order)[:, _used(lmax, degrees, order)]


@constant_table
def _factors(lmax: int, degrees: tuple[int, ...], order: int) -> Tensor:
    """Return the components that each monomial of :func:`_rows` multiplies, (order, n_used)."""
    monomials = torch.tensor(_monomials(lmax, order), device="cpu")
    return monomials[_used(lmax, degrees, order)].T.contiguous()
