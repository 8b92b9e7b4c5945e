"""The C kernels of edges: rotations, SO(2) maps, their gate and factors, and a whole layer.

What comes and goes with a block of edges lies in memory that the next block uses again.
"""

import functools
import math
import sys
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atomeq.ops.c_compiler import c_library, checked_index, refusal, threads_for
from atomeq.ops.edge import blockwise
from atomeq.ops.edge.along import Radial, gradient_along, rotate_along, scatter_along
from atomeq.ops.edge.blockwise import WayIn
from atomeq.ops.edge.escn_conv import EdgeLayer, Named, flat, grouped
from atomeq.ops.edge.so2_map import SO2Shape
from atomeq.ops.edge.wigner import generators, tilt_tables
from atomeq.ops.orders import orders_of, row_degrees
from atomeq.ops.tables import constant_table

__all__ = ["gradient_along", "refusal", "rotate_along", "scatter_along"]

_LAYER_BLOCK = 2**18  # numbers of the widest rows of an edge layer
_LEAST_EDGES, _MOST_EDGES = 400, 1024  # of a block; matrix products want some rows
_MAP_EDGES_PER_THREAD = 48  # fewer do not pay for a thread
_LAYER_EDGES_PER_THREAD = 500
_ROTATED_PER_THREAD = 2000
# Some dozens of edges go through all steps before they leave the cache. 24 are as fast in small
# layers, and a tenth slower in large ones.
_EDGES_AT_ONCE = 64
_MOST_INPUTS = 768  # of order 0: products of larger matrices outgrow the cache, and so2.c cuts them
_LEAST = 2**17  # bytes; the C library keeps what is smaller itself
_MOST = 2**26  # bytes of a thread that may lie idle
_EXCESS = 4  # times what is wanted may be given
_PAGE, _LINE = 4096, 64  # bytes
_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}
_MOVED = {"x", "vectors", "radial", "envelope"}


def escn_conv(call: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums on the atoms, y and u, in one call of C where that serves."""
    layer = EdgeLayer(call)
    if not _whole_layer_serves(layer):
        return blockwise.value(call)
    x, (first, second) = layer.tensors["x"], layer.shapes
    total = x.new_zeros(x.shape[0], x.shape[1], second.c_out)
    y, u = layer.kept(call.n_kept, first.width, second.width)
    inside = {"total": total} | dict(zip(("y", "u")[: call.n_kept], (y, u), strict=False))
    _call_layer(layer, "layer_value", inside)
    return total, y, u


def escn_conv_gradient(call: SimpleNamespace) -> list[Tensor]:
    """Return the wanted gradients, dE/da and dE/dz."""
    layer = EdgeLayer(call)
    if not _whole_layer_serves(layer):
        return blockwise.gradient(call)
    first, second = layer.shapes
    found = layer.gradients(call.wanted)
    ga, gz = layer.kept(call.n_kept, second.width_in, first.width_in)
    inside = {"grad": call.grad} | ({"ga": ga, "gz": gz} if call.n_kept else {})
    inside |= zip(("y", "u"), call.kept, strict=False)  # or nothing
    inside |= zip(("also_y", "also_u"), call.also, strict=False)
    _call_layer(layer, "layer_gradient", inside, found)
    return [*flat(call.wanted, found), ga, gz]


def escn_conv_second_gradient(call: SimpleNamespace) -> list[Tensor]:
    """Return the gradients of the gradient; along weights, as no force has it, blockwise."""
    layer = EdgeLayer(call)
    along = grouped(call.along, call.directions)
    if not _whole_layer_serves(layer) or not along.keys() <= _MOVED:
        return blockwise.second_gradient(call)
    found, inside = blockwise.second_gradients(call, layer)
    moved = {f"moved_{name}": tensor for name, tensor in along.items()}
    _call_layer(layer, "layer_second", inside | moved | {"grad": call.grad}, found)
    return flat(call.wanted, found)


def _whole_layer_serves(layer: EdgeLayer) -> bool:
    """Say whether layer.c gains by it, and knows what there is: no chiral weights, no biases."""
    if layer.tensors.keys() & {"first_bias", "second_bias"}:
        return False
    weights = [*layer.weights["first"], *layer.weights["second"]]
    return all([w.ndim == 2 for w in weights]) and weights[0].shape[1] <= _MOST_INPUTS


def _call_layer(layer: EdgeLayer, name: str, given: Named, found: Named | None = None) -> None:
    """Call a function of layer.c; the names of what it is given are those of layer_t."""
    x, (first, second) = layer.tensors["x"], layer.shapes
    library = c_library("edge/cpu/layer.c", x.dtype, LMAX=first.lmax, MMAX=first.mmax)
    tensors = layer.tensors | layer.weights | given
    tensors |= {f"to_{key}": result for key, result in (found or {}).items()}
    tensors |= zip(("generator", "place", "count"), _generators(x.dtype, x.shape[1]), strict=True)
    for end in ("source", "target"):
        tensors[end] = _atoms(tensors[end], x)
    arguments = library.layer_t(
        n_edges=layer.n_edges,
        n_atoms=x.shape[0],
        channels=x.shape[2],
        hidden=first.c_out,
        c_out=second.c_out,
        n_radial=tensors["radial"].shape[1] if "radial" in tensors else 0,
        at_once=_EDGES_AT_ONCE,
        n_parts=threads_for(layer.n_edges, _LAYER_EDGES_PER_THREAD),
        **tensors,
    )
    if not getattr(library, name)(arguments):
        raise MemoryError(f"no memory for the blocks of {layer.n_edges} edges")


def _atoms(index: Tensor, atoms: Tensor) -> Tensor:
    """Check again: a frame has been, a compiled graph comes with indices nobody has seen."""
    return checked_index(index, len(atoms), "an edge ends at an atom")


@functools.cache
def _generators(dtype: torch.dtype, n_sph: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the elements of the generators of rotations as the kernels take them.

    These are the values, one generator after the other, row and column of each, and where each
    generator starts and the last one ends.
    """
    table = generators(math.isqrt(n_sph) - 1)
    exist = table.abs() > 1e-9  # the others are rounding
    counts = [0, *exist.flatten(1).sum(1).cumsum(0).tolist()]
    places = exist.nonzero()[:, 1:].contiguous()
    return table[exist].to(dtype), places, torch.tensor(counts, device="cpu")


def _rotations(wigner: Tensor) -> Any:
    return _functions(wigner.dtype, *orders_of(wigner.shape[1], wigner.shape[2]))


def _functions(dtype: torch.dtype, lmax: int, mmax: int) -> Any:
    return c_library("edge/cpu/edge.c", dtype, LMAX=lmax, MMAX=mmax)


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def gather_rotate(
    x: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    *,
    scale: Tensor | None = None,
    radial: Radial | None = None,
    operand: bool = False,
) -> Tensor:
    """Return scale * W G x, (n_edges, n_rows, S * channels); an operand is like any other here.

    Args:
        x: (n_atoms, n_sph, channels), or of the edges if there are no indices.
        wigner: (n_edges, n_rows, n_sph), in m-primary order and block diagonal in l; the product
            with an infinitesimal rotation from the right is still that.
        indices: Atoms of the edges, (n_edges,), joined along the channels.
        scale: (n_edges, n_scales); +m and -m share theirs.
        radial: In the place of the scale: values, weight and bias that give it.
        operand: Whether a map alone reads the result.
    """
    scale = scale if radial is None else torch.nn.functional.linear(*radial)
    x, wigner, scale = x.contiguous(), wigner.contiguous(), _plain(scale)
    ends = [_atoms(index, x) for index in indices]
    rows = empty((*wigner.shape[:2], max(1, len(ends)) * x.shape[2]), x)
    _rotations(wigner).gather_rotate_on(
        *(x, wigner, ends, len(ends), scale, rows, len(rows), x.shape[2]),
        threads_for(len(rows), _ROTATED_PER_THREAD),
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
    ends = [_atoms(index, total) for index in indices]
    _rotations(wigner).rotate_scatter_on(
        *(rows, wigner, ends, len(ends), factor, total, len(rows), total.shape[2]),
        threads_for(len(rows), _ROTATED_PER_THREAD),
    )
    return total


def torque(x: Tensor, rows: Tensor, wigner: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """Return <W^T rows, X_k G x> for the three generators X_k, (n_edges, 3)."""
    x, rows, wigner = x.contiguous(), rows.contiguous(), wigner.contiguous()
    ends = [_atoms(index, x) for index in indices]
    found = rows.new_empty(len(rows), 3)
    _rotations(wigner).torque_on(
        *(x, rows, wigner, ends, len(ends), *_generators(x.dtype, x.shape[1])),
        *(found, len(rows), x.shape[2], threads_for(len(rows), _ROTATED_PER_THREAD)),
    )
    return found


def leave_gradient(
    x: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    rows: Tensor | None,
    factor: Tensor | None,
    to_factor: Tensor | None,
    turn: Tensor | None,
    also: Tensor | None,
    *,
    operand: bool = False,  # a CPU's products are not rounded
) -> Tensor:
    """Return f W G x + also, (n_edges, n_rows, channels); of <f W G x, rows> write gradients.

    That of f is written, turns are lessened by the torque; None is unwanted, or there are no rows.
    """
    found = gather_rotate(x, wigner, indices)
    if rows is not None and to_factor is not None:
        torch.linalg.vecdot(found.flatten(1), rows.flatten(1), out=to_factor)
    if rows is not None and turn is not None:
        own = torque(x, rows, wigner, indices)
        turn -= own if factor is None else own * factor[:, None]
    found = found if factor is None else found.mul_(factor[:, None, None])
    return found if also is None else found.add_(also)


def gather_gradient(
    x: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    segments: Sequence[Tensor],
    grad: Tensor,
    scale: Tensor | None,
    shape: SO2Shape,
    into: WayIn,
    z: Tensor | None,
) -> None:
    """Give the gradients of <grad, s W G x>, for grad (n_edges, n_rows * c_in).

    Without ``scale`` the factors are 1. z is s W G x, where that is wanted.
    """
    x, wigner, scale = x.contiguous(), wigner.contiguous(), _plain(scale)
    ends = [_atoms(index, x) for index in indices]
    given, sizes = (x, wigner, ends, len(ends)), (len(grad), x.shape[2])
    library = _rotations(wigner)
    if z is not None:
        library.gather_rotate(*given, scale, z, *sizes)
    if any([where is not None for where in into]):
        generator = _generators(x.dtype, x.shape[1])
        library.gather_gradient(*given, grad, scale, *into, *generator, *sizes)


def wigner_rows(call: SimpleNamespace) -> Tensor:
    """Return the rows that take edges to +y, (n_edges, n_rows, n_sph)."""
    vectors, lmax = call.vectors, call.lmax
    degrees, tables = _wigner_tables(vectors.dtype, lmax, call.mmax)
    wigner = vectors.new_empty(len(vectors), len(degrees), (lmax + 1) ** 2)
    library = c_library("edge/cpu/wigner.c", vectors.dtype, LMAX=lmax)
    library.edge_wigner(
        *(vectors, degrees, tables, len(degrees), wigner, len(vectors)),
        threads_for(len(vectors), _ROTATED_PER_THREAD),
    )
    return wigner


def vector_gradient(call: SimpleNamespace) -> Tensor:
    """Return sign t x v / |v|^2, (n_edges, 3)."""
    squared = call.vectors.square().sum(1, keepdim=True)
    return torch.linalg.cross(call.turn, call.vectors).mul_(call.sign / squared)


class SO2Map:
    """The map M of some weights, packed in the order in which the kernel reads them."""

    def __init__(self, weights: list[Tensor], shape: SO2Shape) -> None:
        self.shape = shape
        self.weights = [weight.contiguous() for weight in weights]
        self._library = _maps(weights[0].dtype, shape)
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

    def gated(self, rows: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Return a(y) of y = M rows + bias, which is written to ``out`` if it is to be kept."""
        return Gate(self.forward(rows, out, bias), self.shape).value()

    def transposed(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Return M^T grad, (n_edges, width) -> (n_edges, n_rows * c_in)."""
        out = empty((len(grad), self.shape.width_in), grad) if out is None else out
        self._multiply(grad, out, 1)
        return out

    def transposed_through(
        self,
        gate: "Gate",
        grad: Tensor,
        out: Tensor | None = None,
        also: Tensor | None = None,
        value: Tensor | None = None,
        *,
        operand: bool = False,
    ) -> Tensor:
        """Return J^T M^T grad + also, of the gate before the map; M^T grad goes to ``out``."""
        return gate.gradient(self.transposed(grad, out), also, value)

    def _multiply(self, rows: Tensor, out: Tensor, back: int) -> None:
        sizes, is_complex = (back, *self.shape[2:]), _complex(self.weights)
        if back not in self._packed:
            packed = empty((self._library.packed_size(*sizes),), self.weights[0])
            self._library.pack_map(self.weights, is_complex, *sizes, packed)
            self._packed[back] = packed
        n_threads = threads_for(len(rows), _MAP_EDGES_PER_THREAD)
        self._library.map_rows(
            rows, self._packed[back], is_complex, *sizes, out, len(rows), n_threads
        )


def add_weight_gradients(rows: Tensor, grad: Tensor, into: list[Tensor], shape: SO2Shape) -> None:
    """Add the gradients of <grad, M rows> with respect to the weights to ``into``."""
    library, n_threads = _maps(rows.dtype, shape), threads_for(len(rows), _MAP_EDGES_PER_THREAD)
    panels = empty((library.panels_size(shape.c_in),), rows)
    library.map_weights(rows, grad, _complex(into), *shape[2:], into, panels, len(rows), n_threads)


def _maps(dtype: torch.dtype, shape: SO2Shape) -> Any:
    return c_library("edge/cpu/so2.c", dtype, LMAX=shape.lmax, MMAX=shape.mmax)


def _complex(weights: list[Tensor]) -> list[int]:
    return [int(weight.ndim == 3) for weight in weights]


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

    def gradient(
        self, grad: Tensor, also: Tensor | None = None, value: Tensor | None = None
    ) -> Tensor:
        """Return J^T grad + also, like y; the value is written where it is wanted."""
        if value is not None:
            self._call("gate", value)
        result = empty(self.y.shape, self.y)
        self._call("gate_gradient", grad, result)
        return result if also is None else result.add_(also)

    def second(
        self, moved: Tensor, grad: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return J moved, the gradient of <moved, J^T grad> in y, to ``out`` too, and J^T grad."""
        value = empty(grad.shape, grad)
        curved = empty(self.y.shape, self.y) if out is None else out
        self._call("gate_second", moved, grad, value, curved)
        return value, curved, self.gradient(grad)

    def _call(self, name: str, *tensors: Tensor) -> None:
        function = getattr(_functions(self.y.dtype, *self.shape[:2]), name)
        function(self.y, self.sigmoid, *tensors, len(self.y), self.shape.c_out)


def moved_scaled(
    rows: Tensor, moved: Tensor, scale: Tensor, moved_scale: Tensor | None, shape: SO2Shape
) -> Tensor:
    """Return z' = s r' + s' r, the derivative of z = s r along a direction."""
    moved_z = empty(rows.shape, rows)
    given = (rows, moved, scale.contiguous(), _plain(moved_scale), moved_z)
    _functions(rows.dtype, *shape[:2]).moved_scaled(*given, len(rows), shape.c_in)
    return moved_z


def scaled_rows(rows: Tensor, scale: Tensor, shape: SO2Shape) -> Tensor:
    """Return s rows, (n_edges, n_rows * c_in), for factors s (n_edges, n_scales)."""
    return moved_scaled(rows, rows, scale, None, shape)


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


class _Buffers(threading.local):
    """The buffers of one thread, in use and idle ones.

    Rows of some hundred edges are megabytes, which the C library hands back to the system when they
    are freed: an edge layer would spend an eighth of its time on fresh pages. Here they are kept.
    """

    def __init__(self) -> None:
        self.every: list[np.ndarray] = []

    def take(self, n_bytes: int) -> np.ndarray:
        """Return the smallest idle buffer that is large enough, not much larger, or a new one."""
        references = _references(self.every)
        idle = [b for b, n in zip(self.every, references, strict=True) if n == _UNUSED]
        fitting = [buffer for buffer in idle if n_bytes <= buffer.nbytes <= _EXCESS * n_bytes]
        if fitting:
            return min(fitting, key=lambda buffer: buffer.nbytes)
        excess = sum(buffer.nbytes for buffer in idle) + n_bytes - _MOST
        while idle and excess > 0:
            dropped = idle.pop(0)
            excess -= dropped.nbytes
            self.every = [buffer for buffer in self.every if buffer is not dropped]
        self.every.append(np.empty(math.ceil(n_bytes / _PAGE) * _PAGE, np.uint8))
        return self.every[-1]


def _references(buffers: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(buffer) for buffer in buffers]


_UNUSED = _references([np.empty(0)])[0]  # what the count is of one that only its list refers to
_buffers = _Buffers()


def empty(size: tuple[int, ...], like: Tensor, *, passing: bool = False) -> Tensor:
    """Return an uninitialised CPU tensor of a dtype, whose memory is used again when it is freed.

    What is only passing, from one kernel to the next, is like any other here.
    """
    n_bytes = math.prod(size) * like.dtype.itemsize
    if n_bytes < _LEAST:
        return like.new_empty(size)
    buffer = _buffers.take(n_bytes + _LINE)
    start = -buffer.ctypes.data % _LINE
    # The tensor and its views refer to this slice: without the last the buffer is idle.
    part = buffer[start : start + n_bytes].view(_DTYPES[like.dtype])
    return torch.from_numpy(part.reshape(size))
