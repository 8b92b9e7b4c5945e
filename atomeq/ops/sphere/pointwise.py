"""The product of two functions on the sphere in plain torch, registered for its derivatives.

The form is symmetric in the two factors and the output, so its derivatives are of the same form,
and nothing is kept but the factors.
"""

from types import SimpleNamespace

from torch import Tensor

from atomeq.ops.registration import registered


def _like_product(call: SimpleNamespace) -> Tensor:
    x = call.x
    return x.new_empty(*x.shape[:-2], call.out.shape[1], x.shape[-1])


def _exchanged(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> dict[str, Tensor]:
    """Exchange the output for one of the factors: the form is symmetric in all three."""
    x, y, left, right, out = saved.x, saved.y, saved.left, saved.right, saved.out
    gradients = {}
    if "x" in wanted:
        gradients["x"] = pointwise_product(grad, y, out, right, left)
    if "y" in wanted:
        gradients["y"] = pointwise_product(grad, x, out, left, right)
    return gradients


@registered(outputs=_like_product, gradient=_exchanged)
def pointwise_product(x: Tensor, y: Tensor, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Return out^T ((left x) * (right y)), each table of size (n_points, its rows)."""
    return out.mT @ ((left @ x) * (right @ y))
