"""SO(2) maps: one kernel over all orders where launches cost most, cuBLAS beyond.

The products are 99 % of the arithmetic of an eSCN layer, and cuBLAS runs them near the machine's
peak, straight from strided rows into strided rows. What it cannot do is share work between the
products of one order, and it starts once per order. The kernels here do both: a complex product
costs three real ones, with s = x_+ + x_-,

    y_+ = W_1 s - (W_1 + W_2) x_-,    y_- = W_1 s + (W_2 - W_1) x_+,

and all orders are one launch. They serve small graphs; above _MANY_EDGES cuBLAS is taken to win
with four multiplications what the kernels save by three. Gradients of weights sum over all edges,
which cuBLAS does in parts added in a fixed order.

Between the two maps of an edge layer stands a gate, and it costs no pass over memory: forward, the
program that makes a degree of the first map's output opens its gate as it writes; backward, the one
that makes a degree of the second map's transpose takes it through the gate.

The precision ``medium`` (ops/precision.py) asks for products of bfloat16: the kernels round
features and weights as they read them, at any number of edges, and add in single precision. What
enters and leaves a layer stays float32. Between its kernels what only products read is rounded as
it is written, which changes no bit, and so are the messages before they are rotated back.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from atomeq.ops.edge.so2_map import SO2Shape
from atomeq.ops.edge.triton.gate import Gate
from atomeq.ops.edge.triton.so2_kernels import (
    FOUR,
    REAL,
    THREE,
    map_and_gate,
    map_back_through_gate,
    map_rows,
)
from atomeq.ops.precision import halved, matmul_precision, operand_dtype, torch_precision
from atomeq.ops.triton_launch import (
    INTERPRETING,
    accumulator,
    architecture,
    ceil_div,
    contiguous,
    launch,
    product_precision,
)

_MANY_EDGES = 32768  # not measured yet: to be set where the two ways take equal time on an H200
_TOGETHER = 8  # tiles of edges that share each tile of weights in the cache


class _Order(NamedTuple):
    """The product of one order: columns read and written, place of the weights, tiles."""

    kind: int
    reads: tuple[int, int]  # +m, -m
    inner: int
    weights: int
    outer: int
    writes: tuple[int, int]


class SO2Map:
    """The map M of some weights."""

    def __init__(self, weights: list[Tensor], shape: SO2Shape) -> None:
        self.weights = weights
        self.shape = shape

    def forward(
        self, rows: Tensor, out: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Return M rows + bias, (n_edges, n_rows * c_in) -> (n_edges, width).

        The bias, if there is one, belongs to the first of the outputs, those of m = 0.
        """
        out = self._empty(rows, self.shape.width) if out is None else out
        if self._grouped(rows):
            return self._map(rows, out, bias, back=False)
        for block, weight in zip(self.shape.blocks, self.weights, strict=True):
            _multiply(rows, block.inputs, weight, out, block.outputs)
        if bias is not None:
            out[:, : len(bias)] += bias
        return out

    def gated(self, rows: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Return a(M rows + bias), (n_edges, n_rows * c_out), for a map alone to read.

        What the gate is given, M rows + bias, is written to ``out`` if it is to be kept.
        """
        shape = self.shape
        if not self._grouped(rows):
            return Gate(self.forward(rows, out, bias), shape).value()
        dtype = operand_dtype(self.weights[0])
        gated = rows.new_empty(len(rows), shape.n_rows * shape.c_out, dtype=dtype)
        n_tiles = (shape.lmax + 1, shape.c_out)
        tensors = (None if bias is None else contiguous(bias)), out, gated
        self._launch(map_and_gate, rows, tensors, n_tiles, shape.c_out, back=False)
        return gated

    def transposed(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Return M^T grad, (n_edges, width) -> (n_edges, n_rows * c_in)."""
        out = self._empty(grad, self.shape.width_in) if out is None else out
        if self._grouped(grad):
            return self._map(grad, out, None, back=True)
        for block, weight in zip(self.shape.blocks, self.weights, strict=True):
            _multiply(grad, block.outputs, weight.mT, out, block.inputs, back=True)
        return out

    def transposed_through(
        self,
        gate: Gate,
        grad: Tensor,
        out: Tensor | None = None,
        also: Tensor | None = None,
        value: Tensor | None = None,
        *,
        operand: bool = False,
    ) -> Tensor:
        """Return J^T M^T grad + also, like y, for the Jacobian J of the gate before the map.

        M^T grad is written to ``out``, and a(y) to ``value``, if they are wanted. An ``operand`` is
        read by a map alone, and may have the precision of those.
        """
        if not self._grouped(grad):
            return gate.gradient(self.transposed(grad, out), also, value)
        dtype = operand_dtype(gate.y) if operand else gate.y.dtype
        result = torch.empty_like(gate.y, dtype=dtype)
        n_tiles = (self.shape.lmax + 1, self.shape.c_in)
        tensors = gate.y, (None if also is None else contiguous(also)), out, value, result
        self._launch(map_back_through_gate, grad, tensors, n_tiles, self.shape.c_in, back=True)
        return result

    def _grouped(self, rows: Tensor) -> bool:
        """Whether the kernels serve: double precision has no tensor cores worth one.

        cuBLAS multiplies as torch's own setting has it, and that is the whole process's: where
        another precision is asked for, the kernels serve at any number of edges.
        """
        dtype = self.weights[0].dtype
        few = len(rows) <= _MANY_EDGES and dtype != torch.float64
        other = dtype == torch.float32 and matmul_precision() != torch_precision()
        return few or other or halved(dtype)

    def _empty(self, rows: Tensor, width: int) -> Tensor:
        return rows.new_empty(len(rows), width, dtype=self.weights[0].dtype)

    def _map(self, rows: Tensor, out: Tensor, bias: Tensor | None, *, back: bool) -> Tensor:
        tensors = (None if bias is None else contiguous(bias)), out
        self._launch(map_rows, rows, tensors, None, out.shape[1], back=back)
        return out

    def _launch(
        self,
        kernel: Any,
        rows: Tensor,
        tensors: tuple[Tensor | None, ...],
        owned: tuple[int, int] | None,
        size: int,
        *,
        back: bool,
    ) -> None:
        """Start a kernel; programs own a degree of some channels, or outputs in a row."""
        orders, buffer = _orders(self.weights, self.shape, back=back)
        dtype = self.weights[0].dtype
        tile, outputs, step = _tiles(rows, dtype, gated=owned is not None)
        numbers, n_tiles = _numbered(orders, outputs)
        if owned is None:
            constants = {"WRITE_WIDTH": size, "N_ORDERS": len(orders), "N_TILES": n_tiles}
        else:
            n_tiles = owned[0] * ceil_div(owned[1], outputs)
            shape = self.shape
            constants = {"CHANNELS": size, "LMAX": shape.lmax, "MMAX": shape.mmax}
            constants["N_ROWS"] = shape.n_rows
        launch(
            kernel,
            (ceil_div(len(rows), tile) * n_tiles,),
            contiguous(rows),
            buffer,
            *tensors,
            like=rows,
            n_edges=len(rows),
            READ_WIDTH=rows.shape[1],
            ORDERS=numbers,
            TOGETHER=_TOGETHER,
            PRECISION=product_precision(dtype),
            ROUND=halved(dtype),
            UPCAST=INTERPRETING and buffer.dtype == torch.bfloat16,
            SUM=accumulator(dtype),
            TILE=tile,
            OUTPUTS=outputs,
            STEP=step,
            # Blackwell's sums are in a memory of their own, which four warps reach.
            num_warps=8 if tile == 64 and architecture(rows) < 100 else 4,
            num_stages=2 if architecture(rows) >= 100 else 3,
            **constants,
        )


def _multiply(
    rows: Tensor,
    reads: tuple[slice, ...],
    weight: Tensor,
    out: Tensor,
    writes: tuple[slice, ...],
    *,
    back: bool = False,
) -> None:
    """Write the products of one order."""
    if weight.ndim == 3:
        matrix = _square(weight.mT).T if back else _square(weight)
        torch.mm(_joined(rows, reads), matrix.T, out=_joined(out, writes))
        return
    for read, write in zip(reads, writes, strict=True):
        torch.mm(rows[:, read], weight.T, out=out[:, write])


def add_weight_gradients(rows: Tensor, grad: Tensor, into: list[Tensor], shape: SO2Shape) -> None:
    """Add grad^T rows, order by order, to the gradients of the weights."""
    for block, gradient in zip(shape.blocks, into, strict=True):
        if gradient.ndim == 2:
            for read, write in zip(block.inputs, block.outputs, strict=True):
                gradient.addmm_(grad[:, write].T, rows[:, read])
            continue
        # One product of 2 x 2 blocks: +m and -m lie side by side, and no sum of rows is written.
        products = _joined(grad, block.outputs).T @ _joined(rows, block.inputs)
        (pp, pm), (mp, mm) = (half.chunk(2, dim=1) for half in products.chunk(2, dim=0))
        gradient[0].add_(pp).add_(mm)
        gradient[1].add_(mp).sub_(pm)


def _span(columns: tuple[slice, ...]) -> slice:
    return slice(columns[0].start, columns[-1].stop)


def _joined(rows: Tensor, columns: tuple[slice, ...]) -> Tensor:
    return rows[:, _span(columns)]


def _square(weight: Tensor) -> Tensor:
    """Return [[W_1, -W_2], [W_2, W_1]]."""
    real, imaginary = weight.unbind(0)
    upper, lower = torch.cat((real, -imaginary), 1), torch.cat((imaginary, real), 1)
    return torch.cat((upper, lower), 0)


def _tiles(rows: Tensor, dtype: torch.dtype, *, gated: bool) -> tuple[int, int, int]:
    """Return edges and outputs of a program, and the inputs that it multiplies at a time.

    They are what registers and shared memory hold (``benchmark.py triton-compile``). Before Hopper
    operands pass through registers, gates and what they feel stay there, and three TF32 products
    hold both parts of each operand.
    """
    device, threefold = architecture(rows), product_precision(dtype) == "tf32x3"
    if device < 90:
        if gated or threefold:
            return 64, 16, 16
        return (64, 64, 32) if halved(dtype) or dtype != torch.float32 else (32, 32, 32)
    if gated:
        return 64, 32, 32
    if threefold and device >= 100:  # with 64 outputs Triton 3.6 makes a program that only traps
        return 64, 32, 16
    return 64, 64, 32 if threefold or device >= 100 else 64


def _numbered(orders: list[_Order], tile: int) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Return the orders as a kernel takes them, each with its tiles in a row, and their number."""
    found, first = [], 0
    for order in orders:
        last = first + ceil_div(order.outer, tile)
        weights = order.inner, order.weights, order.outer
        found.append((order.kind, *order.reads, *weights, *order.writes, first, last))
        first = last
    return tuple(found), first


def _orders(weights: list[Tensor], shape: SO2Shape, *, back: bool) -> tuple[list[_Order], Tensor]:
    """Return the products of a map, and their weights one after the other, (outputs, inputs)."""
    orders: list[_Order] = []
    parts: list[Tensor] = []
    for block, weight in zip(shape.blocks, weights, strict=True):
        reads, writes = (block.outputs, block.inputs) if back else (block.inputs, block.outputs)
        kind, matrices = REAL, [weight]
        if weight.ndim == 3:
            real, imaginary = weight.unbind(0)
            kind = THREE if _three_products(weight.dtype) else FOUR
            if kind == THREE:
                others = [(real + imaginary).neg_(), imaginary - real]
            else:
                others = [-imaginary, imaginary]
            # W_2 changes its sign in the transpose: the two others change places.
            matrices = [real, *(reversed(others) if back else others)]
        starts = (reads[0].start, reads[-1].start), (writes[0].start, writes[-1].start)
        inner, outer = (part[0].stop - part[0].start for part in (reads, writes))
        place = sum(part.numel() for part in parts)
        orders.append(_Order(kind, starts[0], inner, place, outer, starts[1]))
        # The inner axis runs fastest, as the tensor cores want it.
        parts += [(matrix.T if back else matrix).reshape(-1) for matrix in matrices]
    buffer = torch.cat(parts)
    return orders, buffer.bfloat16() if halved(buffer.dtype) else buffer


def _three_products(dtype: torch.dtype) -> bool:
    """Whether a complex product may take three multiplications in the place of four.

    The sums that save one would be rounded once more in bfloat16; three TF32 products for each of
    them need more registers than there are.
    """
    rounded = dtype == torch.bfloat16 or halved(dtype)
    return not rounded and product_precision(dtype) != "tf32x3"
