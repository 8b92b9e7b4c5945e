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
    _launch(_scaled, shape, rows, scale, result)
    return result


def row_products(left: Tensor, right: Tensor, shape: SO2Shape) -> Tensor:
    """Return the products of rows, summed over +m and -m, (n_edges, n_scales)."""
    result = left.new_empty(len(left), shape.n_scales)
    _launch(_products, shape, left, right, result)
    return result


def _launch(kernel: object, shape: SO2Shape, first: Tensor, *others: Tensor) -> None:
    """Launch over edges, (l, |m|) and channels; what is written must be contiguous."""
    n_edges = len(first)
    block_c = channel_tile(shape.c_in)
    block_e = max(1, _NUMBERS // block_c)
    n_numbers = shape.n_scales // shape.c_in
    launch(
        kernel,
        (ceil_div(n_edges, block_e), n_numbers, ceil_div(shape.c_in, block_c)),
        contiguous(first),
        *map(contiguous, others),
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
def _scaled(rows, scale, result, n_edges,
            CHANNELS: tl.constexpr, LMAX: tl.constexpr, N_ROWS: tl.constexpr,
            N_NUMBERS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Scale rows."""
    plus, minus, at, inside, paired = _places(n_edges, CHANNELS, LMAX, N_ROWS, N_NUMBERS,
                                              BLOCK_E, BLOCK_C)  # fmt: skip
    factor = tl.load(scale + at, mask=inside, other=0.0)
    for minus_too in tl.static_range(2):
        row = minus if minus_too else plus
        kept = inside & paired if minus_too else inside
        tl.store(result + row, tl.load(rows + row, mask=kept, other=0.0) * factor, mask=kept)


@triton.jit
def _products(left, right, result, n_edges,
              CHANNELS: tl.constexpr, LMAX: tl.constexpr, N_ROWS: tl.constexpr,
              N_NUMBERS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Sum products of rows."""
    plus, minus, at, inside, paired = _places(n_edges, CHANNELS, LMAX, N_ROWS, N_NUMBERS,
                                              BLOCK_E, BLOCK_C)  # fmt: skip
    kept = inside & paired
    total = tl.load(left + plus, mask=inside, other=0.0) * tl.load(right + plus, mask=inside,
                                                                   other=0.0)  # fmt: skip
    total += tl.load(left + minus, mask=kept, other=0.0) * tl.load(right + minus, mask=kept,
                                                                   other=0.0)  # fmt: skip
    tl.store(result + at, total, mask=inside)
