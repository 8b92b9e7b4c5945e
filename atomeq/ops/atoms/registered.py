"""Normalisation and update of atoms as registered operations, with their gradient by the features.

A gradient that is differentiated in its turn, as a Hessian asks, is that of plain torch.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from atomeq.ops.atoms import reference
from atomeq.ops.atoms.reference import Linear
from atomeq.ops.atoms.update import Update
from atomeq.ops.registration import differentiable_gradient, kernels_of, registered


def rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-5,
    kernels: str,
) -> Tensor:
    """Normalise by some kernels, or by plain torch where weights are trained."""
    if _trained(weight, bias):
        return reference.rms_norm(x, weight, bias, epsilon)
    return atom_norm(x, weight, bias, epsilon, kernels)


def gated_update(
    x: Tensor, first: Linear, gates: Linear, second: Linear, *, kernels: str
) -> Tensor:
    """Update by some kernels, or by plain torch where weights are trained."""
    weights = (*first, *gates, *second)
    if _trained(*weights):
        return reference.gated_update(x, first, gates, second)
    return atom_update(x, *weights, kernels)


def _trained(*weights: Tensor | None) -> bool:
    """Whether a weight is trained, be there a gradient now or not: one value has one way."""
    return any([weight is not None and weight.requires_grad for weight in weights])


def _like_x(call: SimpleNamespace) -> Tensor:
    return torch.empty_like(call.x)


def _norm_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> dict[str, Tensor]:
    given = saved.weight, saved.bias, saved.epsilon
    if torch.is_grad_enabled():
        return {
            "x": differentiable_gradient(lambda x: reference.rms_norm(x, *given), saved.x, grad)
        }
    centred = saved.bias is not None
    found = atom_norm_gradient(saved.x, saved.weight, grad, centred, saved.epsilon, saved.kernels)
    return {"x": found}


@registered(outputs=_like_x, gradient=_norm_gradient)
def atom_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, kernels: str
) -> Tensor:
    """Return the normalised features."""
    return kernels_of("atoms", kernels).norm(x, weight, bias, epsilon)


@registered(outputs=_like_x)
def atom_norm_gradient(
    x: Tensor, weight: Tensor, grad: Tensor, centred: bool, epsilon: float, kernels: str
) -> Tensor:
    """Return the gradient by the features; ``centred`` where the mean of l = 0 is removed."""
    return kernels_of("atoms", kernels).norm_gradient(x, weight, grad, centred, epsilon)


def _fake_update(call: SimpleNamespace) -> Tensor:
    return call.x.new_empty(*call.x.shape[:2], call.second.shape[1])


def _update_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> dict[str, Tensor]:
    first, gates = (saved.first, saved.first_bias), (saved.gates, saved.gates_bias)
    if torch.is_grad_enabled():
        second = saved.second, saved.second_bias

        def update(x: Tensor) -> Tensor:
            return reference.gated_update(x, first, gates, second)

        return {"x": differentiable_gradient(update, saved.x, grad)}
    return {"x": atom_update_gradient(saved.x, *first, *gates, saved.second, grad, saved.kernels)}


@registered(outputs=_fake_update, gradient=_update_gradient)
def atom_update(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    gates: Tensor,
    gates_bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    kernels: str,
) -> Tensor:
    """Return the update, (n_atoms, n_sph, c_out)."""
    update = Update(kernels_of("atoms", kernels), (first, first_bias), (gates, gates_bias))
    return update.value(x, (second, second_bias))


@registered(outputs=_like_x)
def atom_update_gradient(
    x: Tensor,
    first: Tensor,
    first_bias: Tensor | None,
    gates: Tensor,
    gates_bias: Tensor | None,
    second: Tensor,
    grad: Tensor,
    kernels: str,
) -> Tensor:
    """Return the gradient of the update by the features."""
    update = Update(kernels_of("atoms", kernels), (first, first_bias), (gates, gates_bias))
    return update.gradient(x, second, grad)
