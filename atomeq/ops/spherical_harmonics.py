"""Real spherical harmonics as polynomials in x, y, z: the angular basis of every model.

The convention is e3nn's: the polar axis is y, the three harmonics of l = 1 are (x, y, z), and
Y_lm is proportional to P_l^|m|(y) times the real (m >= 0) or imaginary (m < 0) part of
(z + i x)^|m|.
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from atomeq.ops.dispatch import select

Normalization = Literal["component", "integral", "norm"]


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
    if lmax < 0:
        raise ValueError(f"lmax is {lmax}; it must be 0 or more")
    if vectors.shape[-1:] != (3,):
        raise ValueError(f"vectors have shape {tuple(vectors.shape)}; the last axis must be 3 long")
    if normalization not in get_args(Normalization):
        allowed = ", ".join(get_args(Normalization))
        raise ValueError(f"normalization {normalization!r} is unknown; choose one of {allowed}")
    if normalize:
        squared = vectors.square().sum(-1, keepdim=True)
        vectors = vectors / torch.where(squared > 0, squared, 1.0).sqrt()
    backend = select(
        "spherical_harmonics",
        lmax=lmax,
        mmax=lmax,
        channels=1,
        n_edges=vectors[..., 0].numel(),
        like=vectors,
    )
    return backend.spherical_harmonics(vectors, lmax, normalization)


def harmonic_polynomials(
    vectors: Float[Tensor, "*batch 3"], lmax: int, normalization: Normalization = "component"
) -> Float[Tensor, "*batch n_sph"]:
    """Evaluate the homogeneous polynomials by recursion: the definition every backend meets.

    Args:
        vectors: (*, 3).
        lmax: Highest degree.
        normalization: As in :func:`spherical_harmonics`.

    Returns:
        (*, n_sph).
    """
    x, y, z = vectors.unbind(-1)
    squared = vectors.square().sum(-1)
    scale = [_degree_scale(l, normalization) for l in range(lmax + 1)]
    columns: list[Tensor | None] = [None] * (lmax + 1) ** 2
    cosine, sine = torch.ones_like(y), torch.zeros_like(y)  # Re, Im of (z + i x)^m
    for m in range(lmax + 1):
        if m > 0:
            cosine, sine = cosine * z - sine * x, cosine * x + sine * z
        for l, legendre in enumerate(_legendre(y, squared, m, lmax), start=m):
            scaled = legendre * scale[l] if scale[l] != 1.0 else legendre
            if m == 0:
                columns[l * l + l] = scaled
            else:
                columns[l * l + l + m] = scaled * cosine
                columns[l * l + l - m] = scaled * sine
    return torch.stack([column for column in columns if column is not None], dim=-1)


def _legendre(y: Tensor, squared: Tensor, m: int, lmax: int) -> list[Tensor]:
    """Return P_l^m / sin^m for l = m..lmax, 'component' normalised and homogeneous in (y, r)."""
    start = math.sqrt(math.prod((2 * k + 1) / (2 * k) for k in range(1, m + 1)))
    polynomials = [torch.full_like(y, start * (math.sqrt(2.0) if m else 1.0))]
    if lmax > m:
        polynomials.append(polynomials[0] * y * math.sqrt(2 * m + 3))
    for l in range(m + 2, lmax + 1):
        step = math.sqrt((4 * l * l - 1) / (l * l - m * m))
        back = math.sqrt(((l - 1) ** 2 - m * m) / (4 * (l - 1) ** 2 - 1))
        polynomials.append((y * step) * polynomials[-1] - (step * back) * squared * polynomials[-2])
    return polynomials


def _degree_scale(l: int, normalization: Normalization) -> float:
    if normalization == "integral":
        return 1 / math.sqrt(4 * math.pi)
    return 1 / math.sqrt(2 * l + 1) if normalization == "norm" else 1.0
