"""Spherical harmonics and their form by the C kernel, and the tables these read."""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from atomeq.ops.c_compiler import REALS, load, n_threads, refusal, source_of
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


def harmonics(vectors: Tensor, lmax: int, normalization: Normalization, normalize: bool) -> Tensor:
    """Return Y of vectors (n, 3), or of their directions, (n, n_sph)."""
    vectors = vectors.contiguous()
    n = vectors.shape[0]
    values = vectors.new_empty(n, (lmax + 1) ** 2)
    kernel, table = _forward(vectors.dtype, lmax, normalization)
    kernel(vectors.data_ptr(), values.data_ptr(), n, table, normalize, _threads(n))
    return values


def harmonics_slope(
    vectors: Tensor, g: Tensor, lmax: int, normalization: Normalization, normalize: bool
) -> Tensor:
    """Return J^T g, (n, 3), for g (n, n_sph)."""
    vectors, g = vectors.contiguous(), g.contiguous()
    result = torch.empty_like(vectors)
    _library(vectors.dtype, lmax).harmonics_slope(
        *(tensor.data_ptr() for tensor in (vectors, g, result)),
        *_constants(len(vectors), lmax, normalization, vectors),
        *(normalize, _threads(len(vectors))),
    )
    return result


def harmonics_second(
    vectors: Tensor,
    g: Tensor,
    h: Tensor,
    lmax: int,
    normalization: Normalization,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Return the derivatives of <h, J^T g>: by g, (n, n_sph), and by the vectors, (n, 3)."""
    vectors, g, h = vectors.contiguous(), g.contiguous(), h.contiguous()
    results = torch.empty_like(g), torch.empty_like(vectors)
    _library(vectors.dtype, lmax).harmonics_second(
        *(tensor.data_ptr() for tensor in (vectors, g, h, *results)),
        *_constants(len(vectors), lmax, normalization, vectors),
        *(normalize, _threads(len(vectors))),
    )
    return results


@functools.cache
def _library(dtype: torch.dtype, lmax: int) -> ctypes.CDLL:
    macros = {"REAL": REALS[dtype], "BYTES": dtype.itemsize, "LMAX": lmax}
    library = load(source_of("harmonics/cpu/harmonics.c", macros))
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    constants = (size, pointer, pointer, pointer, number, number, number)
    library.harmonics.argtypes = (pointer, pointer, size, pointer, number, number)
    library.harmonics_slope.argtypes = (*(pointer,) * 3, *constants)
    library.harmonics_second.argtypes = (*(pointer,) * 5, *constants)
    for function in (library.harmonics, library.harmonics_slope, library.harmonics_second):
        function.restype = None
    return library


@functools.cache
def _forward(
    dtype: torch.dtype, lmax: int, normalization: Normalization
) -> tuple[Callable[..., None], int]:
    """Return the kernel and where its table lies: looked up once, a call is as short as that."""
    table = table_like(
        _recursion, lmax, normalization, like=torch.empty(0, dtype=dtype, device="cpu")
    )
    return _library(dtype, lmax).harmonics, table.data_ptr()  # the cache keeps the table


def _constants(n: int, lmax: int, normalization: Normalization, like: Tensor) -> tuple[int, ...]:
    """Return what the derivatives read besides: n, the recursion and the elements of A_i."""
    table = table_like(_recursion, lmax, normalization, like=like)
    coefficients = table_like(_slope_coefficients, lmax, normalization, like=like)
    places = _slope_places(lmax)
    return n, table.data_ptr(), places.data_ptr(), coefficients.data_ptr(), len(places)


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
    most = n // _VECTORS_PER_THREAD
    return min(n_threads(), most) if most > 1 else 1
