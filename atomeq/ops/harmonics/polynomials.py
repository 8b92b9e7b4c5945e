"""The recursion that defines the real spherical harmonics; every backend is held to it.

Tables of Wigner matrices and sphere grids are made with it too, so it imports no backend.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Normalization = Literal["component", "integral", "norm"]


def harmonic_polynomials(
    vectors: Float[Tensor, "*batch 3"], lmax: int, normalization: Normalization = "component"
) -> Float[Tensor, "*batch n_sph"]:
    """Evaluate the homogeneous polynomials by recursion: the definition every backend meets.

    Args:
        vectors: (*, 3).
        lmax: Highest degree.
        normalization: As in :func:`~atomeq.ops.harmonics.operations.spherical_harmonics`.

    Returns:
        (*, n_sph).
    """
    x, y, z = vectors.unbind(-1)
    squared = vectors.square().sum(-1)
    scale = [degree_scale(l, normalization) for l in range(lmax + 1)]
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


def directions(vectors: Float[Tensor, "*batch 3"]) -> tuple[Tensor, Tensor]:
    """Return unit vectors and lengths (*, 1); a zero vector stays zero and has length 1."""
    squared = vectors.square().sum(-1, keepdim=True)
    lengths = torch.where(squared > 0, squared, 1.0).sqrt()
    return vectors / lengths, lengths


def legendre_start(m: int) -> float:
    """Return P_m^m / sin^m, 'component' normalised."""
    start = math.sqrt(math.prod([(2 * k + 1) / (2 * k) for k in range(1, m + 1)]))
    return start * (math.sqrt(2.0) if m else 1.0)


def legendre_step(l: int, m: int) -> tuple[float, float]:
    """Return a and b of P_l = a y P_(l-1) - b r^2 P_(l-2), for l > m."""
    step = math.sqrt((4 * l * l - 1) / (l * l - m * m))
    if l == m + 1:
        return step, 0.0
    return step, step * math.sqrt(((l - 1) ** 2 - m * m) / (4 * (l - 1) ** 2 - 1))


def degree_scale(l: int, normalization: Normalization) -> float:
    """Return the factor from 'component' harmonics to others."""
    if normalization == "integral":
        return 1 / math.sqrt(4 * math.pi)
    return 1 / math.sqrt(2 * l + 1) if normalization == "norm" else 1.0


def _legendre(y: Tensor, squared: Tensor, m: int, lmax: int) -> list[Tensor]:
    """Return P_l^m / sin^m for l = m..lmax, 'component' normalised and homogeneous in (y, r)."""
    polynomials = [torch.full_like(y, legendre_start(m))]
    if lmax > m:
        polynomials.append(polynomials[0] * y * legendre_step(m + 1, m)[0])
    for l in range(m + 2, lmax + 1):
        step, back = legendre_step(l, m)
        polynomials.append((y * step) * polynomials[-1] - back * squared * polynomials[-2])
    return polynomials
