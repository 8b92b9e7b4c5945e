"""The C kernels of edges: rotations, SO(2) maps, their gate and factors, and a whole layer.

What comes and goes with a block of edges lies in memory that the next block uses again.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from atomeq.ops.c_compiler import load, refusal
from atomeq.ops.edge.cpu.arguments import (
    address,
    addresses,
    generator_elements,
    numbers_of_atoms,
    source,
    threads_for,
)
from atomeq.ops.edge.cpu.memory import empty
from atomeq.ops.edge.cpu.whole_layer import layer_gradient, layer_second, layer_value
from atomeq.ops.edge.layer import WayIn
from atomeq.ops.edge.so2_shape import SO2Shape
from atomeq.ops.edge.wigner import tilt_tables
from atomeq.ops.orders import orders_of, row_degrees
from atomeq.ops.tables import constant_table

__all__ = ["empty", "layer_gradient", "layer_second", "layer_value", "refusal"]

_LAYER_BLOCK = 2**18  # numbers of the widest rows of an edge layer
_LEAST_EDGES, _MOST_EDGES = 400, 1024  # of a block; matrix products want some rows
_MAP_EDGES_PER_THREAD = 48  # fewer do not pay for a thread

# Arguments of the functions in C: p is a pointer, n a number.
_FUNCTIONS = {
    "edge": {
        "gather_rotate": "pppnppnn",
        "rotate_scatter": "pppnppnn",
        "torque": "ppppnppppnn",
        "gather_gradient": "pppnppppppppnn",
        "moved_scaled": "pppppnn",
        "scale_second": "ppppppppppnn",
        "gate": "pppnn",
        "gate_gradient": "ppppnn",
        "gate_second": "ppppppnn",
    },
    "so2": {
        "packed_size": "nnnn",
        "panels_size": "n",
        "pack_map": "ppnnnnp",
        "map_rows": "pppnnnnpnn",
        "map_weights": "pppnnnppnn",
    },
    "wigner": {"edge_wigner": "pppnpn"},
}


@functools.cache
def _library(name: str, dtype: torch.dtype, lmax: int, mmax: int) -> ctypes.CDLL:
    library = load(source(name, dtype, lmax, mmax))
    for function, arguments in _FUNCTIONS[name].items():
        kinds = [ctypes.c_void_p if kind == "p" else ctypes.c_int64 for kind in arguments]
        getattr(library, function).argtypes = kinds
        getattr(library, function).restype = ctypes.c_int64 if "size" in function else None
    return library


def _rotations(wigner: Tensor) -> ctypes.CDLL:
    return _library("edge", wigner.dtype, *orders_of(wigner.shape[1], wigner.shape[2]))


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def gather_rotate(
    x: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    *,
    scale: Tensor | None = None,
    operand: bool = False,
) -> Tensor:
    """Return scale * W G x, (n_edges, n_rows, S * channels); an operand is like any other here.

    Args:
        x: (n_atoms, n_sph, channels), or of the edges if there are no indices.
        wigner: (n_edges, n_rows, n_sph), in m-primary order and block diagonal in l; the product
            with an infinitesimal rotation from the right is still that.
        indices: Atoms of the edges, (n_edges,), joined along the channels.
        scale: (n_edges, sum over m of (lmax - m + 1) * S * channels); +m and -m share theirs.
        operand: Whether the result is read by a map alone, and may have the precision of those.
    """
    x, wigner, scale = x.contiguous(), wigner.contiguous(), _plain(scale)
    ends = [numbers_of_atoms(index, x) for index in indices]
    rows = empty((*wigner.shape[:2], max(1, len(ends)) * x.shape[2]), x)
    _rotations(wigner).gather_rotate(
        *(address(x), address(wigner), addresses(ends), len(ends)),
        *(address(scale), address(rows), len(rows), x.shape[2]),
    )
    return rows


def rotate_scatter(
    rows: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    segments: Sequence[Tensor],
    n_atoms: int,
    *,
    factor: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Return G^T W^T (factor * rows), (n_atoms, n_sph, channels), added to the total if given.

    ``factor`` is (n_edges,). Without indices the result is of each edge.
    """
    rows, wigner, factor = rows.contiguous(), wigner.contiguous(), _plain(factor)
    if total is None:
        size = (n_atoms if indices else len(rows), wigner.shape[2])
        total = rows.new_zeros(*size, rows.shape[2] // max(1, len(indices)))
    ends = [numbers_of_atoms(index, total) for index in indices]
    _rotations(wigner).rotate_scatter(
        *(address(rows), address(wigner), addresses(ends), len(ends)),
        *(address(factor), address(total), len(rows), total.shape[2]),
    )
    return total


def torque(x: Tensor, rows: Tensor, wigner: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """Return <W^T rows, X_k G x> for the three generators X_k, (n_edges, 3)."""
    x, rows, wigner = x.contiguous(), rows.contiguous(), wigner.contiguous()
    ends = [numbers_of_atoms(index, x) for index in indices]
    found = rows.new_empty(len(rows), 3)
    _rotations(wigner).torque(
        *(address(x), address(rows), address(wigner), addresses(ends), len(ends)),
        *map(address, generator_elements(x.dtype, x.shape[1])),
        *(address(found), len(rows), x.shape[2]),
    )
    return found


def gather_gradient(
    x: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    segments: Sequence[Tensor],
    grad: Tensor,
    scale: Tensor | None,
    shape: SO2Shape,
    into: WayIn,
) -> None:
    """Give the gradients of <grad, s W G x>; grad, (n_edges, n_rows * c_in), may change.

    Without ``scale`` the factors are 1.
    """
    x, wigner, scale = x.contiguous(), wigner.contiguous(), _plain(scale)
    ends = [numbers_of_atoms(index, x) for index in indices]
    _rotations(wigner).gather_gradient(
        *(address(x), address(wigner), addresses(ends), len(ends)),
        *map(address, (grad, scale, *into, *generator_elements(x.dtype, x.shape[1]))),
        *(len(grad), x.shape[2]),
    )


def edge_wigner(vectors: Tensor, lmax: int, mmax: int) -> Tensor:
    """Return the rows that take edges to +y, (n_edges, n_rows, n_sph)."""
    degrees, tables = _wigner_tables(vectors.dtype, lmax, mmax)
    vectors = vectors.contiguous()
    wigner = vectors.new_empty(len(vectors), len(degrees), (lmax + 1) ** 2)
    _library("wigner", vectors.dtype, lmax, 0).edge_wigner(
        *map(address, (vectors, degrees, tables)), len(degrees), address(wigner), len(vectors)
    )
    return wigner


class SO2Map:
    """The map M of some weights, packed in the order in which the kernel reads them."""

    def __init__(self, weights: list[Tensor], shape: SO2Shape) -> None:
        self.shape = shape
        self.weights = [weight.contiguous() for weight in weights]
        self._library = _library("so2", weights[0].dtype, shape.lmax, shape.mmax)
        self._complex = _complex(weights)
        self._packed: dict[int, Tensor] = {}

    def forward(
        self, rows: Tensor, out: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Return M rows + bias, (n_edges, n_rows * c_in) -> (n_edges, width).

        The bias, if there is one, belongs to the first of the outputs, those of m = 0.
        """
        out = empty((len(rows), self.shape.width), rows) if out is None else out
        self._multiply(rows, out, 0)
        if bias is not None:
            out[:, : len(bias)] += bias
        return out

    def gated(self, rows: Tensor, out: Tensor, bias: Tensor | None, *, keep: bool) -> Tensor:
        """Write y = M rows + bias to ``out``; return a(y)."""
        return Gate(self.forward(rows, out, bias), self.shape).value()

    def transposed(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Return M^T grad, (n_edges, width) -> (n_edges, n_rows * c_in)."""
        out = empty((len(grad), self.shape.width_in), grad) if out is None else out
        self._multiply(grad, out, 1)
        return out

    def _multiply(self, rows: Tensor, out: Tensor, back: int) -> None:
        sizes = (back, *self.shape[2:])
        if back not in self._packed:
            packed = empty((self._library.packed_size(*sizes),), self.weights[0])
            places = addresses(self.weights)
            self._library.pack_map(places, self._complex, *sizes, packed.data_ptr())
            self._packed[back] = packed
        self._library.map_rows(
            *(address(rows), self._packed[back].data_ptr(), self._complex, *sizes),
            *(address(out), len(rows), threads_for(len(rows), _MAP_EDGES_PER_THREAD)),
        )


def add_weight_gradients(rows: Tensor, grad: Tensor, into: list[Tensor], shape: SO2Shape) -> None:
    """Add the gradients of <grad, M rows> with respect to the weights to ``into``."""
    library = _library("so2", rows.dtype, shape.lmax, shape.mmax)
    panels = empty((library.panels_size(shape.c_in),), rows)
    library.map_weights(
        *(address(rows), address(grad), _complex(into), *shape[2:], addresses(into)),
        *(address(panels), len(rows), threads_for(len(rows), _MAP_EDGES_PER_THREAD)),
    )


def _complex(weights: list[Tensor]) -> ctypes.Array:
    return (ctypes.c_int64 * len(weights))(*[weight.ndim == 3 for weight in weights])


class Gate:
    """SiLU on l = 0, sigmoid gates on l > 0: value a(y), Jacobian J and second derivative.

    Of y, (n_edges, lmax * channels + n_rows * channels), the gates of l = 1..lmax come first.
    """

    def __init__(self, y: Tensor, shape: SO2Shape) -> None:
        self.y = y
        self.shape = shape
        # the gates and the row l = 0 lie side by side
        scalars = y[:, : (shape.lmax + 1) * shape.c_out]
        self.sigmoid = torch.sigmoid(scalars, out=empty(scalars.shape, y))

    def value(self) -> Tensor:
        """Return SiLU of l = 0, and gated rows, (n_edges, n_rows * channels)."""
        value = empty((len(self.y), self.shape.n_rows * self.shape.c_out), self.y)
        self._call("gate", value)
        return value

    def gradient(self, grad: Tensor) -> Tensor:
        """Return J^T grad, like y."""
        result = empty(self.y.shape, self.y)
        self._call("gate_gradient", grad, result)
        return result

    def second(self, moved: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return J moved, like a, and the gradient of <moved, J^T grad> in y, like y."""
        value, curved = empty(grad.shape, grad), empty(self.y.shape, self.y)
        self._call("gate_second", moved, grad, value, curved)
        return value, curved

    def _call(self, name: str, *tensors: Tensor) -> None:
        function = getattr(_library("edge", self.y.dtype, *self.shape[:2]), name)
        given = (self.y, self.sigmoid, *tensors)
        function(*map(address, given), len(self.y), self.shape.c_out)


def moved_scaled(
    rows: Tensor, moved: Tensor, scale: Tensor, moved_scale: Tensor | None, shape: SO2Shape
) -> Tensor:
    """Return z' = s r' + s' r, the derivative of z = s r along a direction."""
    moved_z = empty(rows.shape, rows)
    given = (rows, moved, scale.contiguous(), _plain(moved_scale), moved_z)
    library = _library("edge", rows.dtype, *shape[:2])
    library.moved_scaled(*map(address, given), len(rows), shape.c_in)
    return moved_z


def scaled_second(
    rows: Tensor,
    moved: Tensor,
    grad: Tensor,
    moved_grad: Tensor | None,
    scale: Tensor,
    moved_scale: Tensor | None,
    shape: SO2Shape,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the gradients g' of z = s r along a direction, from dE/dz and its derivative.

    These are dE/dr = s g, its derivative s' g + s g', dE/ds = g r, and its derivative g r' + g' r.
    No derivative of g means 0, and the second result is None where both of its terms are.
    """
    through, moved_through, scaled_grad = (empty(t.shape, t) for t in (scale, scale, grad))
    moves = moved_grad is not None or moved_scale is not None
    found = empty(grad.shape, grad) if moves else None
    given = (rows, moved, grad, moved_grad, scale.contiguous(), _plain(moved_scale))
    library = _library("edge", rows.dtype, *shape[:2])
    results = (scaled_grad, found, through, moved_through)
    library.scale_second(*map(address, (*given, *results)), len(rows), shape.c_in)
    return scaled_grad, found, through, moved_through


def scaled_rows(rows: Tensor, scale: Tensor, shape: SO2Shape) -> Tensor:
    """Return s rows, (n_edges, n_rows * c_in), for factors s (n_edges, n_scales)."""
    result = torch.empty_like(rows)
    for block in shape.blocks:
        for columns in block.inputs:
            torch.mul(rows[:, columns], scale[:, block.scales], out=result[:, columns])
    return result


def row_products(left: Tensor, right: Tensor, shape: SO2Shape) -> Tensor:
    """Return the products of rows, summed over +m and -m, (n_edges, n_scales)."""
    result = left.new_empty(len(left), shape.n_scales)
    for block in shape.blocks:
        part = result[:, block.scales]
        torch.mul(left[:, block.inputs[0]], right[:, block.inputs[0]], out=part)
        for columns in block.inputs[1:]:
            part.addcmul_(left[:, columns], right[:, columns])
    return result


def edges_at_once(first: SO2Shape) -> int:
    """Return how many edges keep a layer's rows in the cache."""
    return min(max(_LAYER_BLOCK // max(1, first.width_in), _LEAST_EDGES), _MOST_EDGES)


@functools.cache
def _wigner_tables(dtype: torch.dtype, lmax: int, mmax: int) -> tuple[Tensor, Tensor]:
    """Return the degree of each row, and the factors of its elements."""
    return row_degrees(lmax, mmax), _dense_rows(lmax, mmax).to(dtype)


@constant_table
def _dense_rows(lmax: int, mmax: int) -> Tensor:
    """Return, row by row, the factors of cos(k beta), k <= l, and of sin(k beta), 1 <= k <= l."""
    tilt = tilt_tables(lmax, mmax)[0]  # (2 lmax + 2, n_rows, n_sph)
    parts = []
    for row, l in enumerate(row_degrees(lmax, mmax).tolist()):
        own = tilt[:, row, l * l : (l + 1) ** 2]
        parts += [own[: l + 1], own[lmax + 2 : lmax + 2 + l]]
    return torch.cat([part.flatten() for part in parts])
