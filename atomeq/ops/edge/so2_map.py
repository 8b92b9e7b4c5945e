"""SO(2) maps and the radial factors of their input as registered operations.

<g, M(w) x> is linear in g, w and x; the map, its transpose and the gradient of its weights are its
derivatives with respect to each, so every gradient is made of the other two.

With a and b rows of edges (n_edges, n_rows * c) and s one factor for each (l, |m|, channel), which
+m and -m share, the form sum s a b is linear in all three. Its derivatives by a and by s are the
scaled rows s b and the products a b summed over +m and -m: each one's gradient is made of both.

An operation of a traced graph carries an :class:`SO2Shape` as a list of numbers.
"""

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

from torch import Tensor

from atomeq.ops.registration import kernels_of, registered

Gradients = dict[str, Tensor | list[Tensor] | list[Tensor | None] | None]


class Block(NamedTuple):
    """What one order m reads and writes: columns of the input, columns of the output."""

    order: int
    inputs: tuple[slice, ...]  # +m, -m; one for m = 0
    scales: slice  # of the factors that +m and -m share
    outputs: tuple[slice, ...]  # m = 0 includes the extra scalars, which come first


class SO2Shape(NamedTuple):
    """Sizes of the map (n_edges, n_rows * c_in) -> (n_edges, n_scalars + n_rows * c_out)."""

    lmax: int
    mmax: int
    c_in: int
    c_out: int
    n_scalars: int

    @property
    def n_rows(self) -> int:
        """Rows |m| <= mmax of an edge."""
        return (2 * self.mmax + 1) * (self.lmax + 1) - self.mmax * (self.mmax + 1)

    @property
    def n_scales(self) -> int:
        """Factors of an edge's input, one for each (l, |m|, channel)."""
        return (self.n_rows + self.lmax + 1) // 2 * self.c_in  # m = 0 has but one sign

    @property
    def width_in(self) -> int:
        """Numbers of an edge's input."""
        return self.n_rows * self.c_in

    @property
    def width(self) -> int:
        """Numbers of an edge's output."""
        return self.n_scalars + self.n_rows * self.c_out

    @property
    def n_biases(self) -> int:
        """Outputs of m = 0, extra scalars included."""
        return self.n_scalars + (self.lmax + 1) * self.c_out

    @property
    def blocks(self) -> list[Block]:
        """One for each order."""
        return _blocks(self)


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    lmax: int,
    mmax: int,
    bias: Tensor | None,
    scale: Tensor | None,
    n_scalars: int | None,
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


def so2_shape(
    c_in: int, weights: Sequence[Tensor], lmax: int, mmax: int, n_scalars: int | None
) -> SO2Shape:
    """Return the sizes of a map after checking every weight's shape against its input.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    if len(weights) != mmax + 1:
        raise ValueError(f"{len(weights)} weights given; mmax={mmax} needs one per order m")
    if mmax > 0 and weights[1].ndim >= 2:
        c_out = weights[1].shape[-2] // lmax
    else:
        c_out = (weights[0].shape[0] - (n_scalars or 0)) // (lmax + 1)
    if n_scalars is None:
        n_scalars = max(weights[0].shape[0] - (lmax + 1) * c_out, 0)
    expected: list[tuple[int, ...]] = []
    fits = True
    for m, weight in enumerate(weights):
        n, extra = lmax - m + 1, 0 if m else n_scalars
        real, shape = (extra + n * c_out, n * c_in), tuple(weight.shape)
        expected.append((2, *real) if m else real)
        fits = fits and (shape == real or shape == expected[m])
    if not fits:
        shapes = [tuple(weight.shape) for weight in weights]
        raise ValueError(f"weights are {shapes}; expected {expected} ({n_scalars} scalars)")
    return SO2Shape(lmax, mmax, c_in, c_out, n_scalars)


def shape_of(sizes: list[int]) -> SO2Shape:
    """Return the shape; a trace with symbolic sizes becomes one of these: they never change."""
    return SO2Shape(*map(int, sizes))


def views(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return views of the weights: of a leaf torch cannot tell whether its gradient is wanted."""
    return [weight.view_as(weight) if weight.requires_grad else weight for weight in weights]


@cache
def _blocks(shape: SO2Shape) -> list[Block]:
    found, start, scales, first = [], 0, 0, shape.n_scalars
    for m in range(shape.mmax + 1):
        step, step_out = (shape.lmax + 1 - m) * shape.c_in, (shape.lmax + 1 - m) * shape.c_out
        signs = range(1 if m == 0 else 2)
        inputs = tuple(slice(start + i * step, start + (i + 1) * step) for i in signs)
        outputs = tuple(slice(first + i * step_out, first + (i + 1) * step_out) for i in signs)
        if m == 0:
            outputs = (slice(0, outputs[0].stop),)
        found.append(Block(m, inputs, slice(scales, scales + step), outputs))
        start, scales, first = inputs[-1].stop, scales + step, outputs[-1].stop
    return found
