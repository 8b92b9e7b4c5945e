"""Rotation into and out of the edge frames, and the torque: the raw kernels of eSCN convolutions.

Every kernel works on tiles (edges, rows of one degree, channels). The matrix of an edge meets the
features of one degree as a sum of outer products, so each feature is read once, in whole lines of
channels, and nothing but the result is written. All sums are in single precision (double for
double), whatever the features are.
"""

# Only Triton's compiler goes through tl.static_range; to a type checker it raises.
# pyright: reportGeneralTypeIssues=false

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomeq.ops.edge.along import Ends, Found, Moved, Radial
from atomeq.ops.edge.blockwise import WayIn
from atomeq.ops.edge.so2_map import SO2Shape
from atomeq.ops.edge.wigner import generators
from atomeq.ops.orders import orders_of
from atomeq.ops.tables import constant_table, table_like
from atomeq.ops.triton_launch import (
    INTERPRETING,
    accumulator,
    ceil_div,
    channel_tile,
    contiguous,
    degrees,
    edge_tile,
    launch,
    operand_dtype,
    power_of_2,
    product_precision,
    slots,
)

# X_x, X_y and X_z have at most 2, 1 and 2 nonzeros in a row: the axes of these five terms.
TERMS = (1, 0, 0, 2, 2)
_WIDEST_RADIAL = 128  # values of an edge that factors are made of on the way
_COEFFICIENT = 1e-9  # below this an element of a generator is rounding


def gather_rotate(
    x: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    *,
    scale: Tensor | None = None,
    radial: Radial | None = None,
    operand: bool = False,
) -> Tensor:
    """Return scale * W G x, (n_edges, n_rows, S * channels).

    Args:
        x: Features of atoms, (n_atoms, n_sph, channels), or of edges if there are no indices.
        wigner: (n_edges, n_rows, n_sph), in m-primary order and block diagonal in l.
        indices: Atoms of the edges, (n_edges,) each; joined along the channels.
        scale: Factors shared by +m and -m, (n_edges, sum over m of (lmax - m + 1) * S * channels).
        radial: In the place of the scale: values h (n_edges, k), a weight (n_scales, k) and a bias
            that give it, h A^T + b. It is not written.
        operand: Whether the result is read by a map alone, and may have the precision of those.
    """
    dtype = operand_dtype(x) if operand else x.dtype
    if radial is not None and (radial[0].shape[1] > _WIDEST_RADIAL or x.dtype == torch.float64):
        scale, radial = torch.nn.functional.linear(*radial), None
    return _rotate(x, None, wigner, None, indices, scale, None, dtype, radial)


def rotate_along(
    x: Tensor, ends: Ends, scale: Tensor | None, moved: Moved, shape: SO2Shape
) -> Tensor:
    """Return s (W G x' + W' G x) + s' W G x, (n_edges, n_rows * S * channels)."""
    matrices = ends.wigner, moved.wigner
    factors = ends.indices, scale, moved.scale
    return _rotate(moved.x, x, *matrices, *factors, x.dtype).flatten(1)


def _rotate(
    x: Tensor | None,
    other: Tensor | None,
    wigner: Tensor,
    other_wigner: Tensor | None,
    indices: Sequence[Tensor],
    scale: Tensor | None,
    other_scale: Tensor | None,
    dtype: torch.dtype,
    radial: Radial | None = None,
) -> Tensor:
    """Return s (W G x + W' G o) + s' W G o; what is None is 0, but for the scale, which is 1."""
    like = x if x is not None else other
    assert like is not None
    n_edges, n_rows, n_sph = wigner.shape
    lmax, mmax = orders_of(n_rows, n_sph)
    channels = like.shape[2]
    width = max(1, len(indices)) * channels
    result = like.new_empty(n_edges, n_rows, width, dtype=dtype)
    sizes = slots(lmax, mmax)
    block_c = channel_tile(channels)
    block_e = edge_tile(max(sizes), block_c, share=1 if other_scale is None else 2)
    if radial is not None:  # 64 edges of lmax = 2 read its weight once; three products need room
        threefold = product_precision(like.dtype) == "tf32x3"
        block_c = min(block_c, 16 if threefold else 32)
        block_e = max(16, (8192 if threefold else 16384) // (max(sizes) * block_c))
    others = (other if other_wigner is not None or other_scale is not None else None), other_wigner
    launch(
        _gather_rotate,
        (ceil_div(n_edges, block_e), ceil_div(channels, block_c), max(1, len(indices))),
        *_plain(x, others[0], wigner, others[1]),
        *_two(indices),
        *_plain(scale, other_scale, *(radial or (None, None, None))),
        result,
        like=like,
        n_edges=n_edges,
        RADIAL=0 if radial is None else radial[0].shape[1],
        RADIAL_TILE=0 if radial is None else max(16, power_of_2(radial[0].shape[1])),
        PRECISION=product_precision(like.dtype),
        UPCAST=INTERPRETING and like.dtype == torch.bfloat16,
        WIDTH=width,
        CHANNELS=channels,
        LMAX=lmax,
        MMAX=mmax,
        N_ROWS=n_rows,
        SLOTS=sizes,
        SUM=accumulator(like.dtype),
        BLOCK_E=block_e,
        BLOCK_C=block_c,
        num_warps=4 if radial is None else 8,
    )
    return result


def _plain(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else contiguous(tensor) for tensor in tensors]


def _two(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Return one or two tensors, or none, as two arguments of a kernel."""
    return [*map(contiguous, tensors), None, None][:2]


def rotate_scatter(
    rows: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    segments: Sequence[Tensor],
    n_atoms: int,
    *,
    scale: Tensor | None = None,
    factor: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Return G^T W^T (factor * scale * rows).

    One program owns one degree of one atom and adds its edges in their order: no atomics, and the
    same bits every time.

    Args:
        rows: Rows in m-primary order, (n_edges, n_rows, S * channels).
        wigner: (n_edges, n_rows, n_sph).
        indices: Atoms of the edges for each part of the channels; none for a result per edge.
        segments: For each index where the edges of every atom begin, (n_atoms + 1,), in the list
            of edges sorted by that atom, (n_edges,), which follows.
        n_atoms: Number of atoms.
        scale: As in :func:`gather_rotate`, where there are indices.
        factor: (n_edges,).
        total: The result is added to it, in place.

    Returns:
        (n_atoms, n_sph, channels), or (n_edges, n_sph, channels).
    """
    wigner = contiguous(wigner)
    if not indices:
        return _rotate_back_into(contiguous(rows), wigner, *_plain(factor), total)
    lmax = orders_of(wigner.shape[1], wigner.shape[2])[0]
    adding = total is not None
    size = n_atoms, (lmax + 1) ** 2, rows.shape[2] // len(indices)
    result = rows.new_empty(size) if total is None else total
    matrices, factors = (wigner, None), (scale, None, factor, None)
    _scatter(rows, None, *matrices, indices, segments, *factors, result, adding=adding)
    return result


def scatter_along(
    ends: Ends,
    rows: Tensor,
    scale: Tensor | None,
    factor: Tensor | None,
    moved: Moved,
    shape: SO2Shape,
    total: Tensor,
) -> None:
    """Add G^T (W^T (f s y' + (f s)' y) + W'^T f s y) to the features of the atoms."""
    matrices, factors = (ends.wigner, moved.wigner), (scale, moved.scale, factor, moved.factor)
    given = moved.rows, rows, *matrices, ends.indices, ends.segments, *factors
    _scatter(*given, total, adding=True)


def _scatter(
    rows: Tensor | None,
    others: Tensor | None,
    wigner: Tensor,
    other_wigner: Tensor | None,
    indices: Sequence[Tensor],
    segments: Sequence[Tensor],
    scale: Tensor | None,
    other_scale: Tensor | None,
    factor: Tensor | None,
    other_factor: Tensor | None,
    result: Tensor,
    *,
    adding: bool,
) -> None:
    """Write or add G^T (W^T f s y + W'^T f s o + W^T (f s' + f' s) o); what is None is 0 or 1."""
    if other_wigner is None and other_scale is None and other_factor is None:
        others = None
    lmax, mmax = orders_of(wigner.shape[1], wigner.shape[2])
    block_c = channel_tile(result.shape[2])
    launch(
        _rotate_scatter,
        (len(result), lmax + 1, ceil_div(result.shape[2], block_c)),
        *_plain(rows, others, wigner, other_wigner),
        *_two(segments[::2]),
        *_two(segments[1::2]),
        *_plain(scale, other_scale, factor, other_factor),
        result,
        like=result,
        SIDES=len(indices),
        CHANNELS=result.shape[2],
        LMAX=lmax,
        MMAX=mmax,
        N_ROWS=wigner.shape[1],
        DEGREES=degrees(lmax),
        ADDING=adding,
        SUM=accumulator(result.dtype),
        BLOCK_E=2,  # two edges on two warps: 128 registers at lmax = 2, none spilled at 6
        BLOCK_C=block_c,
        num_warps=2 if others is None else 4,
    )


def _rotate_back_into(
    rows: Tensor, wigner: Tensor, factor: Tensor | None, total: Tensor | None
) -> Tensor:
    """Return W^T (factor * rows) of every edge, added to the total if there is one."""
    n_edges, n_rows, channels = rows.shape
    lmax, mmax = orders_of(n_rows, wigner.shape[2])
    result = rows.new_empty(n_edges, (lmax + 1) ** 2, channels) if total is None else total
    sizes = degrees(lmax)
    block_c = channel_tile(channels)
    block_e = edge_tile(max(sizes), block_c)
    launch(
        _rotate_back,
        (ceil_div(n_edges, block_e), ceil_div(channels, block_c)),
        rows,
        wigner,
        factor,
        result,
        like=rows,
        n_edges=n_edges,
        CHANNELS=channels,
        LMAX=lmax,
        MMAX=mmax,
        N_ROWS=n_rows,
        DEGREES=sizes,
        ADDING=total is not None,
        SUM=accumulator(rows.dtype),
        BLOCK_E=block_e,
        BLOCK_C=block_c,
    )
    return result


def torque(x: Tensor, rows: Tensor, wigner: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """Return <W^T rows, X_k G x> of every edge for the three generators X_k, (n_edges, 3).

    Neither the gathered nor the rotated features are written. Arguments as in
    :func:`rotate_scatter` and :func:`gather_rotate`.
    """
    result = wigner.new_zeros(len(wigner), 3)
    _launch_gradient(x, wigner, indices, rows, turn=result, SIGN=1)
    return result


def leave_gradient(
    x: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    rows: Tensor | None,
    factor: Tensor | None,
    to_factor: Tensor | None,
    turn: Tensor | None,
    also: Tensor | None,
) -> Tensor:
    """Return f W G x + also, (n_edges, n_rows, channels); <f W G x, rows> is differentiated.

    The gradient of f is written, and a turn of each edge is lessened by the torque; None is not
    wanted, and of neither are there rows.
    """
    result = x.new_empty(*wigner.shape[:2], x.shape[2])
    given = {"factor": factor, "also": also}
    given |= {"rotated": result, "to_factor": to_factor, "turn": turn}
    _launch_gradient(x, wigner, indices, rows, **given, SIGN=-1)
    return result


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

    z is s W G x, where that is wanted.
    """
    rows = grad.unflatten(1, (shape.n_rows, -1))
    if into.scale is not None or into.turn is not None or z is not None:
        given = {"scale": scale, "through": into.scale, "turn": into.turn, "entered": z}
        _launch_gradient(x, wigner, indices, rows, **given, SIGN=-1)
    if into.x is not None:
        given = rows, wigner, indices, segments, len(x)
        rotate_scatter(*given, scale=scale, total=into.x)


def gradient_along(
    x: Tensor,
    ends: Ends,
    rows: Tensor,
    scale: Tensor | None,
    factor: Tensor | None,
    moved: Moved,
    shape: SO2Shape,
    into: Found,
) -> None:
    """Differentiate the gradients of <y, f s W G x> along a direction, see ops/edge/along.py."""
    if all([part is None for part in into]):
        return
    _launch_over_edges(
        _gradient_along,
        _plain(x, moved.x, ends.wigner, moved.wigner),
        ends.indices,
        _plain(rows, moved.rows, scale, moved.scale, factor, moved.factor, moved.turn),
        into,
        x,
        ends.wigner,
        share=8,
    )


def _launch_gradient(
    x: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    rows: Tensor | None,
    *,
    SIGN: int,
    scale: Tensor | None = None,
    factor: Tensor | None = None,
    also: Tensor | None = None,
    entered: Tensor | None = None,
    through: Tensor | None = None,
    rotated: Tensor | None = None,
    to_factor: Tensor | None = None,
    turn: Tensor | None = None,
) -> None:
    """Launch over edges; what is written is contiguous, and None is not wanted."""
    _launch_over_edges(
        _gradient,
        _plain(x, wigner),
        indices,
        _plain(rows, scale, factor, also),
        (entered, through, rotated, to_factor, turn),
        x,
        wigner,
        share=4,
        SIGN=SIGN,
    )


def _launch_over_edges(
    kernel: Any,
    rotated: Iterable[Tensor | None],
    indices: Sequence[Tensor],
    given: Iterable[Tensor | None],
    written: Iterable[Tensor | None],
    x: Tensor,
    wigner: Tensor,
    *,
    share: int,
    **constants: Any,
) -> None:
    """Launch a kernel that differentiates rotations, tiles of edges with all their channels."""
    (n_edges, n_rows, n_sph), channels = wigner.shape, x.shape[2]
    lmax, mmax = orders_of(n_rows, n_sph)
    block_c, sizes = channel_tile(channels), slots(lmax, mmax)
    block_e = edge_tile(max(*sizes, *degrees(lmax)), block_c, share=share)
    launch(
        kernel,
        (ceil_div(n_edges, block_e),),
        *rotated,
        *_two(indices),
        *given,
        table_like(_neighbours, lmax, like=wigner),
        table_like(_coefficients, lmax, like=wigner),
        *written,
        like=x,
        n_edges=n_edges,
        SIDES=max(1, len(indices)),
        CHANNELS=channels,
        LMAX=lmax,
        MMAX=mmax,
        N_ROWS=n_rows,
        SLOTS=sizes,
        DEGREES=degrees(lmax),
        TERMS=TERMS,
        SUM=accumulator(x.dtype),
        BLOCK_E=block_e,
        BLOCK_C=block_c,
        **constants,
    )


@constant_table
def _neighbours(lmax: int) -> Tensor:
    """Return the columns that the five terms of each row stand in, (n_sph, 5)."""
    return torch.tensor(
        [[column for column, _ in terms] for terms in _terms(lmax)], dtype=torch.int32
    )


@constant_table
def _coefficients(lmax: int) -> Tensor:
    """Return the five terms of each row of the generators, (n_sph, 5)."""
    terms = [[value for _, value in terms] for terms in _terms(lmax)]
    return torch.tensor(terms, dtype=torch.float64, device="cpu")


def _terms(lmax: int) -> list[list[tuple[int, float]]]:
    """Return column and value of the five terms of each row."""
    table = generators(lmax)
    found = []
    for row in range(table.shape[1]):
        terms: list[tuple[int, float]] = []
        for axis in (1, 0, 2):
            entries = table[axis, row]  # <z, X x>: rows belong to z, columns to x
            columns = (entries.abs() > _COEFFICIENT).nonzero().flatten().tolist()
            terms += [(column, entries[column].item()) for column in columns]
            terms += [(row, 0.0)] * (TERMS.count(axis) - len(columns))
        found.append(terms)
    return found


# What follows runs on the device. Offsets of edges and atoms are 64-bit, those within one are not.


@triton.jit
def _row(l, m, minus, LMAX: tl.constexpr):
    """Return the place of (l, +m) or (l, -m) among the m-primary rows."""
    before = (LMAX + 1) + 2 * ((m - 1) * (LMAX + 1) - (m * (m - 1)) // 2)
    return tl.where(m == 0, l, before + minus * (LMAX + 1 - m) + l - m)


@triton.jit
def _number(l, m, LMAX: tl.constexpr):
    """Return the place of (l, |m|) among the factors that +m and -m share."""
    return m * (LMAX + 1) - (m * (m - 1)) // 2 + l - m


@triton.jit
def _slots(l: tl.constexpr, LMAX: tl.constexpr, MMAX: tl.constexpr, SIZE: tl.constexpr):
    """Return order and m-primary row of each slot of a degree, and which of them there are."""
    slot = tl.arange(0, SIZE)
    m, minus = slot // 2, slot % 2
    real = (m <= l) & (m <= MMAX) & (m >= minus)  # there is no -0
    return m, tl.where(real, _row(l, m, minus, LMAX), 0), real


@triton.jit
def _rotated(total, features, matrix, row, present, inside, l: tl.constexpr, LMAX: tl.constexpr,
             CHANNELS: tl.constexpr, SUM: tl.constexpr):  # fmt: skip
    """Add the rows of degree l of W x, (edges, slots, channels)."""
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    for column in tl.static_range(l * l, (l + 1) * (l + 1)):
        element = tl.load(matrix + (row * N_SPH + column)[None, :], mask=present,
                          other=0.0).to(SUM)  # fmt: skip
        feature = tl.load(features + column * CHANNELS, mask=inside, other=0.0).to(SUM)
        total += element[:, :, None] * feature[:, None, :]
    return total


@triton.jit
def _mapped(radial, weight, bias, edge, there, number, present, RADIAL: tl.constexpr,
            TILE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
            SUM: tl.constexpr):  # fmt: skip
    """Return some factors of some edges, h A^T + b."""
    inner = tl.arange(0, TILE)
    values = tl.load(radial + (edge * RADIAL)[:, None] + inner[None, :],
                     mask=there[:, None] & (inner < RADIAL)[None, :], other=0.0)  # fmt: skip
    matrix = tl.load(weight + (number * RADIAL)[None, :] + inner[:, None],
                     mask=(inner < RADIAL)[:, None] & present[None, :], other=0.0)  # fmt: skip
    if UPCAST:  # bf16 products fail in the interpreter
        values, matrix = values.to(tl.float32), matrix.to(tl.float32)
    found = tl.dot(values, matrix, input_precision=PRECISION).to(SUM)
    if bias is not None:
        found += tl.load(bias + number, mask=present, other=0.0).to(SUM)[None, :]
    return found


@triton.jit
def _gather_rotate(x, other, wigner, other_wigner, source, target, scale, other_scale,
                   radial, radial_weight, radial_bias, result, n_edges, RADIAL: tl.constexpr,
                   RADIAL_TILE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
                   WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
                   LMAX: tl.constexpr, MMAX: tl.constexpr, N_ROWS: tl.constexpr,
                   SLOTS: tl.constexpr, SUM: tl.constexpr,
                   BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Write s (W G x + W' G o) + s' W G o, of what there is."""
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    N_SCALES: tl.constexpr = (N_ROWS + LMAX + 1) // 2
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    side = tl.program_id(2)
    there = edge < n_edges
    edge = edge.to(tl.int64)
    atom = edge
    if source is not None:
        atom = tl.load(source + edge, mask=there, other=0).to(tl.int64)
    if target is not None:
        end = tl.load(target + edge, mask=there, other=0).to(tl.int64)
        atom = tl.where(side == 0, atom, end)
    inside = there[:, None] & (channel < CHANNELS)[None, :]
    at_atom = (atom * (N_SPH * CHANNELS))[:, None] + channel[None, :]
    at_matrix = (edge * (N_ROWS * N_SPH))[:, None]
    own = (side * CHANNELS + channel)[None, None, :]
    for l in tl.static_range(LMAX + 1):
        m, row, real = _slots(l, LMAX, MMAX, SLOTS[l])
        total = tl.zeros((BLOCK_E, tl.constexpr(SLOTS[l]), BLOCK_C), dtype=SUM)
        if x is not None:
            total = _rotated(total, x + at_atom, wigner + at_matrix, row, there[:, None], inside,
                             l, LMAX, CHANNELS, SUM)  # fmt: skip
        if other_wigner is not None:
            total = _rotated(total, other + at_atom, other_wigner + at_matrix, row,
                             there[:, None], inside, l, LMAX, CHANNELS, SUM)  # fmt: skip
        kept = inside[:, None, :] & real[None, :, None]
        factor = (edge * (N_SCALES * WIDTH))[:, None, None] + own
        factor += (_number(l, m, LMAX) * WIDTH)[None, :, None]
        if scale is not None:
            total *= tl.load(scale + factor, mask=kept, other=0.0).to(SUM)
        if radial is not None:
            factors = tl.zeros((BLOCK_E, tl.constexpr(SLOTS[l]), BLOCK_C), dtype=SUM)
            for order in tl.static_range(min(l, MMAX) + 1):
                number = _number(l, order, LMAX) * WIDTH + side * CHANNELS + channel
                own_factors = _mapped(radial, radial_weight, radial_bias, edge, there, number,
                                      channel < CHANNELS, RADIAL, RADIAL_TILE, PRECISION, UPCAST,
                                      SUM)  # fmt: skip
                factors = tl.where((m == order)[None, :, None], own_factors[:, None, :], factors)
            total *= factors
        if other_scale is not None:
            rows = tl.zeros((BLOCK_E, tl.constexpr(SLOTS[l]), BLOCK_C), dtype=SUM)
            rows = _rotated(rows, other + at_atom, wigner + at_matrix, row, there[:, None], inside,
                            l, LMAX, CHANNELS, SUM)  # fmt: skip
            total += rows * tl.load(other_scale + factor, mask=kept, other=0.0).to(SUM)
        out = (result + edge * (N_ROWS * WIDTH))[:, None, None] + own
        tl.store(out + (row * WIDTH)[None, :, None], total, mask=kept)


@triton.jit
def _add_lab_rows(total, y, at, wigner, at_matrix, scale, at_scale, present, inside,
                  l: tl.constexpr, LMAX: tl.constexpr, MMAX: tl.constexpr, WIDTH: tl.constexpr,
                  SIZE: tl.constexpr, SUM: tl.constexpr):  # fmt: skip
    """Add the coefficients of degree l of W^T s y, (edges, 2 l + 1 and padding, channels)."""
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    place = tl.arange(0, SIZE)
    # The padding of the last degree would read beyond the matrix; what it makes is not used.
    column = at_matrix + tl.where(place < 2 * l + 1, l * l + place, 0)[None, :]
    for slot in tl.static_range(2 * l + 2):
        if slot != 1 and slot // 2 <= MMAX:  # there is no -0
            row = _row(l, slot // 2, slot % 2, LMAX)
            element = tl.load(wigner + row * N_SPH + column, mask=present, other=0.0).to(SUM)
            feature = tl.load(y + row * WIDTH + at, mask=inside, other=0.0).to(SUM)
            if scale is not None:
                factor = scale + _number(l, slot // 2, LMAX) * WIDTH + at_scale
                feature *= tl.load(factor, mask=inside, other=0.0).to(SUM)
            total += element[:, :, None] * feature[:, None, :]
    return total


@triton.jit
def _add_moved_rows(total, y, other, at, wigner, other_wigner, at_matrix, scale, other_scale,
                    at_scale, present, inside, l: tl.constexpr, LMAX: tl.constexpr,
                    MMAX: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
                    SUM: tl.constexpr):  # fmt: skip
    """Add those of W^T s y + W'^T s o + W^T s' o, of what there is."""
    if y is not None:
        total = _add_lab_rows(total, y, at, wigner, at_matrix, scale, at_scale, present, inside, l,
                              LMAX, MMAX, WIDTH, SIZE, SUM)  # fmt: skip
    if other_wigner is not None:
        total = _add_lab_rows(total, other, at, other_wigner, at_matrix, scale, at_scale, present,
                              inside, l, LMAX, MMAX, WIDTH, SIZE, SUM)  # fmt: skip
    if other_scale is not None:
        total = _add_lab_rows(total, other, at, wigner, at_matrix, other_scale, at_scale, present,
                              inside, l, LMAX, MMAX, WIDTH, SIZE, SUM)  # fmt: skip
    return total


@triton.jit
def _rotate_scatter(y, other, wigner, other_wigner, pointer, other_pointer, order, other_order,
                    scale, other_scale, envelope, other_envelope, result,
                    SIDES: tl.constexpr, CHANNELS: tl.constexpr,
                    LMAX: tl.constexpr, MMAX: tl.constexpr, N_ROWS: tl.constexpr,
                    DEGREES: tl.constexpr, ADDING: tl.constexpr,
                    SUM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Sum W^T f s y + W'^T f s o + W^T (f s' + f' s) o on the atoms, of what there is."""
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    N_SCALES: tl.constexpr = (N_ROWS + LMAX + 1) // 2
    WIDTH: tl.constexpr = SIDES * CHANNELS
    atom = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    for l in tl.static_range(LMAX + 1):
        if tl.program_id(1) == l:  # a branch that a whole program takes
            total = tl.zeros((BLOCK_E, tl.constexpr(DEGREES[l]), BLOCK_C), dtype=SUM)
            for side in tl.static_range(SIDES):
                starts = pointer if side == 0 else other_pointer
                edges = order if side == 0 else other_order
                begin, last = tl.load(starts + atom), tl.load(starts + atom + 1)
                while begin < last:  # not range(): the interpreter has none over loaded numbers
                    edge = begin + tl.arange(0, BLOCK_E)
                    there = edge < last
                    edge = tl.load(edges + edge, mask=there, other=0).to(tl.int64)
                    present, inside = there[:, None], there[:, None] & (channel < CHANNELS)[None, :]
                    at = (edge * (N_ROWS * WIDTH))[:, None] + (side * CHANNELS + channel)[None, :]
                    at_scale = (edge * (N_SCALES * WIDTH))[:, None]
                    at_scale += (side * CHANNELS + channel)[None, :]
                    at_matrix = (edge * (N_ROWS * N_SPH))[:, None]
                    part = tl.zeros((BLOCK_E, tl.constexpr(DEGREES[l]), BLOCK_C), dtype=SUM)
                    if envelope is None:
                        part = total
                    part = _add_moved_rows(
                        part, y, other, at, wigner, other_wigner, at_matrix, scale, other_scale,
                        at_scale, present, inside, l, LMAX, MMAX, WIDTH, DEGREES[l],
                        SUM)  # fmt: skip
                    if envelope is None:
                        total = part
                    else:
                        factor = tl.load(envelope + edge, mask=there, other=0.0).to(SUM)
                        total += factor[:, None, None] * part
                    if other_envelope is not None:
                        part = tl.zeros((BLOCK_E, tl.constexpr(DEGREES[l]), BLOCK_C), dtype=SUM)
                        part = _add_lab_rows(part, other, at, wigner, at_matrix, scale, at_scale,
                                             present, inside, l, LMAX, MMAX, WIDTH, DEGREES[l],
                                             SUM)  # fmt: skip
                        factor = tl.load(other_envelope + edge, mask=there, other=0.0).to(SUM)
                        total += factor[:, None, None] * part
                    begin += BLOCK_E
            place = tl.arange(0, DEGREES[l])
            kept = (place < 2 * l + 1)[:, None] & (channel < CHANNELS)[None, :]
            out = (
                result
                + atom * (N_SPH * CHANNELS)
                + ((l * l + place)[:, None] * CHANNELS + channel[None, :])
            )
            summed = tl.sum(total, axis=0)
            if ADDING:
                summed += tl.load(out, mask=kept, other=0.0).to(SUM)
            tl.store(out, summed, mask=kept)


@triton.jit
def _rotate_back(y, wigner, envelope, result, n_edges,
                 CHANNELS: tl.constexpr, LMAX: tl.constexpr, MMAX: tl.constexpr,
                 N_ROWS: tl.constexpr, DEGREES: tl.constexpr, ADDING: tl.constexpr,
                 SUM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = edge < n_edges
    edge = edge.to(tl.int64)
    inside = there[:, None] & (channel < CHANNELS)[None, :]
    at = (edge * (N_ROWS * CHANNELS))[:, None] + channel[None, :]
    at_matrix = (edge * (N_ROWS * N_SPH))[:, None]
    out = (result + edge * (N_SPH * CHANNELS))[:, None, None] + channel[None, None, :]
    for l in tl.static_range(LMAX + 1):
        lab = tl.zeros((BLOCK_E, tl.constexpr(DEGREES[l]), BLOCK_C), dtype=SUM)
        lab = _add_lab_rows(lab, y, at, wigner, at_matrix, None, at, there[:, None], inside, l,
                            LMAX, MMAX, CHANNELS, DEGREES[l], SUM)  # fmt: skip
        if envelope is not None:
            lab *= tl.load(envelope + edge, mask=there, other=0.0).to(SUM)[:, None, None]
        place = tl.arange(0, DEGREES[l])
        kept = inside[:, None, :] & (place < 2 * l + 1)[None, :, None]
        place_out = out + ((l * l + place) * CHANNELS)[None, :, None]
        if ADDING:
            lab += tl.load(place_out, mask=kept, other=0.0).to(SUM)
        tl.store(place_out, lab, mask=kept)


@triton.jit
def _add_torque(about_x, about_y, about_z, features, lab, neighbours, coefficients, inside,
                l: tl.constexpr, CHANNELS: tl.constexpr, TERMS: tl.constexpr, SIZE: tl.constexpr,
                SUM: tl.constexpr):  # fmt: skip
    """Add <lab, X_k x> of degree l for the three generators."""
    place = tl.arange(0, SIZE)
    real = place < 2 * l + 1
    column = tl.where(real, l * l + place, 0)
    kept = inside[:, None, :] & real[None, :, None]
    for q in tl.static_range(5):
        neighbour = tl.load(neighbours + column * 5 + q)
        element = tl.load(coefficients + column * 5 + q).to(SUM)
        feature = features[:, None, :] + (neighbour * CHANNELS)[None, :, None]
        product = tl.load(feature, mask=kept, other=0.0).to(SUM) * lab * element[None, :, None]
        part = tl.sum(tl.sum(product, axis=1), axis=1)
        if TERMS[q] == 0:
            about_x += part
        elif TERMS[q] == 1:
            about_y += part
        else:
            about_z += part
    return about_x, about_y, about_z


@triton.jit
def _write_pairs(through, products, at_scale, inside, l: tl.constexpr, LMAX: tl.constexpr,
                 MMAX: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
                 BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Write products summed over +m and -m, which are neighbours among the slots of a degree."""
    pairs: tl.constexpr = SIZE // 2
    total = tl.sum(tl.reshape(products, (BLOCK_E, pairs, 2, BLOCK_C)), axis=2)
    order = tl.arange(0, pairs)
    kept = inside[:, None, :] & ((order <= l) & (order <= MMAX))[None, :, None]
    number = at_scale[:, None, :] + (_number(l, order, LMAX) * WIDTH)[None, :, None]
    tl.store(through + number, total, mask=kept)


@triton.jit
def _gradient(x, wigner, source, target, y, scale, envelope, also, neighbours,  # noqa: C901
              coefficients, entered, through, rotated, to_envelope, turn, n_edges,
              SIDES: tl.constexpr, CHANNELS: tl.constexpr, LMAX: tl.constexpr,
              MMAX: tl.constexpr, N_ROWS: tl.constexpr, SLOTS: tl.constexpr,
              DEGREES: tl.constexpr, TERMS: tl.constexpr, SIGN: tl.constexpr, SUM: tl.constexpr,
              BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Differentiate <y, f s W G x>: all that edges get of it, each only if it is not None.

    These are s W G x, the products of y and W G x summed over +m and -m, f W G x and what is
    ``also`` there, <y, W G x>, and the torque, which is added with a sign.
    """
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    N_SCALES: tl.constexpr = (N_ROWS + LMAX + 1) // 2
    WIDTH: tl.constexpr = SIDES * CHANNELS
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    there = edge < n_edges
    edge = edge.to(tl.int64)
    at_matrix = (edge * (N_ROWS * N_SPH))[:, None]
    about_x = tl.zeros((BLOCK_E,), dtype=SUM)
    about_y = tl.zeros((BLOCK_E,), dtype=SUM)
    about_z = tl.zeros((BLOCK_E,), dtype=SUM)
    overlap = tl.zeros((BLOCK_E,), dtype=SUM)
    factor = tl.full((BLOCK_E,), 1.0, dtype=SUM)
    if envelope is not None:
        factor *= tl.load(envelope + edge, mask=there, other=0.0).to(SUM)
    for side in tl.static_range(SIDES):
        atom = edge
        if source is not None:
            index = source if side == 0 else target
            atom = tl.load(index + edge, mask=there, other=0).to(tl.int64)
        for start in tl.static_range(0, CHANNELS, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            inside = there[:, None] & (channel < CHANNELS)[None, :]
            features = x + (atom * (N_SPH * CHANNELS))[:, None] + channel[None, :]
            at = (edge * (N_ROWS * WIDTH))[:, None] + (side * CHANNELS + channel)[None, :]
            at_scale = (edge * (N_SCALES * WIDTH))[:, None] + (side * CHANNELS + channel)[None, :]
            for l in tl.static_range(LMAX + 1):
                m, row, real = _slots(l, LMAX, MMAX, SLOTS[l])
                kept = inside[:, None, :] & real[None, :, None]
                place = at[:, None, :] + (row * WIDTH)[None, :, None]
                if entered is not None or through is not None or rotated is not None:
                    total = tl.zeros((BLOCK_E, tl.constexpr(SLOTS[l]), BLOCK_C), dtype=SUM)
                    total = _rotated(total, features, wigner + at_matrix, row, there[:, None],
                                     inside, l, LMAX, CHANNELS, SUM)  # fmt: skip
                    if entered is not None:
                        value = total
                        if scale is not None:
                            number = (_number(l, m, LMAX) * WIDTH)[None, :, None]
                            value *= tl.load(scale + at_scale[:, None, :] + number, mask=kept,
                                             other=0.0).to(SUM)  # fmt: skip
                        tl.store(entered + place, value, mask=kept)
                    if rotated is not None:
                        value = total * factor[:, None, None]
                        if also is not None:
                            value += tl.load(also + place, mask=kept, other=0.0).to(SUM)
                        tl.store(rotated + place, value, mask=kept)
                    if y is not None:
                        total *= tl.load(y + place, mask=kept, other=0.0).to(SUM)
                        overlap += tl.sum(tl.sum(total, axis=1), axis=1)
                    if through is not None:
                        _write_pairs(through, total, at_scale, inside, l, LMAX, MMAX, WIDTH,
                                     SLOTS[l], BLOCK_E, BLOCK_C)  # fmt: skip
                if turn is not None and l > 0:
                    lab = tl.zeros((BLOCK_E, tl.constexpr(DEGREES[l]), BLOCK_C), dtype=SUM)
                    lab = _add_lab_rows(lab, y, at, wigner, at_matrix, scale, at_scale,
                                        there[:, None], inside, l, LMAX, MMAX, WIDTH, DEGREES[l],
                                        SUM)  # fmt: skip
                    about_x, about_y, about_z = _add_torque(
                        about_x, about_y, about_z, features, lab, neighbours, coefficients, inside,
                        l, CHANNELS, TERMS, DEGREES[l], SUM)  # fmt: skip
    if to_envelope is not None:
        tl.store(to_envelope + edge, overlap, mask=there)
    if turn is not None:
        out = turn + edge * 3
        factor *= SIGN
        about_x = tl.load(out, mask=there, other=0.0).to(SUM) + factor * about_x
        about_y = tl.load(out + 1, mask=there, other=0.0).to(SUM) + factor * about_y
        about_z = tl.load(out + 2, mask=there, other=0.0).to(SUM) + factor * about_z
        tl.store(out, about_x, mask=there)
        tl.store(out + 1, about_y, mask=there)
        tl.store(out + 2, about_z, mask=there)


@triton.jit
def _gradient_along(x, moved_x, wigner, moved_wigner, source, target, y, moved_y,  # noqa: C901
                    scale, moved_scale, envelope, moved_envelope, angle, neighbours, coefficients,
                    through, moved_through, rotated, overlap, turn, n_edges,
                    SIDES: tl.constexpr, CHANNELS: tl.constexpr, LMAX: tl.constexpr,
                    MMAX: tl.constexpr, N_ROWS: tl.constexpr, SLOTS: tl.constexpr,
                    DEGREES: tl.constexpr, TERMS: tl.constexpr, SUM: tl.constexpr,
                    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Differentiate what ``_gradient`` writes along a direction, each only if it is not None."""
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    N_SCALES: tl.constexpr = (N_ROWS + LMAX + 1) // 2
    WIDTH: tl.constexpr = SIDES * CHANNELS
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    there = edge < n_edges
    present = there[:, None]
    edge = edge.to(tl.int64)
    at_matrix = (edge * (N_ROWS * N_SPH))[:, None]
    about_x = tl.zeros((BLOCK_E,), dtype=SUM)
    about_y, about_z = about_x, about_x  # T' - t x T, of the torque T
    plain_x, plain_y, plain_z = about_x, about_x, about_x  # T
    overlaps = about_x
    factor = tl.full((BLOCK_E,), 1.0, dtype=SUM)
    if envelope is not None:
        factor *= tl.load(envelope + edge, mask=there, other=0.0).to(SUM)
    moved_factor = tl.zeros((BLOCK_E,), dtype=SUM)
    if moved_envelope is not None:
        moved_factor += tl.load(moved_envelope + edge, mask=there, other=0.0).to(SUM)
    for side in tl.static_range(SIDES):
        atom = edge
        if source is not None:
            index = source if side == 0 else target
            atom = tl.load(index + edge, mask=there, other=0).to(tl.int64)
        for start in tl.static_range(0, CHANNELS, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            inside = present & (channel < CHANNELS)[None, :]
            at_atom = (atom * (N_SPH * CHANNELS))[:, None] + channel[None, :]
            at = (edge * (N_ROWS * WIDTH))[:, None] + (side * CHANNELS + channel)[None, :]
            at_scale = (edge * (N_SCALES * WIDTH))[:, None] + (side * CHANNELS + channel)[None, :]
            for l in tl.static_range(LMAX + 1):
                _, row, real = _slots(l, LMAX, MMAX, SLOTS[l])
                kept = inside[:, None, :] & real[None, :, None]
                place = at[:, None, :] + (row * WIDTH)[None, :, None]
                if (through is not None or moved_through is not None or rotated is not None
                        or overlap is not None):  # fmt: skip
                    none = tl.zeros((BLOCK_E, tl.constexpr(SLOTS[l]), BLOCK_C), dtype=SUM)
                    r = _rotated(none, x + at_atom, wigner + at_matrix, row, present, inside, l,
                                 LMAX, CHANNELS, SUM)  # fmt: skip
                    moved_r = none
                    if moved_x is not None:
                        moved_r = _rotated(moved_r, moved_x + at_atom, wigner + at_matrix, row,
                                           present, inside, l, LMAX, CHANNELS, SUM)  # fmt: skip
                    if moved_wigner is not None:
                        moved_r = _rotated(moved_r, x + at_atom, moved_wigner + at_matrix, row,
                                           present, inside, l, LMAX, CHANNELS, SUM)  # fmt: skip
                    if rotated is not None:
                        value = factor[:, None, None] * moved_r
                        if moved_envelope is not None:
                            value += moved_factor[:, None, None] * r
                        tl.store(rotated + place, value, mask=kept)
                    if through is not None or moved_through is not None or overlap is not None:
                        own = tl.load(y + place, mask=kept, other=0.0).to(SUM)
                        moved_r *= own
                        if moved_y is not None:
                            moved_r += tl.load(moved_y + place, mask=kept, other=0.0).to(SUM) * r
                        if overlap is not None:
                            overlaps += tl.sum(tl.sum(moved_r, axis=1), axis=1)
                        if moved_through is not None:
                            _write_pairs(moved_through, moved_r, at_scale, inside, l, LMAX, MMAX,
                                         WIDTH, SLOTS[l], BLOCK_E, BLOCK_C)  # fmt: skip
                        if through is not None:
                            _write_pairs(through, own * r, at_scale, inside, l, LMAX, MMAX, WIDTH,
                                         SLOTS[l], BLOCK_E, BLOCK_C)  # fmt: skip
                if turn is not None and l > 0:
                    none = tl.zeros((BLOCK_E, tl.constexpr(DEGREES[l]), BLOCK_C), dtype=SUM)
                    lab = _add_lab_rows(none, y, at, wigner, at_matrix, scale, at_scale, present,
                                        inside, l, LMAX, MMAX, WIDTH, DEGREES[l],
                                        SUM)  # fmt: skip
                    moved_lab = _add_moved_rows(
                        none, moved_y, y, at, wigner, moved_wigner, at_matrix, scale, moved_scale,
                        at_scale, present, inside, l, LMAX, MMAX, WIDTH, DEGREES[l],
                        SUM)  # fmt: skip
                    moved_lab *= factor[:, None, None]
                    if moved_envelope is not None:
                        moved_lab += moved_factor[:, None, None] * lab
                    lab *= factor[:, None, None]
                    about_x, about_y, about_z = _add_torque(
                        about_x, about_y, about_z, x + at_atom, moved_lab, neighbours,
                        coefficients, inside, l, CHANNELS, TERMS, DEGREES[l], SUM)  # fmt: skip
                    if moved_x is not None:
                        about_x, about_y, about_z = _add_torque(
                            about_x, about_y, about_z, moved_x + at_atom, lab, neighbours,
                            coefficients, inside, l, CHANNELS, TERMS, DEGREES[l], SUM)  # fmt: skip
                    if angle is not None:
                        plain_x, plain_y, plain_z = _add_torque(
                            plain_x, plain_y, plain_z, x + at_atom, lab, neighbours,
                            coefficients, inside, l, CHANNELS, TERMS, DEGREES[l], SUM)  # fmt: skip
    if overlap is not None:
        tl.store(overlap + edge, overlaps, mask=there)
    if turn is not None:
        if angle is not None:
            t_x = tl.load(angle + edge * 3, mask=there, other=0.0).to(SUM)
            t_y = tl.load(angle + edge * 3 + 1, mask=there, other=0.0).to(SUM)
            t_z = tl.load(angle + edge * 3 + 2, mask=there, other=0.0).to(SUM)
            about_x -= t_y * plain_z - t_z * plain_y
            about_y -= t_z * plain_x - t_x * plain_z
            about_z -= t_x * plain_y - t_y * plain_x
        out = turn + edge * 3
        tl.store(out, tl.load(out, mask=there, other=0.0).to(SUM) - about_x, mask=there)
        tl.store(out + 1, tl.load(out + 1, mask=there, other=0.0).to(SUM) - about_y, mask=there)
        tl.store(out + 2, tl.load(out + 2, mask=there, other=0.0).to(SUM) - about_z, mask=there)
