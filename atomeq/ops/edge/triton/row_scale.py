"""Radial factors of edges' rows: each number is read once and written once, +m and -m together.

A program owns one (l, |m|) of some edges: the rows +m and -m share its factors, and their product
is one sum.
"""

import triton
import triton.language as tl
from torch import Tensor

from atomeq.ops.edge.so2_map import SO2Shape
from atomeq.ops.triton_launch import ceil_div, channel_tile, contiguous, launch

_NUMBERS = 2048  # of one row in a program


def scaled_rows(rows: Tensor, scale: Tensor, shape: SO2Shape) -> Tensor:
    """Return s rows, (n_edges, n_rows * c_in), for factors s (n_edges, n_scales)."""
    result = rows.new_empty(rows.shape)
    _launch(_scaled, shape, rows, None, scale, None, result)
    return result


def row_products(left: Tensor, right: Tensor, shape: SO2Shape) -> Tensor:
    """Return the products of rows, summed over +m and -m, (n_edges, n_scales)."""
    result = left.new_empty(len(left), shape.n_scales)
    _launch(_pulled, shape, right, None, left, None, None, None, None, None, result, None)
    return result


def moved_scaled(
    rows: Tensor, moved: Tensor, scale: Tensor, moved_scale: Tensor | None, shape: SO2Shape
) -> Tensor:
    """Return z' = s r' + s' r, the derivative of z = s r along a direction."""
    moved_z = rows.new_empty(rows.shape)
    _launch(_scaled, shape, moved, rows, scale, moved_scale, moved_z)
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
    """Return the gradients of z = s r along a direction, from g = dE/dz and its derivative g'.

    These are dE/dr = s g, its derivative s' g + s g', dE/ds = g r, and its derivative g r' + g' r.
    No derivative of g means 0, and the second result is None where both of its terms are.
    """
    through, moved_through, scaled_grad = (t.new_empty(t.shape) for t in (scale, scale, grad))
    moves = moved_grad is not None or moved_scale is not None
    found = grad.new_empty(grad.shape) if moves else None
    given = (rows, moved, grad, moved_grad, scale, moved_scale)
    _launch(_pulled, shape, *given, scaled_grad, found, through, moved_through)
    return scaled_grad, found, through, moved_through


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
def _scaled(rows, others, scale, others_scale, result, n_edges,
            CHANNELS: tl.constexpr, LMAX: tl.constexpr, N_ROWS: tl.constexpr,
            N_NUMBERS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Scale rows and, where these have a scale, add others scaled."""
    plus, minus, at, inside, paired = _places(n_edges, CHANNELS, LMAX, N_ROWS, N_NUMBERS,
                                              BLOCK_E, BLOCK_C)  # fmt: skip
    factor = tl.load(scale + at, mask=inside, other=0.0)
    for minus_too in tl.static_range(2):
        row = minus if minus_too else plus
        kept = inside & paired if minus_too else inside
        value = tl.load(rows + row, mask=kept, other=0.0) * factor
        if others_scale is not None:
            other = tl.load(others + row, mask=kept, other=0.0)
            value += tl.load(others_scale + at, mask=inside, other=0.0) * other
        tl.store(result + row, value, mask=kept)


@triton.jit
def _pulled(rows, moved, grad, moved_grad, scale, moved_scale, scaled_grad, moved_scaled_grad,
            through, moved_through, n_edges,
            CHANNELS: tl.constexpr, LMAX: tl.constexpr, N_ROWS: tl.constexpr,
            N_NUMBERS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Sum products with the rows; gradients of scaled rows become those of the rows."""
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
        if moved_through is not None:
            moved_total += tl.load(moved + row, mask=kept, other=0.0) * pull
        if moved_scaled_grad is not None:
            turned = tl.zeros((BLOCK_E, BLOCK_C), dtype=rows.dtype.element_ty)
            if moved_scale is not None:
                turned += tl.load(moved_scale + at, mask=inside, other=0.0) * pull
            if moved_grad is not None:
                other = tl.load(moved_grad + row, mask=kept, other=0.0)
                moved_total += other * value
                turned += tl.load(scale + at, mask=inside, other=0.0) * other
            tl.store(moved_scaled_grad + row, turned, mask=kept)
        if scaled_grad is not None:
            pull *= tl.load(scale + at, mask=inside, other=0.0)
            tl.store(scaled_grad + row, pull, mask=kept)
    tl.store(through + at, total, mask=inside)
    if moved_through is not None:
        tl.store(moved_through + at, moved_total, mask=inside)
