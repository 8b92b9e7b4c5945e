"""Normalisation and gate of atoms by the C kernels."""

import ctypes
import functools

import torch
from torch import Tensor

from atomeq.ops.c_compiler import REALS, load, n_threads, refusal, source_of

__all__ = ["gate", "gate_gradient", "norm", "norm_gradient", "refusal"]

_NUMBERS_PER_THREAD = 2**14  # fewer do not pay for a thread


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """Return the normalised features, (n_atoms, n_sph, channels)."""
    x, weight = x.contiguous(), weight.contiguous()
    bias, result = None if bias is None else bias.contiguous(), torch.empty_like(x)
    _library(x.dtype).norm(
        *(x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr()),
        *(len(x), len(weight) - 1, x.shape[2], epsilon, result.data_ptr(), _parts(x)),
    )
    return result


def norm_gradient(x: Tensor, weight: Tensor, grad: Tensor, centred: bool, epsilon: float) -> Tensor:
    """Return the gradient of the norm by its features."""
    x, weight, grad = x.contiguous(), weight.contiguous(), grad.contiguous()
    result = torch.empty_like(x)
    _library(x.dtype).norm_gradient(
        *(x.data_ptr(), weight.data_ptr(), grad.data_ptr(), centred),
        *(len(x), len(weight) - 1, x.shape[2], epsilon, result.data_ptr(), _parts(x)),
    )
    return result


def gate(x: Tensor, gates: Tensor) -> Tensor:
    """Apply SiLU to l = 0 and sigmoid gates to l > 0, in place.

    Args:
        x: (n_sph, n_atoms, channels), contiguous.
        gates: (n_atoms, lmax * channels).
    """
    n_atoms, channels = x.shape[1:]
    _library(x.dtype).gate(
        *(x.data_ptr(), gates.data_ptr(), n_atoms, gates.shape[1] // channels, channels, _parts(x))
    )
    return x


def gate_gradient(x: Tensor, gates: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by x and by the gates, in place of ``grad`` and of the gates."""
    n_atoms, channels = x.shape[1:]
    _library(x.dtype).gate_gradient(
        *(x.data_ptr(), gates.data_ptr(), grad.data_ptr()),
        *(n_atoms, gates.shape[1] // channels, channels, _parts(x)),
    )
    return grad, gates


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    library = load(source_of("atoms/cpu/atoms.c", {"REAL": REALS[dtype]}))
    pointer, size, number, parts = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
    sizes = (size, size, size)
    library.norm.argtypes = (pointer, pointer, pointer, *sizes, number, pointer, parts)
    library.norm_gradient.argtypes = (
        *(pointer, pointer, pointer, ctypes.c_int, *sizes, number, pointer, parts),
    )
    library.gate.argtypes = (pointer, pointer, *sizes, parts)
    library.gate_gradient.argtypes = (pointer, pointer, pointer, *sizes, parts)
    for name in ("norm", "norm_gradient", "gate", "gate_gradient"):
        getattr(library, name).restype = None
    return library


def _parts(x: Tensor) -> int:
    n = x.numel() // _NUMBERS_PER_THREAD
    return min(n_threads(), n) if n > 1 else 1
