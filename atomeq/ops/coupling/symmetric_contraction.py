"""The symmetric contraction of MACE: products of up to n features of an atom, coupled to degree l.

B_lm = Σ_n Σ_q W_nq Σ_(i1 ≤ … ≤ in) S_n[m, i1 … in, q] x_i1 … x_in, channel by channel and with
weights of each element (Batatia et al., arXiv:2206.07697, eq. 10 and 11), in the basis of
symmetric_contraction_basis.py. Kernels have one operation closed under derivatives.

    F(x, w, z) = sum over atoms, terms and channels of c w_q z_m x_i1 ... x_in

is linear in the weights w and in z, and a polynomial in x. Its derivatives in directions h of x,
D^k F(x)[h_1, ..., h_k], are linear in each h too. If g is the cotangent of dF/ds for a linear
argument s, then <g, dF/ds> is F with g in the place of s; for s = x it is F with one more
direction. So one operation, the partial derivatives of D^k F, has derivatives of every order.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atomeq.ops.coupling.symmetric_contraction_basis import SymmetricForm, Term, form_of
from atomeq.ops.dispatch import operation, size_of
from atomeq.ops.registration import kernel
from atomeq.ops.self_check import Example, indices, random
from atomeq.ops.specification import Size
from atomeq.ops.tables import constant_table, table_like
from atomeq.typing import NodeFeatures


def _verified(
    x: Tensor, weights: Tensor, species: Tensor, degrees: Sequence[int], order: int
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


def _by_kernels(
    x: Tensor,
    weights: Tensor,
    species: Tensor,
    degrees: Sequence[int],
    order: int,
    kernels: str,
) -> Tensor:
    lmax = form_of(x.shape[1], degrees, order).lmax
    given = (x, [], weights, None, species, "z", lmax, list(degrees), order, kernels)
    return symmetric_partials(*given)[0]


def _example(size: Size) -> Example:
    """Return features of atoms of two elements, and weights of products of two."""
    degrees = tuple(range(min(size.lmax, 1) + 1))
    n_columns = form_of((size.lmax + 1) ** 2, degrees, 2).n_columns
    x = random(size, 5, (size.lmax + 1) ** 2, size.channels)
    weights, species = random(size, 2, n_columns, size.channels), indices(size, 3, 5)

    def compute(operation, x: Tensor, weights: Tensor) -> Tensor:
        return operation(x, weights, species, degrees=degrees, order=2)

    return [x, weights], compute


@operation(_verified, by_kernels=_by_kernels, example=_example)
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


def _fake_partials(call: SimpleNamespace) -> list[Tensor]:
    x = call.x
    n_rows = SymmetricForm(call.lmax, tuple(call.degrees), call.order).n_rows
    shapes = {"z": (x.shape[0], n_rows, x.shape[2]), "weights": call.weights.shape}
    return [x.new_empty(shapes.get(argument, x.shape)) for argument in call.arguments.split()]


def _partials_gradient(
    saved: SimpleNamespace, wanted: set[str], grads: list[Tensor | None]
) -> dict[str, Tensor | list[Tensor | None]]:
    """Differentiate partial derivatives of D^k F: they are others, with grads in their place."""
    directions = [f"directions.{k}" for k in range(len(saved.directions))]
    found: dict[str, Tensor] = {}
    for place, grad in zip(saved.arguments.split(), grads, strict=True):
        given = {"weights": saved.weights, "z": saved.z}
        along = dict(zip(directions, saved.directions, strict=True))
        others = [
            name
            for name in ("x", *directions, "weights", "z")
            if name in wanted and (name != place or name == "x") and given.get(name, 0) is not None
        ]
        if grad is None or not others:
            continue
        (along if place in along or place == "x" else given)[place] = grad
        partials = symmetric_partials(
            *(saved.x, list(along.values()), given["weights"], given["z"], saved.species),
            *(" ".join(others), saved.lmax, saved.degrees, saved.order, saved.kernels),
        )
        for name, partial in zip(others, partials, strict=True):
            found[name] = partial if name not in found else found[name] + partial
    return {
        **{name: found[name] for name in ("x", "weights", "z") if name in found},
        "directions": [found.get(name) for name in directions],
    }


@kernel(outputs=_fake_partials, gradient=_partials_gradient)
def symmetric_partials(
    x: Tensor,
    directions: list[Tensor],
    weights: Tensor,
    z: Tensor | None,
    species: Tensor,
    arguments: str,
    lmax: int,
    degrees: list[int],
    order: int,
    kernels: str,
) -> list[Tensor]:
    """Return the partial derivatives of D^k F by the named arguments, in the shapes of these.

    Arguments are ``x``, ``directions.0`` and so on, ``weights`` and ``z``, which may be missing
    where only its own derivative is asked for.
    """
    ...
