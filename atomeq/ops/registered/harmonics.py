"""Spherical harmonics as a registered operation: their derivatives are harmonics again.

The homogeneous harmonics of degree l have as derivatives those of degree l - 1: dY/dv_i = A_i Y
with constant matrices A_i. So every derivative of any order is made of Y and of the form

    G(g, h, Y) = sum_i h_i <g, A_i Y>,

linear in each argument, whose derivatives are forms of the same kind.
"""

from types import SimpleNamespace

from torch import Tensor

from atomeq.ops.harmonic_polynomials import Normalization, directions
from atomeq.ops.registered.kernel_sets import harmonics_kernels
from atomeq.ops.registered.registration import registered

ARGUMENTS = ("g", "h", "values")


def _fake_harmonics(
    vectors: Tensor, lmax: int, normalization: str, normalize: bool, kernels: str
) -> Tensor:
    return vectors.new_empty(vectors.shape[0], (lmax + 1) ** 2)


def _harmonics_gradient(
    saved: SimpleNamespace, wanted: set[str], grad: Tensor
) -> dict[str, Tensor | list[Tensor] | None]:
    norm, kernels = saved.normalization, saved.kernels
    values = harmonics(saved.vectors, saved.lmax, norm, saved.normalize, kernels)
    (slope,) = harmonics_form(grad, None, values, "h", norm, kernels)
    if saved.normalize:  # only a turn of the vector changes its direction
        unit, lengths = directions(saved.vectors)
        slope = (slope - unit * (unit * slope).sum(-1, keepdim=True)) / lengths
    return {"vectors": slope}


@registered(fake=_fake_harmonics, gradient=_harmonics_gradient)
def harmonics(
    vectors: Tensor, lmax: int, normalization: str, normalize: bool, kernels: str
) -> Tensor:
    """Return Y of the vectors (n, 3), or of their directions, (n, n_sph)."""
    return harmonics_kernels(kernels).harmonics(vectors, lmax, _norm(normalization), normalize)


def _fake_form(
    g: Tensor | None,
    h: Tensor | None,
    values: Tensor | None,
    arguments: str,
    normalization: str,
    kernels: str,
) -> list[Tensor]:
    like = g if g is not None else values
    assert like is not None  # one argument may be missing
    return [
        like.new_empty(len(like), 3) if argument == "h" else like.new_empty(like.shape)
        for argument in arguments.split()
    ]


def _form_gradient(
    saved: SimpleNamespace, wanted: set[str], grads: list[Tensor | None]
) -> dict[str, Tensor | list[Tensor] | None]:
    given = {argument: getattr(saved, argument) for argument in ARGUMENTS}
    found: dict[str, Tensor | list[Tensor] | None] = {}
    for place, grad in zip(saved.arguments.split(), grads, strict=True):
        others = [name for name in ARGUMENTS if name in wanted and name != place]
        if grad is None or not others:
            continue
        partials = harmonics_form(
            **given | {place: grad},
            arguments=" ".join(others),
            normalization=saved.normalization,
            kernels=saved.kernels,
        )
        for name, partial in zip(others, partials, strict=True):
            found[name] = partial if name not in found else found[name] + partial
    return found


@registered(fake=_fake_form, gradient=_form_gradient)
def harmonics_form(
    g: Tensor | None,
    h: Tensor | None,
    values: Tensor | None,
    arguments: str,
    normalization: str,
    kernels: str,
) -> list[Tensor]:
    """Return the partial derivatives of G by the named arguments; one that is alone may be None."""
    wanted = tuple(arguments.split())
    return harmonics_kernels(kernels).form(g, h, values, wanted, _norm(normalization))


def _norm(name: str) -> Normalization:
    return "norm" if name == "norm" else "integral" if name == "integral" else "component"
