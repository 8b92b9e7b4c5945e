"""SO(2) maps and the radial factors of their input as registered operations.

<g, M(w) x> is linear in g, w and x; the map, its transpose and the gradient of its weights are its
derivatives with respect to each, so every gradient is made of the other two.

With a and b rows of edges (n_edges, n_rows * c) and s one factor for each (l, |m|, channel), which
+m and -m share, the form sum s a b is linear in all three. Its derivatives by a and by s are the
scaled rows s b and the products a b summed over +m and -m: each one's gradient is made of both.

Sizes are those of an :class:`~atomeq.ops.edge.so2_shape.SO2Shape`.
"""

from collections.abc import Sequence
from types import SimpleNamespace

from torch import Tensor

from atomeq.ops.edge.so2_shape import SO2Shape, shape_of, so2_shape, views
from atomeq.ops.registration import kernels_of, registered

Gradients = dict[str, Tensor | list[Tensor] | list[Tensor | None] | None]


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    lmax: int,
    mmax: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    n_scalars: int | None = None,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    """Mix degrees and channels within each order by some kernels."""
    shape = so2_shape(x.shape[2], weights, lmax, mmax, n_scalars)
    sizes, rows = list(shape), x.flatten(1)
    if scale is not None:
        rows = scaled_rows(rows, scale, sizes, kernels)
    y = so2_forward(rows, views(weights), bias, sizes, kernels)
    scalars, rows = y.split([shape.n_scalars, shape.n_rows * shape.c_out], dim=1)
    return rows.unflatten(1, (shape.n_rows, shape.c_out)), scalars


def _fake_forward(call: SimpleNamespace) -> Tensor:
    return call.rows.new_empty(call.rows.shape[0], shape_of(call.sizes).width)


def _forward_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> Gradients:
    found = _linear_gradients(saved, wanted, saved.rows, grad)
    if "rows" in wanted:
        found["rows"] = so2_transposed(grad, saved.weights, saved.sizes, saved.kernels)
    if "bias" in wanted:
        found["bias"] = grad[:, : shape_of(saved.sizes).n_biases].sum(0)
    return found


@registered(outputs=_fake_forward, gradient=_forward_gradient, only_for={"rows": ("weights",)})
def so2_forward(
    rows: Tensor, weights: list[Tensor], bias: Tensor | None, sizes: list[int], kernels: str
) -> Tensor:
    """Return M rows + bias, (n_edges, n_rows * c_in) -> (n_edges, width).

    The bias is that of m = 0, whose outputs come first.
    """
    shape = shape_of(sizes)
    out = rows.new_empty(len(rows), shape.width)
    return kernels_of("edge", kernels).SO2Map(weights, shape).forward(rows.contiguous(), out, bias)


def _fake_transposed(call: SimpleNamespace) -> Tensor:
    return call.grad.new_empty(call.grad.shape[0], shape_of(call.sizes).width_in)


def _transposed_gradient(saved: SimpleNamespace, wanted: set[str], cotangent: Tensor) -> Gradients:
    found = _linear_gradients(saved, wanted, cotangent, saved.grad)
    if "grad" in wanted:
        found["grad"] = so2_forward(cotangent, saved.weights, None, saved.sizes, saved.kernels)
    return found


@registered(
    outputs=_fake_transposed, gradient=_transposed_gradient, only_for={"grad": ("weights",)}
)
def so2_transposed(grad: Tensor, weights: list[Tensor], sizes: list[int], kernels: str) -> Tensor:
    """Return M^T grad, (n_edges, width) -> (n_edges, n_rows * c_in)."""
    shape = shape_of(sizes)
    out = grad.new_empty(len(grad), shape.width_in)
    return kernels_of("edge", kernels).SO2Map(weights, shape).transposed(grad.contiguous(), out)


def _linear_gradients(
    saved: SimpleNamespace, wanted: set[str], rows: Tensor, grad: Tensor
) -> Gradients:
    if "weights" not in wanted:
        return {}
    complex_ = [weight.ndim == 3 for weight in saved.weights]
    return {"weights": list(so2_weight_gradient(rows, grad, complex_, saved.sizes, saved.kernels))}


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
) -> Gradients:
    zeros = _empty_weights(saved.rows, saved.complex_, shape_of(saved.sizes))
    weights = [z if c is None else c for z, c in zip(zeros, cotangents, strict=True)]
    found: Gradients = {}
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
    shape, by = shape_of(sizes), kernels_of("edge", kernels)
    into = _empty_weights(rows, complex_, shape)
    by.add_weight_gradients(rows.contiguous(), grad.contiguous(), into, shape)
    return into


def _fake_scaled(call: SimpleNamespace) -> Tensor:
    return call.rows.new_empty(call.rows.shape)


def _scaled_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> Gradients:
    found: Gradients = {}
    if "rows" in wanted:
        found["rows"] = scaled_rows(grad, saved.scale, saved.sizes, saved.kernels)
    if "scale" in wanted:
        found["scale"] = row_products(grad, saved.rows, saved.sizes, saved.kernels)
    return found


@registered(outputs=_fake_scaled, gradient=_scaled_gradient, only_for={"rows": ("scale",)})
def scaled_rows(rows: Tensor, scale: Tensor, sizes: list[int], kernels: str) -> Tensor:
    """Return s rows, (n_edges, n_rows * c_in), with s (n_edges, n_scales)."""
    by = kernels_of("edge", kernels)
    return by.scaled_rows(rows.contiguous(), scale.contiguous(), shape_of(sizes))


def _fake_products(call: SimpleNamespace) -> Tensor:
    return call.left.new_empty(call.left.shape[0], shape_of(call.sizes).n_scales)


def _products_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> Gradients:
    found: Gradients = {}
    for one, other in (("left", saved.right), ("right", saved.left)):
        if one in wanted:
            found[one] = scaled_rows(other, grad, saved.sizes, saved.kernels)
    return found


@registered(outputs=_fake_products, gradient=_products_gradient)
def row_products(left: Tensor, right: Tensor, sizes: list[int], kernels: str) -> Tensor:
    """Return the products of two edges' rows, summed over +m and -m, (n_edges, n_scales)."""
    by = kernels_of("edge", kernels)
    return by.row_products(left.contiguous(), right.contiguous(), shape_of(sizes))
