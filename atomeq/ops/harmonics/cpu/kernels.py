"""Spherical harmonics and their form by the C kernel, and the tables these read."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from atomeq.ops.c_compiler import c_library, refusal, threads_for
from atomeq.ops.harmonics.polynomials import (
    Normalization,
    degree_scale,
    harmonic_polynomials,
    legendre_start,
    legendre_step,
)
from atomeq.ops.tables import constant_table, table_like

__all__ = ["harmonics", "harmonics_second", "harmonics_slope", "refusal"]

_VECTORS_PER_THREAD = 2000  # fewer do not pay for a thread
_COMPLEX_STEP = 1e-100  # its square vanishes beside 1
_ZERO = 1e-9  # of a coefficient of A_i, which is of the order of 1 or nothing


def harmonics(call: SimpleNamespace) -> Tensor:
    """Return Y of vectors (n, 3), or of their directions, (n, n_sph)."""
    vectors, n, lmax = call.vectors, len(call.vectors), call.lmax
    values = vectors.new_empty(n, (lmax + 1) ** 2)
    table = table_like(_recursion, lmax, call.normalization, like=vectors)
    _library(vectors, lmax).harmonics(vectors, values, n, table, call.normalize, _threads(n))
    return values


def harmonics_slope(call: SimpleNamespace) -> Tensor:
    """Return J^T g, (n, 3), for g (n, n_sph)."""
    vectors, result = call.vectors, torch.empty_like(call.vectors)
    _library(vectors, call.lmax).harmonics_slope(vectors, call.g, result, *_constants(call))
    return result


def harmonics_second(call: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Return the derivatives of <h, J^T g>: by g, (n, n_sph), and by the vectors, (n, 3)."""
    results = torch.empty_like(call.g), torch.empty_like(call.vectors)
    second = _library(call.vectors, call.lmax).harmonics_second
    second(call.vectors, call.g, call.h, *results, *_constants(call))
    return results


def _library(vectors: Tensor, lmax: int) -> Any:
    size = vectors.dtype.itemsize
    return c_library("harmonics/cpu/harmonics.c", vectors.dtype, BYTES=size, LMAX=lmax)


def _constants(call: SimpleNamespace) -> tuple[Any, ...]:
    """Return what the derivatives read besides: the recursion and the elements of A_i."""
    n, given = len(call.vectors), (call.lmax, call.normalization)
    table = table_like(_recursion, *given, like=call.vectors)
    coefficients = table_like(_slope_coefficients, *given, like=call.vectors)
    places = _slope_places(call.lmax)
    return n, table, places, coefficients, len(places), call.normalize, _threads(n)


@constant_table
def _recursion(lmax: int, normalization: Normalization) -> Tensor:
    """Return the coefficients of the recursion in the order that harmonics.c reads them."""
    n = lmax + 1
    steps = torch.zeros(2, n, n, dtype=torch.float64, device="cpu")
    for l in range(1, n):
        for m in range(l):
            steps[:, l, m] = torch.tensor(legendre_step(l, m), dtype=torch.float64)
    start = [legendre_start(m) for m in range(n)]
    scale = [degree_scale(l, normalization) for l in range(n)]
    ends = torch.tensor([start, scale], dtype=torch.float64, device="cpu")
    return torch.cat((ends[0], steps.flatten(), ends[1]))


@constant_table
def slope_matrices(lmax: int) -> Tensor:
    """Return A_i with dY/dv_i = A_i Y of 'component' harmonics, (3, n_sph, n_sph) float64.

    The derivatives of one degree at enough points are fitted by the harmonics of the degree below.
    """
    n_sph = (lmax + 1) ** 2
    random = torch.Generator().manual_seed(0)
    points = torch.randn(4 * n_sph, 3, dtype=torch.float64, generator=random, device="cpu")
    points /= torch.linalg.vector_norm(points, dim=1, keepdim=True)
    values = harmonic_polynomials(points, lmax)
    matrices = torch.zeros(3, n_sph, n_sph, dtype=torch.float64, device="cpu")
    for axis in range(3):
        along = torch.zeros_like(points)
        along[:, axis] = 1.0
        # A complex step: exact, and without autograd, below which a registered operation runs.
        stepped = harmonic_polynomials(torch.complex(points, _COMPLEX_STEP * along), lmax)
        slopes = stepped.imag / _COMPLEX_STEP
        for l in range(1, lmax + 1):
            rows, lower = slice(l * l, (l + 1) ** 2), slice((l - 1) ** 2, l * l)
            fitted = torch.linalg.lstsq(values[:, lower], slopes[:, rows]).solution
            matrices[axis, rows, lower] = fitted.T
    matrices[matrices.abs() < _ZERO] = 0.0
    return matrices


@constant_table
def _slope_places(lmax: int) -> Tensor:
    """Return slope_t of harmonics.c for each nonzero coefficient, (n_slopes, 3) int32."""
    return slope_matrices(lmax).transpose(0, 1).nonzero().to(torch.int32).contiguous()


@constant_table
def _slope_coefficients(lmax: int, normalization: Normalization) -> Tensor:
    row, axis, lower = _slope_places(lmax).long().unbind(1)
    scale = torch.tensor(
        [degree_scale(l, normalization) for l in range(lmax + 1) for _ in range(2 * l + 1)],
        dtype=torch.float64,
        device="cpu",
    )
    return slope_matrices(lmax)[axis, row, lower] * scale[row] / scale[lower]


def _threads(n: int) -> int:
    return threads_for(n, _VECTORS_PER_THREAD)
