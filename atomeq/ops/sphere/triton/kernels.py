"""Pointwise functions on the sphere: to the grid, a function or a product, and back, in one kernel.

A program owns some channels of one set of coefficients. It makes the values on a few points of the
grid at a time, by products on the tensor cores, and adds what they give to the coefficients of the
result: no value on the grid is ever written.
"""

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomeq.ops.specification import OpSpec
from atomeq.ops.triton_launch import (
    INTERPRETING,
    accumulator,
    ceil_div,
    launch,
    power_of_2,
    product_precision,
)
from atomeq.ops.triton_launch import refusal as launch_refusal

_POINTS = 32  # of the grid at a time
_CHANNELS = 64
_BYTES = 8192  # of one factor's padded coefficients: four factors fit a block's shared memory
_SMALLEST = 16  # side of a product on tensor cores
_FACTORS = 4  # SiLU and its first three derivatives, all that training with forces takes


def refusal(spec: OpSpec) -> str | None:
    """Return None if these kernels serve the call, else the reason why not."""
    return None if by_torch(spec) else launch_refusal(spec)


def by_torch(spec: OpSpec) -> bool:
    """Whether a function of the user's is called between two products of matrices."""
    return spec.op == "sphere_pointwise"


def sphere_form(call: SimpleNamespace) -> Tensor:
    """Return back [f^(order)(A_0 t_0) * prod (A_i t_i)].

    Raises:
        NotImplementedError: If the derivative is higher than the third.
    """
    factors, back = call.factors, call.back
    if len(factors) > _FACTORS:
        raise NotImplementedError(
            f"the triton kernels have {_FACTORS - 1} derivatives of SiLU on the sphere and "
            f"one more is wanted; use_backend('reference') has them all"
        )
    first, channels = factors[0], factors[0].shape[2]
    result = first.new_empty(len(first), back.shape[0], channels)
    absent = [None] * (_FACTORS - len(factors))
    rows = [factor.shape[1] for factor in factors] + [1] * len(absent)
    block_c = _channels_at_once(channels, max(*rows, back.shape[0]), first.dtype)
    launch(
        _sphere_form,
        (len(first), ceil_div(channels, block_c)),
        *factors,
        *absent,
        *call.matrices,
        *absent,
        back,
        result,
        like=first,
        CHANNELS=channels,
        N_POINTS=back.shape[1],
        ROWS=tuple(rows),
        PADDED=tuple(_padded(number) for number in rows),
        OUT_ROWS=back.shape[0],
        OUT_PADDED=_padded(back.shape[0]),
        FACTORS=len(factors),
        ORDER=call.order,
        PRECISION=product_precision(first.dtype),
        UPCAST=INTERPRETING and first.dtype == torch.bfloat16,
        SUM=accumulator(first.dtype),
        POINTS=_POINTS,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return result


def _padded(rows: int) -> int:
    return max(_SMALLEST, power_of_2(rows))


def _channels_at_once(channels: int, rows: int, dtype: torch.dtype) -> int:
    most = _BYTES // (_padded(rows) * max(dtype.itemsize, torch.float32.itemsize))
    return max(_SMALLEST, min(_CHANNELS, most, power_of_2(channels)))


@triton.jit
def _block(pointer, rows, columns, N_ROWS: tl.constexpr, N_COLUMNS: tl.constexpr,
           UPCAST: tl.constexpr):  # fmt: skip
    """Load a block of a matrix stored row by row, with zeros beyond its sides."""
    inside = (rows < N_ROWS)[:, None] & (columns < N_COLUMNS)[None, :]
    value = tl.load(pointer + rows[:, None] * N_COLUMNS + columns[None, :], mask=inside, other=0.0)
    return value.to(tl.float32) if UPCAST else value  # bf16 products fail in the interpreter


@triton.jit
def _values(coefficients, matrix, item, points, channels, N_ROWS: tl.constexpr,
            PADDED: tl.constexpr, N_POINTS: tl.constexpr, CHANNELS: tl.constexpr,
            PRECISION: tl.constexpr, UPCAST: tl.constexpr, SUM: tl.constexpr):  # fmt: skip
    """Return the values on some points of one factor's function."""
    rows = tl.arange(0, PADDED)
    to_grid = _block(matrix, points, rows, N_POINTS, N_ROWS, UPCAST)
    at = coefficients + item * (N_ROWS * CHANNELS)
    given = _block(at, rows, channels, N_ROWS, CHANNELS, UPCAST)
    return tl.dot(to_grid, given, input_precision=PRECISION, out_dtype=SUM)


@triton.jit
def _silu(value, ORDER: tl.constexpr):
    """Return a derivative of v s(v): v s^(k) + k s^(k-1)."""
    gate = tl.sigmoid(value)
    slope = gate * (1.0 - gate)
    if ORDER == 0:
        return value * gate
    if ORDER == 1:
        return value * slope + gate
    bend = slope * (1.0 - 2.0 * gate)
    if ORDER == 2:
        return value * bend + 2.0 * slope
    return value * (slope * (1.0 - 6.0 * slope)) + 3.0 * bend


@triton.jit
def _sphere_form(t0, t1, t2, t3, a0, a1, a2, a3, back, result, CHANNELS: tl.constexpr,
                 N_POINTS: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
                 OUT_ROWS: tl.constexpr, OUT_PADDED: tl.constexpr, FACTORS: tl.constexpr,
                 ORDER: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
                 SUM: tl.constexpr, POINTS: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    out_rows = tl.arange(0, OUT_PADDED)
    total = tl.zeros((OUT_PADDED, BLOCK_C), dtype=SUM)
    for start in range(0, N_POINTS, POINTS):
        points = start + tl.arange(0, POINTS)
        value = _values(t0, a0, item, points, channels, ROWS[0], PADDED[0], N_POINTS, CHANNELS,
                        PRECISION, UPCAST, SUM)  # fmt: skip
        if ORDER >= 0:
            value = _silu(value, ORDER)
        if FACTORS > 1:
            value *= _values(t1, a1, item, points, channels, ROWS[1], PADDED[1], N_POINTS,
                             CHANNELS, PRECISION, UPCAST, SUM)  # fmt: skip
        if FACTORS > 2:
            value *= _values(t2, a2, item, points, channels, ROWS[2], PADDED[2], N_POINTS,
                             CHANNELS, PRECISION, UPCAST, SUM)  # fmt: skip
        if FACTORS > 3:
            value *= _values(t3, a3, item, points, channels, ROWS[3], PADDED[3], N_POINTS,
                             CHANNELS, PRECISION, UPCAST, SUM)  # fmt: skip
        from_grid = _block(back, out_rows, points, OUT_ROWS, N_POINTS, UPCAST)
        value = value.to(from_grid.dtype)
        total = tl.dot(from_grid, value, total, input_precision=PRECISION, out_dtype=SUM)
    kept = (out_rows < OUT_ROWS)[:, None] & (channels < CHANNELS)[None, :]
    at = result + item * (OUT_ROWS * CHANNELS)
    tl.store(at + out_rows[:, None] * CHANNELS + channels[None, :], total, mask=kept)
