"""SO(2) maps as registered operations: the map, its transpose and the gradient of its weights.

<g, M(w) x> is linear in g, w and x; the three operations are its derivatives with respect to each,
so every gradient is made of the other two.
"""

from types import SimpleNamespace

from torch import Tensor

from atomeq.ops.edge.kernel_sets import edge_kernels
from atomeq.ops.edge.so2_shape import SO2Shape, shape_of
from atomeq.ops.registration import registered


def _fake_forward(call: SimpleNamespace) -> Tensor:
    return call.rows.new_empty(call.rows.shape[0], shape_of(call.sizes).width)


def _forward_gradient(
    saved: SimpleNamespace, wanted: set[str], grad: Tensor
) -> dict[str, Tensor | list[Tensor] | None]:
    found: dict[str, Tensor | list[Tensor] | None] = {}
    if "rows" in wanted:
        found["rows"] = so2_transposed(grad, saved.weights, saved.sizes, saved.kernels)
    if "weights" in wanted:
        complex_ = [weight.ndim == 3 for weight in saved.weights]
        found["weights"] = list(
            so2_weight_gradient(saved.rows, grad, complex_, saved.sizes, saved.kernels)
        )
    if "bias" in wanted:
        found["bias"] = grad[:, : shape_of(saved.sizes).n_biases].sum(0)
    return found


@registered(outputs=_fake_forward, gradient=_forward_gradient, only_for={"rows": ("weights",)})
def so2_forward(
    rows: Tensor, weights: list[Tensor], bias: Tensor | None, sizes: list[int], kernels: str
) -> Tensor:
    """Return M rows + bias, (n_edges, n_rows * c_in) -> (n_edges, width); sizes: an SO2Shape.

    The bias is that of m = 0, whose outputs come first.
    """
    shape = shape_of(sizes)
    out = rows.new_empty(len(rows), shape.width)
    return edge_kernels(kernels).so2_map(weights, shape).forward(rows.contiguous(), out, bias)


def _fake_transposed(call: SimpleNamespace) -> Tensor:
    shape = shape_of(call.sizes)
    return call.grad.new_empty(call.grad.shape[0], shape.n_rows * shape.c_in)


def _transposed_gradient(
    saved: SimpleNamespace, wanted: set[str], cotangent: Tensor
) -> dict[str, Tensor | list[Tensor] | None]:
    found: dict[str, Tensor | list[Tensor] | None] = {}
    if "grad" in wanted:
        found["grad"] = so2_forward(cotangent, saved.weights, None, saved.sizes, saved.kernels)
    if "weights" in wanted:
        complex_ = [weight.ndim == 3 for weight in saved.weights]
        found["weights"] = list(
            so2_weight_gradient(cotangent, saved.grad, complex_, saved.sizes, saved.kernels)
        )
    return found


@registered(
    outputs=_fake_transposed, gradient=_transposed_gradient, only_for={"grad": ("weights",)}
)
def so2_transposed(grad: Tensor, weights: list[Tensor], sizes: list[int], kernels: str) -> Tensor:
    """Return M^T grad, (n_edges, width) -> (n_edges, n_rows * c_in)."""
    shape = shape_of(sizes)
    out = grad.new_empty(len(grad), shape.n_rows * shape.c_in)
    return edge_kernels(kernels).so2_map(weights, shape).transposed(grad.contiguous(), out)


def _empty_weights(like: Tensor, complex_: list[bool], shape: SO2Shape) -> list[Tensor]:
    weights = []
    for block, both in zip(shape.blocks, complex_, strict=True):
        sizes = tuple(part[0].stop - part[0].start for part in (block.outputs, block.inputs))
        weights.append(like.new_zeros(2, *sizes) if both else like.new_zeros(sizes))
    return weights


def _fake_weight_gradient(call: SimpleNamespace) -> list[Tensor]:
    return _empty_weights(call.rows, call.complex_, shape_of(call.sizes))


def _weight_gradient_gradient(
    saved: SimpleNamespace, wanted: set[str], cotangents: list[Tensor | None]
) -> dict[str, Tensor | list[Tensor] | None]:
    zeros = _empty_weights(saved.rows, saved.complex_, shape_of(saved.sizes))
    weights = [z if c is None else c for z, c in zip(zeros, cotangents, strict=True)]
    found: dict[str, Tensor | list[Tensor] | None] = {}
    if "rows" in wanted:
        found["rows"] = so2_transposed(saved.grad, weights, saved.sizes, saved.kernels)
    if "grad" in wanted:
        found["grad"] = so2_forward(saved.rows, weights, None, saved.sizes, saved.kernels)
    return found


@registered(outputs=_fake_weight_gradient, gradient=_weight_gradient_gradient)
def so2_weight_gradient(
    rows: Tensor, grad: Tensor, complex_: list[bool], sizes: list[int], kernels: str
) -> list[Tensor]:
    """Return the gradients of <grad, M rows> with respect to the weights."""
    shape = shape_of(sizes)
    into = _empty_weights(rows, complex_, shape)
    edge_kernels(kernels).add_weight_gradients(rows.contiguous(), grad.contiguous(), into, shape)
    return into


def so2_map(
    x: Tensor, weights: list[Tensor], shape: SO2Shape, bias: Tensor | None, kernels: str
) -> tuple[Tensor, Tensor]:
    """Return the rows (n_edges, n_rows, c_out) and the extra scalars (n_edges, n_scalars)."""
    y = so2_forward(x.flatten(1), weights, bias, list(shape), kernels)
    scalars, rows = y.split([shape.n_scalars, shape.n_rows * shape.c_out], dim=1)
    return rows.unflatten(1, (shape.n_rows, shape.c_out)), scalars
