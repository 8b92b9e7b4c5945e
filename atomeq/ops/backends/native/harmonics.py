"""Spherical harmonics and their form by the C kernel, and the tables these read."""

import ctypes
import functools

import torch
from torch import Tensor

from atomeq.ops.backends.native.builder import load, n_threads, source_of, unavailable
from atomeq.ops.harmonic_polynomials import (
    Normalization,
    degree_scale,
    harmonic_polynomials,
    legendre_start,
    legendre_step,
)
from atomeq.ops.specification import OpSpec
from atomeq.ops.tables import constant_table, table_like

REALS = {torch.float32: "float", torch.float64: "double"}
_VECTORS_PER_THREAD = 2000  # fewer do not pay for a thread
_ZERO = 1e-9  # of a coefficient of A_i, which is of the order of 1 or nothing


class CPUHarmonicsKernels:
    """See :class:`~atomeq.ops.registered.kernel_sets.HarmonicsKernels`."""

    def refusal(self, spec: OpSpec) -> str | None:
        """Refuse other devices and dtypes, and machines without a C compiler."""
        if spec.device.type != "cpu":
            return "its kernels run on a CPU"
        if spec.dtype not in REALS:
            return f"its kernels know float32 and float64, not {spec.dtype}"
        return unavailable()

    def harmonics(
        self, vectors: Tensor, lmax: int, normalization: Normalization, normalize: bool
    ) -> Tensor:
        """Evaluate the harmonics."""
        vectors = vectors.contiguous()
        values = vectors.new_empty(len(vectors), (lmax + 1) ** 2)
        table = table_like(_recursion, lmax, normalization, like=vectors)
        _library(vectors.dtype).harmonics(
            vectors.data_ptr(), values.data_ptr(), len(vectors), lmax, table.data_ptr(),
            normalize, _threads(len(vectors)),
        )  # fmt: skip
        return values

    def form(
        self,
        g: Tensor | None,
        h: Tensor | None,
        values: Tensor | None,
        wanted: tuple[str, ...],
        normalization: Normalization,
    ) -> list[Tensor]:
        """Return the partial derivatives of G."""
        given = {
            name: None if part is None else part.contiguous()
            for name, part in {"g": g, "h": h, "values": values}.items()
        }
        like = given["g"] if given["g"] is not None else given["values"]
        assert like is not None  # one argument may be missing
        n, n_sph = like.shape
        results = {
            name: like.new_empty(n, 3) if name == "h" else torch.empty_like(like) for name in wanted
        }
        lmax = round(n_sph**0.5) - 1
        places = _slope_places(lmax)
        coefficients = table_like(_slope_coefficients, lmax, normalization, like=like)
        _library(like.dtype).harmonics_form(
            *(_at(given[name]) for name in ("g", "h", "values")),
            *(_at(results.get(name)) for name in ("g", "h", "values")),
            n, n_sph, places.data_ptr(), len(places), coefficients.data_ptr(), _threads(n),
        )  # fmt: skip
        return [results[name] for name in wanted]


def _library(dtype: torch.dtype) -> ctypes.CDLL:
    return _declared(load(source_of("harmonics.c", {"REAL": REALS[dtype]})))


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.harmonics.argtypes = (pointer, pointer, size, number, pointer, number, number)
    library.harmonics.restype = None
    library.harmonics_form.argtypes = (
        *(pointer,) * 6, size, number, pointer, number, pointer, number,
    )  # fmt: skip
    library.harmonics_form.restype = None
    return library


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
        _, slopes = torch.func.jvp(lambda v: harmonic_polynomials(v, lmax), (points,), (along,))
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
    return max(1, min(n_threads(), n // _VECTORS_PER_THREAD))


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
