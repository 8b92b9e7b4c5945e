"""Normalisation and update of atoms by the C kernels."""

from types import SimpleNamespace

import torch
from torch import Tensor

from atomeq.ops.c_compiler import c_library, refusal, threads_for

__all__ = ["atom_norm", "atom_norm_gradient", "atom_update", "atom_update_gradient", "refusal"]

_NORMED_PER_THREAD, _UPDATED_PER_THREAD = 2**18, 2**14  # fewer numbers do not pay for a thread
# Of update_t, the names of atom_update and those of its products.
_MAPS = ("x", "first", "first_bias", "gates", "gates_bias", "second")
_PRODUCTS = ("left", "left_bias", "right", "right_bias", "out", "out_bias", "points")


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
        threads_for(x.numel(), _NORMED_PER_THREAD),
    )
    return result


def atom_update(call: SimpleNamespace) -> Tensor:
    """Return the gated update, (n_atoms, n_sph, c_out)."""
    result = call.x.new_empty(*call.x.shape[:2], call.second.shape[1])
    return _update("update_value", call, result, second_bias=call.second_bias)


def atom_update_gradient(call: SimpleNamespace) -> Tensor:
    """Return the gradient of the update by its features."""
    return _update("update_gradient", call, torch.empty_like(call.x), grad=call.grad)


def _update(name: str, call: SimpleNamespace, result: Tensor, **given: Tensor | None) -> Tensor:
    x, (n_degrees, hidden, channels) = call.x, call.first.shape
    products = dict(zip(_PRODUCTS, call.products, strict=bool(call.products)))
    library = c_library("atoms/cpu/update.c", x.dtype, LMAX=n_degrees - 1)
    arguments = library.update_t(
        n_atoms=len(x),
        channels=channels,
        hidden=hidden,
        c_out=call.second.shape[1],
        inside=products["left"].shape[1] if products else 0,
        n_points=len(products["points"]) if products else 0,
        n_parts=threads_for(x.numel(), _UPDATED_PER_THREAD),
        **{key: getattr(call, key) for key in _MAPS},
        **products,
        **given,
        result=result,
    )
    if not getattr(library, name)(arguments):
        raise MemoryError(f"no memory for the update of {len(x)} atoms")
    return result
