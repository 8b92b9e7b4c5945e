"""The symmetric contraction as one registered operation closed under derivatives.

    F(x, w, z) = sum over atoms, terms and channels of c w_q z_m x_i1 ... x_in

is linear in the weights w and in z, and a polynomial in x. Its derivatives in directions h of x,
D^k F(x)[h_1, ..., h_k], are linear in each h too. If g is the cotangent of dF/ds for a linear
argument s, then <g, dF/ds> is F with g in the place of s; for s = x it is F with one more
direction. So one operation, the partial derivatives of D^k F, has derivatives of every order.
"""

from collections.abc import Sequence
from types import SimpleNamespace

from torch import Tensor

from atomeq.ops.coupling.symmetric_contraction_basis import SymmetricForm, form_of
from atomeq.ops.registration import kernels_of, registered


def symmetric_contraction(
    x: Tensor,
    weights: Tensor,
    species: Tensor,
    *,
    degrees: Sequence[int],
    order: int,
    kernels: str,
) -> Tensor:
    """Contract products of features with themselves by some kernels."""
    lmax = form_of(x.shape[1], degrees, order).lmax
    (result,) = symmetric_partials(
        x, [], weights, None, species, "z", lmax, list(degrees), order, kernels
    )
    return result


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


@registered(outputs=_fake_partials, gradient=_partials_gradient)
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
    form = SymmetricForm(lmax, tuple(degrees), order)
    wanted = tuple(arguments.split())
    return kernels_of("coupling", kernels).symmetric_partials(
        x, directions, weights, z, species, wanted, form
    )
