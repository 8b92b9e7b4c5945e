"""The weighted geometric product as registered operations.

It is one form F(x, y, w, z) = sum of sign w[path] x[left] y[right] z[output] over rows, channels
and terms, linear in each of its four arguments: the product is its derivative by z, gradients are
those by x, y and w, and the gradients of these again derivatives of F. So two operations suffice
for derivatives of any order: one gives multivectors, one weights.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from atomeq.ops.clifford.algebra import Algebra
from atomeq.ops.registration import kernels_of, registered

Gradients = dict[str, Tensor | list[Tensor] | None]
#: Which multivector is computed -> the two it is computed of, in this order.
FACTORS = {
    "left": ("right", "output"),
    "right": ("left", "output"),
    "output": ("left", "right"),
}


def code_of(algebra: Algebra) -> str:
    """Return an algebra as a string, which is what an operation of a traced graph can carry."""
    return f"{algebra.p} {algebra.q} {algebra.sharing}"


def algebra_from(code: str) -> Algebra:
    """Return the algebra that :func:`code_of` wrote."""
    p, q, sharing = code.split()
    return Algebra(int(p), int(q), sharing)  # type: ignore[arg-type]


def _fake_product(call: SimpleNamespace) -> Tensor:
    return torch.empty_like(call.first)


def _product_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> Gradients:
    slots = FACTORS[saved.wanted]
    known = {slots[0]: saved.first, slots[1]: saved.second, saved.wanted: grad}
    found: Gradients = {}
    for name, slot in zip(("first", "second"), slots, strict=True):
        if name in wanted:
            found[name] = _product(known, slot, saved.weights, saved.algebra, saved.kernels)
    if "weights" in wanted:
        found["weights"] = clifford_weights(
            known["left"], known["right"], known["output"], saved.algebra, saved.kernels
        )
    return found


@registered(outputs=_fake_product, gradient=_product_gradient)
def clifford_product(
    first: Tensor, second: Tensor, weights: Tensor | None, wanted: str, algebra: str, kernels: str
) -> Tensor:
    """Return the derivative of F by the multivector ``wanted``, (n, 2^n, C)."""
    by = kernels_of("clifford", kernels)
    return by.product(first, second, weights, wanted, algebra_from(algebra))


def _fake_weights(call: SimpleNamespace) -> Tensor:
    return call.left.new_empty(algebra_from(call.algebra).n_paths, call.left.shape[-1])


def _weights_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> Gradients:
    known = {slot: getattr(saved, slot) for slot in FACTORS}
    slots = [slot for slot in FACTORS if slot in wanted]
    return {slot: _product(known, slot, grad, saved.algebra, saved.kernels) for slot in slots}


@registered(outputs=_fake_weights, gradient=_weights_gradient)
def clifford_weights(
    left: Tensor, right: Tensor, output: Tensor, algebra: str, kernels: str
) -> Tensor:
    """Return the derivative of F by the weights, (n_paths, C)."""
    return kernels_of("clifford", kernels).weights(left, right, output, algebra_from(algebra))


def _product(
    known: dict[str, Tensor], wanted: str, weights: Tensor | None, algebra: str, kernels: str
) -> Tensor:
    first, second = (known[slot] for slot in FACTORS[wanted])
    return clifford_product(first, second, weights, wanted, algebra, kernels)
