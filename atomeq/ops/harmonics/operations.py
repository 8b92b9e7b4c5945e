"""Real spherical harmonics as polynomials in x, y, z: the angular basis of every model.

The convention is e3nn's: the polar axis is y, the three harmonics of l = 1 are (x, y, z), and
Y_lm is proportional to P_l^|m|(y) times the real (m >= 0) or imaginary (m < 0) part of
(z + i x)^|m|.
"""

from typing import get_args

from jaxtyping import Float
from torch import Tensor

from atomeq.ops.dispatch import operation
from atomeq.ops.harmonics import registered
from atomeq.ops.harmonics.polynomials import Normalization, directions, harmonic_polynomials
from atomeq.ops.specification import Size, size_of

_NORMALIZATIONS = get_args(Normalization)


def _verified(
    vectors: Float[Tensor, "*batch 3"],
    lmax: int,
    *,
    normalize: bool = True,
    normalization: Normalization = "component",
) -> Size:
    if lmax < 0:
        raise ValueError(f"lmax is {lmax}; it must be 0 or more")
    if vectors.shape[-1:] != (3,):
        raise ValueError(f"vectors have shape {tuple(vectors.shape)}; the last axis must be 3 long")
    if normalization not in _NORMALIZATIONS:
        allowed = ", ".join(_NORMALIZATIONS)
        raise ValueError(f"normalization {normalization!r} is unknown; choose one of {allowed}")
    return size_of(vectors, vectors.numel() // 3, lmax=lmax, mmax=lmax)


@operation(_verified, by_kernels=registered.spherical_harmonics)
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
