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
        normalization: As in :func:`~atomeq.ops.spherical_harmonics.spherical_harmonics`.

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
