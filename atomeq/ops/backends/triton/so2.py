"""SO(2) maps: one grouped kernel over all orders where launches cost most, cuBLAS beyond.

The products are 99 % of the arithmetic of an eSCN layer, and cuBLAS runs them near the machine's
peak, straight from strided rows into strided rows. What it cannot do is share work between the
products of one order, and it starts once per order. The kernel here does both: a complex product
costs three real ones, with s = x_+ + x_-,

    y_+ = W_1 s - (W_1 + W_2) x_-,    y_- = W_1 s + (W_2 - W_1) x_+,

and all orders are one launch. It serves small graphs; above _MANY_EDGES cuBLAS is taken to win with
four multiplications what the kernel saves by three. Gradients of weights sum over all edges, which
cuBLAS does in parts added in a fixed order.

``torch.set_float32_matmul_precision("medium")`` asks for products of bfloat16: the kernel rounds
features and weights as it reads them, at any number of edges, and adds in single precision. What
enters and leaves it stays float32.
"""

# Only Triton's compiler goes through tl.static_range; to a type checker it raises.
# pyright: reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomeq.ops.backends.triton.launch import (
    INTERPRETING,
    accumulator,
    ceil_div,
    contiguous,
    halved,
    launch,
    product_precision,
)
from atomeq.ops.registered.so2_shape import SO2Shape

_MANY_EDGES = 32768  # not measured yet: to be set where the two ways take equal time on an H200
_TILE = 64  # edges, outputs and inputs of one step: three accumulators of 32 registers


class _Group(NamedTuple):
    """One matrix product of a map: columns read, columns written, place of the weights."""

    complex_: bool
    reads: tuple[int, int]
    inner: int
    writes: tuple[int, int]
    outer: int
    weights: int
    first_tile: int
    last_tile: int


class TritonSO2Map:
    """See :class:`~atomeq.ops.registered.kernel_sets.SO2Map`."""

    def __init__(self, weights: list[Tensor], shape: SO2Shape) -> None:
        self.weights = weights
        self.shape = shape

    def forward(self, rows: Tensor, out: Tensor) -> Tensor:
        """Write M rows to ``out``."""
        if _grouped(rows):
            return _launch_groups(rows, out, self.weights, self.shape, back=False)
        for block, weight in zip(self.shape.blocks, self.weights, strict=True):
            if weight.ndim == 3:
                torch.mm(
                    _joined(rows, block.inputs), _square(weight).T, out=_joined(out, block.outputs)
                )
                continue
            for read, write in zip(block.inputs, block.outputs, strict=True):
                torch.mm(rows[:, read], weight.T, out=out[:, write])
        return out

    def transposed(self, grad: Tensor, out: Tensor) -> Tensor:
        """Write M^T grad to ``out``."""
        if _grouped(grad):
            return _launch_groups(grad, out, self.weights, self.shape, back=True)
        for block, weight in zip(self.shape.blocks, self.weights, strict=True):
            if weight.ndim == 3:
                torch.mm(
                    _joined(grad, block.outputs), _square(weight), out=_joined(out, block.inputs)
                )
                continue
            for read, write in zip(block.outputs, block.inputs, strict=True):
                torch.mm(grad[:, read], weight, out=out[:, write])
        return out


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


def _grouped(rows: Tensor) -> bool:
    """Whether the grouped kernel serves: double precision has no tensor cores worth a kernel."""
    few = len(rows) <= _MANY_EDGES and rows.dtype != torch.float64
    return few or halved(rows.dtype)


def _span(columns: tuple[slice, ...]) -> slice:
    return slice(columns[0].start, columns[-1].stop)


def _joined(rows: Tensor, columns: tuple[slice, ...]) -> Tensor:
    return rows[:, _span(columns)]


def _square(weight: Tensor) -> Tensor:
    """Return [[W_1, -W_2], [W_2, W_1]]."""
    real, imaginary = weight.unbind(0)
    upper, lower = torch.cat((real, -imaginary), 1), torch.cat((imaginary, real), 1)
    return torch.cat((upper, lower), 0)


def _launch_groups(
    rows: Tensor, out: Tensor, weights: list[Tensor], shape: SO2Shape, *, back: bool
) -> Tensor:
    groups, buffer = _groups(weights, shape, back)
    n_edges = len(rows)
    launch(
        _grouped_products,
        (ceil_div(n_edges, _TILE), groups[-1].last_tile),
        contiguous(rows),
        buffer,
        out,
        like=rows,
        n_edges=n_edges,
        READ_WIDTH=rows.shape[1],
        WRITE_WIDTH=out.shape[1],
        N_GROUPS=len(groups),
        GROUPS=tuple(_flat(group) for group in groups),
        SIGN=-1.0 if back else 1.0,
        PRECISION=product_precision(rows.dtype),
        ROUND=halved(rows.dtype),
        UPCAST=INTERPRETING and buffer.dtype == torch.bfloat16,
        SUM=accumulator(rows.dtype),
        TILE=_TILE,
        num_warps=8,
    )
    return out


def _groups(weights: list[Tensor], shape: SO2Shape, back: bool) -> tuple[list[_Group], Tensor]:
    """Return the products of a map, and their weights one after the other, (outputs, inputs)."""
    groups: list[_Group] = []
    parts: list[Tensor] = []
    for block, weight in zip(shape.blocks, weights, strict=True):
        reads, writes = (block.outputs, block.inputs) if back else (block.inputs, block.outputs)
        place = sum(part.numel() for part in parts)
        if weight.ndim == 3 and not _three_products(weight.dtype):
            matrices, pairs = [_square(weight)], [((_span(reads),), (_span(writes),))]
        elif weight.ndim == 3:
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
            first = groups[-1].last_tile if groups else 0
            groups.append(
                _Group(
                    len(matrices) == 3,
                    (read[0].start, read[-1].start),
                    inner,
                    (write[0].start, write[-1].start),
                    outer,
                    place,
                    first,
                    first + ceil_div(outer, _TILE),
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
        int(group.complex_),
        *group.reads,
        group.inner,
        *group.writes,
        group.outer,
        group.weights,
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
def _grouped_products(rows, weights, out, n_edges, READ_WIDTH: tl.constexpr,
                      WRITE_WIDTH: tl.constexpr, N_GROUPS: tl.constexpr, GROUPS: tl.constexpr,
                      SIGN: tl.constexpr,
                      PRECISION: tl.constexpr, ROUND: tl.constexpr, UPCAST: tl.constexpr,
                      SUM: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    edge = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = (edge < n_edges)[:, None]
    edge = edge.to(tl.int64)
    for g in tl.static_range(N_GROUPS):
        if (tl.program_id(1) >= GROUPS[g][8]) & (tl.program_id(1) < GROUPS[g][9]):
            output = (tl.program_id(1) - GROUPS[g][8]) * TILE + tl.arange(0, TILE)
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
                matrix = _tile(weight, used, False, UPCAST)
                if GROUPS[g][0]:
                    lower = _tile(read + (GROUPS[g][2] + inner)[None, :], kept, ROUND, UPCAST)
                    total = _tile(weight + GROUPS[g][6] * GROUPS[g][3], used, False, UPCAST)
                    difference = _tile(
                        weight + 2 * GROUPS[g][6] * GROUPS[g][3], used, False, UPCAST
                    )
                    shared = tl.dot(upper + lower, matrix, shared, input_precision=PRECISION)
                    plus = tl.dot(lower, total, plus, input_precision=PRECISION)
                    minus = tl.dot(upper, difference, minus, input_precision=PRECISION)
                else:
                    shared = tl.dot(upper, matrix, shared, input_precision=PRECISION)
            write = out + (edge * WRITE_WIDTH)[:, None] + output[None, :]
            kept = there & wanted[None, :]
            if GROUPS[g][0]:
                tl.store(write + GROUPS[g][4], shared - SIGN * plus, mask=kept)
                tl.store(write + GROUPS[g][5], shared + SIGN * minus, mask=kept)
            else:
                tl.store(write + GROUPS[g][4], shared, mask=kept)
