"""Radial factors of edges' rows: each number is read once and written once, +m and -m together.

A program owns one (l, |m|) of some edges: the rows +m and -m share its factors, and their product
is one sum.
"""

import triton
import triton.language as tl
from torch import Tensor

from atomeq.ops.edge.so2_shape import SO2Shape
from atomeq.ops.triton_launch import ceil_div, channel_tile, contiguous, launch

_NUMBERS = 2048  # of one row in a program


def scaled_rows(
    rows: Tensor, scale: Tensor, shape: SO2Shape, *, out: Tensor | None = None
) -> Tensor:
    """Return s rows, (n_edges, n_rows * c_in), for factors s (n_edges, n_scales)."""
    result = rows.new_empty(rows.shape) if out is None else out
    _launch(_scaled, shape, rows, None, scale, None, result, None)
    return result


def row_products(left: Tensor, right: Tensor, shape: SO2Shape) -> Tensor:
    """Return the products of rows, summed over +m and -m, (n_edges, n_scales)."""
    result = left.new_empty(len(left), shape.n_scales)
    _launch(_pulled, shape, right, None, left, None, None, None, result, None)
    return result


def scaled(
    rows: Tensor, moved: Tensor, scale: Tensor, moved_scale: Tensor | None, shape: SO2Shape
) -> tuple[Tensor, Tensor]:
    """Return z = s r and its derivative z' = s r' + s' r along a direction."""
    z, moved_z = rows.new_empty(rows.shape), rows.new_empty(rows.shape)
    _launch(_scaled, shape, rows, moved, scale, moved_scale, z, moved_z)
    return z, moved_z


def scale_gradient_(rows: Tensor, grad: Tensor, scale: Tensor, shape: SO2Shape) -> Tensor:
    """Return dE/ds from ``grad`` = dE/dz, which becomes dE/dr."""
    through = rows.new_empty(scale.shape)
    _launch(_pulled, shape, rows, None, grad, None, scale, None, through, None)
    return through


def scaled_second_(
    rows: Tensor,
    moved: Tensor,
    grad: Tensor,
    moved_grad: Tensor,
    scale: Tensor,
    moved_scale: Tensor | None,
    shape: SO2Shape,
) -> tuple[Tensor, Tensor]:
    """Return dE/ds and its derivative; dE/dz and its derivative become those of dE/dr."""
    through, moved_through = rows.new_empty(scale.shape), rows.new_empty(scale.shape)
    given = (rows, moved, grad, moved_grad, scale, moved_scale)
    _launch(_pulled, shape, *given, through, moved_through)
    return through, moved_through


def _launch(kernel: object, shape: SO2Shape, first: Tensor, *others: Tensor | None) -> None:
    """Launch over edges, (l, |m|) and channels; what is written must be contiguous."""
    n_edges = len(first)
    block_c = channel_tile(shape.c_in)
    block_e = max(1, _NUMBERS // block_c)
    n_numbers = shape.n_scales // shape.c_in
    launch(
        kernel,
        (ceil_div(n_edges, block_e), n_numbers, ceil_div(shape.c_in, block_c)),
        contiguous(first),
        *(None if tensor is None else contiguous(tensor) for tensor in others),
        like=first,
        n_edges=n_edges,
        CHANNELS=shape.c_in,
        LMAX=shape.lmax,
        N_ROWS=shape.n_rows,
        N_NUMBERS=n_numbers,
        BLOCK_E=block_e,
        BLOCK_C=block_c,
    )


@triton.jit
def _places(n_edges, CHANNELS: tl.constexpr, LMAX: tl.constexpr, N_ROWS: tl.constexpr,
            N_NUMBERS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Return the offsets of +m, of -m and of the factors, which there are, and which have a -m."""
    number = tl.program_id(1)
    # Numbers of lower orders fill LMAX + 1, LMAX, ... places, rows the first once and others twice.
    order, before, step = number * 0, number * 0, number * 0 + LMAX + 1
    for _ in tl.static_range(LMAX):
        further = number >= before + step
        before = tl.where(further, before + step, before)
        order = tl.where(further, order + 1, order)
        step = tl.where(further, step - 1, step)
    plus = tl.where(order == 0, number, 2 * before - (LMAX + 1) + number - before)
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (edge < n_edges)[:, None] & (channel < CHANNELS)[None, :]
    rows = (edge.to(tl.int64) * (N_ROWS * CHANNELS))[:, None] + channel[None, :]
    factors = (edge.to(tl.int64) * (N_NUMBERS * CHANNELS))[:, None] + channel[None, :]
    first = rows + plus * CHANNELS
    return first, first + step * CHANNELS, factors + number * CHANNELS, inside, order > 0


@triton.jit
def _scaled(rows, moved, scale, moved_scale, result, moved_result, n_edges,
            CHANNELS: tl.constexpr, LMAX: tl.constexpr, N_ROWS: tl.constexpr,
            N_NUMBERS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    plus, minus, at, inside, paired = _places(n_edges, CHANNELS, LMAX, N_ROWS, N_NUMBERS,
                                              BLOCK_E, BLOCK_C)  # fmt: skip
    factor = tl.load(scale + at, mask=inside, other=0.0)
    for minus_too in tl.static_range(2):
        row = minus if minus_too else plus
        kept = inside & paired if minus_too else inside
        value = tl.load(rows + row, mask=kept, other=0.0)
        if moved_result is not None:
            other = tl.load(moved + row, mask=kept, other=0.0) * factor
            if moved_scale is not None:
                other += tl.load(moved_scale + at, mask=inside, other=0.0) * value
            tl.store(moved_result + row, other, mask=kept)
        tl.store(result + row, value * factor, mask=kept)


@triton.jit
def _pulled(rows, moved, grad, moved_grad, scale, moved_scale, through, moved_through, n_edges,
            CHANNELS: tl.constexpr, LMAX: tl.constexpr, N_ROWS: tl.constexpr,
            N_NUMBERS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Sum products with the rows; gradients of scaled rows become those of the rows, in place."""
    plus, minus, at, inside, paired = _places(n_edges, CHANNELS, LMAX, N_ROWS, N_NUMBERS,
                                              BLOCK_E, BLOCK_C)  # fmt: skip
    total = tl.zeros((BLOCK_E, BLOCK_C), dtype=tl.float32)
    moved_total = tl.zeros((BLOCK_E, BLOCK_C), dtype=tl.float32)
    if rows.dtype.element_ty == tl.float64:
        total, moved_total = total.to(tl.float64), moved_total.to(tl.float64)
    for minus_too in tl.static_range(2):
        row = minus if minus_too else plus
        kept = inside & paired if minus_too else inside
        value = tl.load(rows + row, mask=kept, other=0.0)
        pull = tl.load(grad + row, mask=kept, other=0.0)
        total += pull * value
        if scale is not None:
            tl.store(grad + row, pull * tl.load(scale + at, mask=inside, other=0.0), mask=kept)
        if moved_through is not None:
            other = tl.load(moved_grad + row, mask=kept, other=0.0)
            moved_total += other * value
            moved_total += tl.load(moved + row, mask=kept, other=0.0) * pull
            other *= tl.load(scale + at, mask=inside, other=0.0)
            if moved_scale is not None:
                other += tl.load(moved_scale + at, mask=inside, other=0.0) * pull
            tl.store(moved_grad + row, other, mask=kept)
    tl.store(through + at, total, mask=inside)
    if moved_through is not None:
        tl.store(moved_through + at, moved_total, mask=inside)
