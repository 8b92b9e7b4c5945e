"""Real spherical harmonics as polynomials in x, y, z: the angular basis of every model.

The convention is e3nn's: the polar axis is y, the three harmonics of l = 1 are (x, y, z), and
Y_lm is proportional to P_l^|m|(y) times the real (m >= 0) or imaginary (m < 0) part of
(z + i x)^|m|.

With J = dY/dv the gradient of Y is J^T g, that of J^T g with cotangent h are J h and
d<h, J^T g>/dv: three registered operations. Third derivatives and those above come from plain
torch; nothing needs them in a hurry.
"""

from types import SimpleNamespace
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from atomeq.ops.dispatch import operation, size_of
from atomeq.ops.harmonics.polynomials import Normalization, directions, harmonic_polynomials
from atomeq.ops.registration import kernel
from atomeq.ops.specification import Size

_NORMALIZATIONS = get_args(Normalization)
Gradients = dict[str, Tensor | list[Tensor] | None]


def _verified(vectors: Tensor, lmax: int, normalize: bool, normalization: str) -> Size:
    if lmax < 0:
        raise ValueError(f"lmax is {lmax}; it must be 0 or more")
    if vectors.shape[-1:] != (3,):
        raise ValueError(f"vectors have shape {tuple(vectors.shape)}; the last axis must be 3 long")
    if normalization not in _NORMALIZATIONS:
        allowed = ", ".join(_NORMALIZATIONS)
        raise ValueError(f"normalization {normalization!r} is unknown; choose one of {allowed}")
    return size_of(vectors, vectors.numel() // 3, lmax=lmax, mmax=lmax)


def _by_kernels(
    vectors: Tensor, lmax: int, normalize: bool, normalization: str, kernels: str
) -> Tensor:
    if vectors.ndim == 2:  # the usual call; a view costs as much as the harmonics of a molecule
        return harmonics(vectors, lmax, normalization, normalize, kernels)
    values = harmonics(vectors.reshape(-1, 3), lmax, normalization, normalize, kernels)
    return values.view(*vectors.shape[:-1], values.shape[1])


@operation(_verified, by_kernels=_by_kernels)
def spherical_harmonics(
    vectors: Float[Tensor, "*batch 3"],
    lmax: int,
    *,
    normalize: bool = True,
    normalization: Normalization = "component",
) -> Float[Tensor, "*batch n_sph"]:
    """Evaluate the real spherical harmonics of degree 0 to lmax.

    Args:
        vectors: Points or directions, (*, 3).
        lmax: Highest degree.
        normalize: True evaluates on the direction; a zero vector then gives 0 for l > 0 and finite
            derivatives (their value there has no meaning, the direction being undefined). False
            evaluates the homogeneous polynomials, which scale as |v|^l and are smooth everywhere.
        normalization: ``component`` (the squares of a degree sum to 2l + 1), ``integral``
            (orthonormal over the sphere) or ``norm`` (the squares sum to 1).

    Returns:
        Coefficients, (*, n_sph), with (l, m) in column l*l + l + m.

    Raises:
        ValueError: If lmax is negative, the last axis is not 3 or the normalization is unknown.
    """
    points = directions(vectors)[0] if normalize else vectors
    return harmonic_polynomials(points, lmax, normalization)


def _fake_harmonics(call: SimpleNamespace) -> Tensor:
    return call.vectors.new_empty(call.vectors.shape[0], (call.lmax + 1) ** 2)


def _harmonics_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> Gradients:
    return {
        "vectors": harmonics_slope(
            saved.vectors, grad, saved.lmax, saved.normalization, saved.normalize, saved.kernels
        )
    }


@kernel(outputs=_fake_harmonics, gradient=_harmonics_gradient)
def harmonics(
    vectors: Tensor, lmax: int, normalization: str, normalize: bool, kernels: str
) -> Tensor:
    """Return Y of the vectors (n, 3), or of their directions, (n, n_sph)."""
    ...


def _fake_slope(call: SimpleNamespace) -> Tensor:
    return torch.empty_like(call.vectors)


def _slope_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> Gradients:
    to_g, to_vectors = harmonics_second(
        *(saved.vectors, saved.g, grad, saved.lmax, saved.normalization),
        *(saved.normalize, saved.kernels),
    )
    return {"g": to_g, "vectors": to_vectors}


@kernel(outputs=_fake_slope, gradient=_slope_gradient)
def harmonics_slope(
    vectors: Tensor, g: Tensor, lmax: int, normalization: str, normalize: bool, kernels: str
) -> Tensor:
    """Return J^T g, (n, 3)."""
    ...


def _fake_second(call: SimpleNamespace) -> tuple[Tensor, Tensor]:
    return torch.empty_like(call.g), torch.empty_like(call.vectors)


def _second_gradient(
    saved: SimpleNamespace, wanted: set[str], grad_g: Tensor | None, grad_vectors: Tensor | None
) -> Gradients:
    higher = torch.is_grad_enabled()
    norm = _norm(saved.normalization)
    with torch.enable_grad():
        # Views, because one of them may have been made from another, on a way that is not ours.
        v, g, h = (
            tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
            for tensor in (saved.vectors, saved.g, saved.h)
        )
        points = directions(v)[0] if saved.normalize else v
        values = harmonic_polynomials(points, saved.lmax, norm)
        (slope,) = torch.autograd.grad(values, v, g, create_graph=True)
        # Of the lowest degree nothing may be left that depends on the vectors.
        seconds = torch.autograd.grad(slope, (g, v), h, create_graph=True, allow_unused=True)
        given = [
            (second, grad)
            for second, grad in zip(seconds, (grad_g, grad_vectors), strict=True)
            if grad is not None and second is not None and second.requires_grad
        ]
        if not given:
            return {}
        found = torch.autograd.grad(
            [second for second, _ in given],
            (v, g, h),
            [grad for _, grad in given],
            create_graph=higher,
            allow_unused=True,
        )
    return dict(zip(("vectors", "g", "h"), found, strict=True))


@kernel(outputs=_fake_second, gradient=_second_gradient)
def harmonics_second(
    vectors: Tensor,
    g: Tensor,
    h: Tensor,
    lmax: int,
    normalization: str,
    normalize: bool,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    """Return the derivatives of <h, J^T g> by g, (n, n_sph), and by the vectors, (n, 3)."""
    ...


def _norm(name: str) -> Normalization:
    return "norm" if name == "norm" else "integral" if name == "integral" else "component"
