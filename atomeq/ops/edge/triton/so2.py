"""SO(2) maps: one grouped kernel over all orders where launches cost most, cuBLAS beyond.

The products are 99 % of the arithmetic of an eSCN layer, and cuBLAS runs them near the machine's
peak, straight from strided rows into strided rows. What it cannot do is share work between the
products of one order, and it starts once per order. The kernel here does both: a complex product
costs three real ones, with s = x_+ + x_-,

    y_+ = W_1 s - (W_1 + W_2) x_-,    y_- = W_1 s + (W_2 - W_1) x_+,

and all orders are one launch. It serves small graphs; above _MANY_EDGES cuBLAS is taken to win with
four multiplications what the kernel saves by three. Gradients of weights sum over all edges, which
cuBLAS does in parts added in a fixed order.

The same kernel adds biases and, for an edge layer, opens the gates as it writes: a first launch
makes the rows of m = 0 beside their gates, a second one those of m > 0, and nobody reads them again
to gate them.

The precision ``medium`` (ops/precision.py) asks for products of bfloat16: the kernel rounds
features and weights as it reads them, at any number of edges, and adds in single precision. What
enters and leaves it stays float32, but for gated rows, which only another product reads: they are
rounded as they are written.
"""

# Only Triton's compiler goes through tl.static_range; to a type checker it raises.
# pyright: reportGeneralTypeIssues=false

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomeq.ops.edge.so2_map import SO2Shape
from atomeq.ops.edge.triton.gate import Gate
from atomeq.ops.precision import matmul_precision, torch_precision
from atomeq.ops.triton_launch import (
    INTERPRETING,
    accumulator,
    architecture,
    ceil_div,
    contiguous,
    halved,
    launch,
    operand_dtype,
    product_precision,
)

_REAL, _COMPLEX, _GATED = 0, 1, 2  # kinds of products
_MANY_EDGES = 32768  # not measured yet: to be set where the two ways take equal time on an H200
_TILE = 64  # edges, outputs and inputs of one step: three accumulators of 32 registers
# Before Hopper operands pass through registers too, and three products in TF32, or one of four
# tiles waiting in 160 kB of shared memory, would be more than there is.
_SMALL_TILE = 32


class _Group(NamedTuple):
    """One matrix product of a map: columns read, columns written, place of the weights."""

    kind: int
    reads: tuple[int, int]
    inner: int
    writes: tuple[int, int]
    outer: int
    weights: int
    gates: int  # column of the gate of the first column written; below 0 for m = 0
    period: int  # columns of +m, after which the gates begin again for -m
    first_tile: int
    last_tile: int

    def placed(self, first_tile: int, tile: int) -> "_Group":
        """Return the group with its tiles after those of the groups before it."""
        last_tile = first_tile + ceil_div(self.outer, tile)
        return self._replace(first_tile=first_tile, last_tile=last_tile)


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
        out = rows.new_empty(len(rows), self.shape.width) if out is None else out
        if _grouped(rows, out):
            groups, buffer = _groups(self.weights, self.shape, back=False)
            return _launch(rows, buffer, out, groups, bias=bias)
        for block, weight in zip(self.shape.blocks, self.weights, strict=True):
            _multiply(rows, block.inputs, weight, out, block.outputs)
        if bias is not None:
            out[:, : len(bias)] += bias
        return out

    def gated(self, rows: Tensor, out: Tensor, bias: Tensor | None, *, keep: bool) -> Tensor:
        """Write M rows + bias to ``out``, or but the gates unless ``keep``; return gated rows.

        These, (n_edges, n_rows * c_out), are fit to be read by a map and by nobody else.
        """
        shape = self.shape
        if bias is not None or not _grouped(rows, out) or shape.lmax == 0:
            return Gate(self.forward(rows, out, bias), shape).value()
        gated = rows.new_empty(len(rows), shape.n_rows * shape.c_out, dtype=operand_dtype(out))
        groups, buffer = _groups(self.weights, shape, back=False, gated=True)
        for part in (groups[:1], groups[1:]):  # m = 0 makes the gates of all
            if part:
                _launch(rows, buffer, out, part, gated=gated, keep=keep, shape=shape)
        return gated

    def transposed(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Return M^T grad, (n_edges, width) -> (n_edges, n_rows * c_in)."""
        out = grad.new_empty(len(grad), self.shape.width_in) if out is None else out
        if _grouped(grad, out):
            groups, buffer = _groups(self.weights, self.shape, back=True)
            return _launch(grad, buffer, out, groups, back=True)
        for block, weight in zip(self.shape.blocks, self.weights, strict=True):
            _multiply(grad, block.outputs, weight.mT, out, block.inputs, back=True)
        return out


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


def _grouped(rows: Tensor, out: Tensor) -> bool:
    """Whether the grouped kernel serves: double precision has no tensor cores worth a kernel.

    cuBLAS multiplies as torch's own setting has it, and that is the whole process's: where another
    precision is asked for, the kernel serves at any number of edges.
    """
    few = len(rows) <= _MANY_EDGES and rows.dtype != torch.float64
    other = rows.dtype == torch.float32 and matmul_precision() != torch_precision()
    return few or other or halved(out.dtype)


def _span(columns: tuple[slice, ...]) -> slice:
    return slice(columns[0].start, columns[-1].stop)


def _joined(rows: Tensor, columns: tuple[slice, ...]) -> Tensor:
    return rows[:, _span(columns)]


def _square(weight: Tensor) -> Tensor:
    """Return [[W_1, -W_2], [W_2, W_1]]."""
    real, imaginary = weight.unbind(0)
    upper, lower = torch.cat((real, -imaginary), 1), torch.cat((imaginary, real), 1)
    return torch.cat((upper, lower), 0)


def _launch(
    rows: Tensor,
    buffer: Tensor,
    out: Tensor,
    groups: list[_Group],
    *,
    back: bool = False,
    bias: Tensor | None = None,
    gated: Tensor | None = None,
    keep: bool = True,
    shape: SO2Shape | None = None,
) -> Tensor:
    rounding = halved(out.dtype)
    tile = _tile_of(rows, rounding=rounding)
    groups = list(_in_a_row(groups, tile))
    launch(
        _grouped_products,
        (ceil_div(len(rows), tile), groups[-1].last_tile),
        contiguous(rows),
        buffer,
        None if bias is None else contiguous(bias),
        out,
        gated,
        like=rows,
        n_edges=len(rows),
        READ_WIDTH=rows.shape[1],
        WRITE_WIDTH=out.shape[1],
        N_GROUPS=len(groups),
        GROUPS=tuple(_flat(group) for group in groups),
        SIGN=-1.0 if back else 1.0,
        BIASED=bias is not None,
        GATES=0 if shape is None else shape.n_scalars,
        SCALARS=0 if shape is None else shape.c_out,
        GATED_WIDTH=0 if gated is None else gated.shape[1],
        KEEP=keep,
        PRECISION=product_precision(rows.dtype),
        ROUND=rounding,
        UPCAST=INTERPRETING and buffer.dtype == torch.bfloat16,
        SUM=accumulator(out.dtype),
        TILE=tile,
        num_warps=8 if tile == _TILE else 4,
        # Blackwell's operands wait in shared memory, one more than it has room for.
        num_stages=2 if architecture(rows) >= 100 else 3,
    )
    return out


def _tile_of(rows: Tensor, *, rounding: bool) -> int:
    """Return the side of the tiles, by the generation of the device."""
    single = rows.dtype == torch.float32 and not rounding
    return _SMALL_TILE if single and architecture(rows) < 90 else _TILE


def _in_a_row(groups: list[_Group], tile: int) -> Iterator[_Group]:
    """Give each group its tiles."""
    first = 0
    for group in groups:
        placed = group.placed(first, tile)
        yield placed
        first = placed.last_tile


def _groups(
    weights: list[Tensor], shape: SO2Shape, back: bool, *, gated: bool = False
) -> tuple[list[_Group], Tensor]:
    """Return the products of a map, and their weights one after the other, (outputs, inputs)."""
    groups: list[_Group] = []
    parts: list[Tensor] = []
    for block, weight in zip(shape.blocks, weights, strict=True):
        reads, writes = (block.outputs, block.inputs) if back else (block.inputs, block.outputs)
        place = sum(part.numel() for part in parts)
        kind = _REAL
        if weight.ndim == 3 and not _three_products(weight.dtype):
            matrices, pairs = [_square(weight)], [((_span(reads),), (_span(writes),))]
        elif weight.ndim == 3:
            kind = _COMPLEX
            real, imaginary = weight.unbind(0)
            total, difference = real + imaginary, imaginary - real
            # W_2 changes its sign in the transpose: the sum and the difference change places.
            matrices = [real, difference, total] if back else [real, total, difference]
            pairs = [(reads, writes)]
        else:
            matrices = [weight]
            pairs = [((read,), (write,)) for read, write in zip(reads, writes, strict=True)]
        # The inner axis runs fastest, as the tensor cores want it.
        parts += [(matrix.T if back else matrix).reshape(-1) for matrix in matrices]
        for read, write in pairs:
            inner, outer = (part[0].stop - part[0].start for part in (read, write))
            starts = [write[0].start, write[-1].start]
            if gated and block.order == 0:  # the gates are made beside the rows
                kind, starts, outer = _GATED, [shape.n_scalars] * 2, outer - shape.n_scalars
            groups.append(
                _Group(
                    kind,
                    (read[0].start, read[-1].start),
                    inner,
                    (starts[0], starts[1]),
                    outer,
                    place,
                    (block.order - 1) * shape.c_out,
                    (shape.lmax + 1 - block.order) * shape.c_out,
                    0,
                    0,
                )
            )
    buffer = torch.cat(parts)
    return groups, buffer.bfloat16() if halved(buffer.dtype) else buffer


def _three_products(dtype: torch.dtype) -> bool:
    """Whether a complex product may take three multiplications, and not those of its square matrix.

    The sums that save one would be rounded once more in bfloat16; three TF32 products for each of
    them need more registers than there are.
    """
    rounded = dtype == torch.bfloat16 or halved(dtype)
    return not rounded and product_precision(dtype) != "tf32x3"


def _flat(group: _Group) -> tuple[int, ...]:
    return (
        group.kind,
        *group.reads,
        group.inner,
        *group.writes,
        group.outer,
        group.weights,
        group.gates,
        group.period,
        group.first_tile,
        group.last_tile,
    )


@triton.jit
def _tile(pointer, mask, ROUND: tl.constexpr, UPCAST: tl.constexpr):
    value = tl.load(pointer, mask=mask, other=0.0)
    if ROUND:
        value = value.to(tl.bfloat16)
    return value.to(tl.float32) if UPCAST else value  # bf16 products fail in the interpreter


@triton.jit
def _grouped_products(rows, weights, bias, out, gated, n_edges, READ_WIDTH: tl.constexpr,
                      WRITE_WIDTH: tl.constexpr, N_GROUPS: tl.constexpr, GROUPS: tl.constexpr,
                      SIGN: tl.constexpr, BIASED: tl.constexpr, GATES: tl.constexpr,
                      SCALARS: tl.constexpr, GATED_WIDTH: tl.constexpr, KEEP: tl.constexpr,
                      PRECISION: tl.constexpr, ROUND: tl.constexpr, UPCAST: tl.constexpr,
                      SUM: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    edge = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = (edge < n_edges)[:, None]
    edge = edge.to(tl.int64)
    for g in tl.static_range(N_GROUPS):
        if (tl.program_id(1) >= GROUPS[g][10]) & (tl.program_id(1) < GROUPS[g][11]):
            output = (tl.program_id(1) - GROUPS[g][10]) * TILE + tl.arange(0, TILE)
            wanted = output < GROUPS[g][6]
            plus = tl.zeros((TILE, TILE), dtype=SUM)
            minus = tl.zeros((TILE, TILE), dtype=SUM)
            shared = tl.zeros((TILE, TILE), dtype=SUM)
            read = rows + (edge * READ_WIDTH)[:, None]
            for start in range(0, GROUPS[g][3], TILE):
                inner = start + tl.arange(0, TILE)
                kept = there & (inner < GROUPS[g][3])[None, :]
                weight = weights + GROUPS[g][7] + output[None, :] * GROUPS[g][3] + inner[:, None]
                used = (inner < GROUPS[g][3])[:, None] & wanted[None, :]
                upper = _tile(read + (GROUPS[g][1] + inner)[None, :], kept, ROUND, UPCAST)
                if GROUPS[g][0] == 2:
                    matrix = _tile(weight + GATES * GROUPS[g][3], used, False, UPCAST)
                    opening = _tile(weight - SCALARS * GROUPS[g][3],
                                    used & (output >= SCALARS)[None, :], False, UPCAST)  # fmt: skip
                    shared = tl.dot(upper, matrix, shared, input_precision=PRECISION)
                    plus = tl.dot(upper, opening, plus, input_precision=PRECISION)
                elif GROUPS[g][0] == 1:
                    matrix = _tile(weight, used, False, UPCAST)
                    lower = _tile(read + (GROUPS[g][2] + inner)[None, :], kept, ROUND, UPCAST)
                    total = _tile(weight + GROUPS[g][6] * GROUPS[g][3], used, False, UPCAST)
                    difference = _tile(
                        weight + 2 * GROUPS[g][6] * GROUPS[g][3], used, False, UPCAST
                    )
                    shared = tl.dot(upper + lower, matrix, shared, input_precision=PRECISION)
                    plus = tl.dot(lower, total, plus, input_precision=PRECISION)
                    minus = tl.dot(upper, difference, minus, input_precision=PRECISION)
                else:
                    matrix = _tile(weight, used, False, UPCAST)
                    shared = tl.dot(upper, matrix, shared, input_precision=PRECISION)
            write = out + (edge * WRITE_WIDTH)[:, None] + output[None, :]
            kept = there & wanted[None, :]
            if GATED_WIDTH > 0:
                _write_gated(out, write, gated, edge, output, shared, plus, minus, kept,
                             GROUPS[g][0], GROUPS[g][4], GROUPS[g][5], GROUPS[g][8], GROUPS[g][9],
                             WRITE_WIDTH, GATES, SCALARS, GATED_WIDTH, KEEP, SUM)  # fmt: skip
            elif GROUPS[g][0] == 1:
                tl.store(write + GROUPS[g][4], shared - SIGN * plus, mask=kept)
                tl.store(write + GROUPS[g][5], shared + SIGN * minus, mask=kept)
            else:
                if BIASED and GROUPS[g][8] < 0:
                    shared += tl.load(bias + output, mask=wanted, other=0.0).to(SUM)[None, :]
                tl.store(write + GROUPS[g][4], shared, mask=kept)


@triton.jit
def _write_gated(out, write, gated, edge, output, shared, plus, minus, kept, KIND: tl.constexpr,
                 FIRST: tl.constexpr, SECOND: tl.constexpr, GATE: tl.constexpr,
                 PERIOD: tl.constexpr, WRITE_WIDTH: tl.constexpr, GATES: tl.constexpr,
                 SCALARS: tl.constexpr, GATED_WIDTH: tl.constexpr, KEEP: tl.constexpr,
                 SUM: tl.constexpr):  # fmt: skip
    """Write the gates of m = 0, and rows behind their gates."""
    if KIND == 2:
        higher = kept & (output >= SCALARS)[None, :]
        tl.store(write - SCALARS, plus, mask=higher)
        _finish(write, gated, edge, output, shared, tl.where(higher, plus, shared), kept, FIRST,
                GATES, GATED_WIDTH, KEEP)  # fmt: skip
    else:
        # Its gates were written by the launch before: that of a degree serves +m and -m.
        gate = out + (edge * WRITE_WIDTH)[:, None] + (GATE + output % PERIOD)[None, :]
        gate = tl.load(gate, mask=kept, other=0.0).to(SUM)
        if KIND == 1:
            _finish(write, gated, edge, output, shared - plus, gate, kept, FIRST, GATES,
                    GATED_WIDTH, KEEP)  # fmt: skip
            _finish(write, gated, edge, output, shared + minus, gate, kept, SECOND, GATES,
                    GATED_WIDTH, KEEP)  # fmt: skip
        else:
            _finish(write, gated, edge, output, shared, gate, kept, FIRST, GATES, GATED_WIDTH,
                    KEEP)  # fmt: skip


@triton.jit
def _finish(write, gated, edge, output, value, gate, kept, FIRST: tl.constexpr,
            GATES: tl.constexpr, GATED_WIDTH: tl.constexpr, KEEP: tl.constexpr):  # fmt: skip
    """Write a value as it is, if it is to be kept, and behind its gate."""
    if KEEP:
        tl.store(write + FIRST, value, mask=kept)
    behind = gated + (edge * GATED_WIDTH)[:, None] + (FIRST - GATES + output)[None, :]
    tl.store(behind, value * tl.sigmoid(gate), mask=kept)
