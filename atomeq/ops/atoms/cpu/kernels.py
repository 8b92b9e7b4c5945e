"""Normalisation and gate of atoms by the C kernels."""

from types import SimpleNamespace

import torch
from torch import Tensor

from atomeq.ops.c_compiler import c_library, refusal, threads_for

__all__ = ["atom_norm", "atom_norm_gradient", "gate", "gate_gradient", "refusal"]

_NUMBERS_PER_THREAD = 2**14  # fewer do not pay for a thread


def atom_norm(call: SimpleNamespace) -> Tensor:
    """Return the normalised features, (n_atoms, n_sph, channels)."""
    return _norm("norm", call, call.bias)


def atom_norm_gradient(call: SimpleNamespace) -> Tensor:
    """Return the gradient of the norm by its features."""
    return _norm("norm_gradient", call, call.grad, call.centred)


def _norm(name: str, call: SimpleNamespace, *given: Tensor | bool | None) -> Tensor:
    x, weight, result = call.x, call.weight, torch.empty_like(call.x)
    getattr(c_library("atoms/cpu/atoms.c", x.dtype), name)(
        *(x, weight, *given, len(x), len(weight) - 1, x.shape[2], call.epsilon, result),
        threads_for(x.numel(), _NUMBERS_PER_THREAD),
    )
    return result


def gate(x: Tensor, gates: Tensor) -> Tensor:
    """Apply SiLU to l = 0 and sigmoid gates to l > 0, in place.

    Args:
        x: (n_sph, n_atoms, channels), contiguous.
        gates: (n_atoms, lmax * channels).
    """
    _gate("gate", x, gates)
    return x


def gate_gradient(x: Tensor, gates: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by x and by the gates, in place of ``grad`` and of the gates."""
    _gate("gate_gradient", x, gates, grad)
    return grad, gates


def _gate(name: str, x: Tensor, gates: Tensor, *grad: Tensor) -> None:
    n_atoms, channels = x.shape[1:]
    getattr(c_library("atoms/cpu/atoms.c", x.dtype), name)(
        *(x, gates, *grad, n_atoms, gates.shape[1] // channels, channels),
        threads_for(x.numel(), _NUMBERS_PER_THREAD),
    )
