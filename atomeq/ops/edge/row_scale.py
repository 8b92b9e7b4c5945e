"""The radial factors of an SO(2) map's input as registered operations closed under derivatives.

With a and b rows of edges (n_edges, n_rows * c) and s one factor for each (l, |m|, channel), which
+m and -m share, the form sum s a b is linear in all three. Its derivatives by a and by s are the
scaled rows s b and the products a b summed over +m and -m: each one's gradient is made of both.
"""

from types import SimpleNamespace

from torch import Tensor

from atomeq.ops.edge.kernel_sets import edge_kernels
from atomeq.ops.edge.so2_shape import SO2Shape, shape_of
from atomeq.ops.registration import registered


def _fake_scaled(call: SimpleNamespace) -> Tensor:
    return call.rows.new_empty(call.rows.shape)


def _scaled_gradient(
    saved: SimpleNamespace, wanted: set[str], grad: Tensor
) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {}
    if "rows" in wanted:
        found["rows"] = scaled_rows(grad, saved.scale, saved.sizes, saved.kernels)
    if "scale" in wanted:
        found["scale"] = row_products(grad, saved.rows, saved.sizes, saved.kernels)
    return found


@registered(outputs=_fake_scaled, gradient=_scaled_gradient, only_for={"rows": ("scale",)})
def scaled_rows(rows: Tensor, scale: Tensor, sizes: list[int], kernels: str) -> Tensor:
    """Return s rows, (n_edges, n_rows * c_in), with s (n_edges, n_scales); sizes: an SO2Shape."""
    shape = shape_of(sizes)
    return edge_kernels(kernels).scaled_rows(rows.contiguous(), scale.contiguous(), shape)


def _fake_products(call: SimpleNamespace) -> Tensor:
    return call.left.new_empty(call.left.shape[0], shape_of(call.sizes).n_scales)


def _products_gradient(
    saved: SimpleNamespace, wanted: set[str], grad: Tensor
) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {}
    if "left" in wanted:
        found["left"] = scaled_rows(saved.right, grad, saved.sizes, saved.kernels)
    if "right" in wanted:
        found["right"] = scaled_rows(saved.left, grad, saved.sizes, saved.kernels)
    return found


@registered(outputs=_fake_products, gradient=_products_gradient)
def row_products(left: Tensor, right: Tensor, sizes: list[int], kernels: str) -> Tensor:
    """Return the products of two edges' rows, summed over +m and -m, (n_edges, n_scales)."""
    shape = shape_of(sizes)
    return edge_kernels(kernels).row_products(left.contiguous(), right.contiguous(), shape)


def scale_by_row(x: Tensor, scale: Tensor, shape: SO2Shape, kernels: str) -> Tensor:
    """Return rows (n_edges, n_rows, c_in) times the factors that +m and -m share."""
    return scaled_rows(x.flatten(1), scale, list(shape), kernels).view(x.shape)
