"""Rotation into and out of the edge frames, and the torque: the raw kernels of eSCN convolutions.

What the kernels are given, and in which tiles, is here; what they do is in ``rotation_kernels.py``.
The matrix of an edge meets the features of one degree as a sum of outer products, so each feature
is read once, in whole lines of channels, and nothing but the result is written. All sums are in
single precision (double for double), whatever the features are.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from atomeq.ops.edge.along import Ends, Found, Moved, Radial
from atomeq.ops.edge.blockwise import WayIn
from atomeq.ops.edge.so2_map import SO2Shape
from atomeq.ops.edge.triton.rotation_kernels import (
    rotate_back,
    rotate_back_and_sum,
    rotate_in,
    rotation_gradient,
    rotation_gradient_along,
)
from atomeq.ops.edge.wigner import generators
from atomeq.ops.orders import orders_of
from atomeq.ops.precision import operand_dtype
from atomeq.ops.tables import constant_table, table_like
from atomeq.ops.triton_launch import (
    INTERPRETING,
    accumulator,
    architecture,
    ceil_div,
    channel_tile,
    contiguous,
    degrees,
    edge_tile,
    launch,
    power_of_2,
    product_precision,
    slots,
)

# X_x, X_y and X_z have at most 2, 1 and 2 nonzeros in a row: the axes of these five terms.
TERMS = (1, 0, 0, 2, 2)
_WIDEST_RADIAL = 128  # values of an edge that factors are made of on the way
_WIDEST_OF_MANY = 64  # channels of a program that differentiates rotations of lmax > 2
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
        rotate_in,
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
    result = wigner.new_empty(size) if total is None else total
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
        rotate_back_and_sum,
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
        # Two edges on two warps: 128 registers at lmax = 2, none spilled at 6.
        BLOCK_E=2 if others is None or lmax <= 2 else 1,
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
        rotate_back,
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
    *,
    operand: bool = False,
) -> Tensor:
    """Return f W G x + also, (n_edges, n_rows, channels); <f W G x, rows> is differentiated.

    The gradient of f is written, and a turn of each edge is lessened by the torque; None is not
    wanted, and of neither are there rows. ``operand`` is that of :func:`gather_rotate`.
    """
    dtype = operand_dtype(x) if operand else x.dtype
    result = x.new_empty(*wigner.shape[:2], x.shape[2], dtype=dtype)
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
        rotation_gradient_along,
        _plain(x, moved.x, ends.wigner, moved.wigner),
        ends.indices,
        _plain(rows, moved.rows, scale, moved.scale, factor, moved.factor, moved.turn),
        into,
        x,
        ends.wigner,
        share=8,
        # With four an A100 spills 8 bytes at lmax = 2.
        num_warps=8 if architecture(x) < 90 and ends.wigner.shape[2] <= 9 else 4,
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
        rotation_gradient,
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
    if lmax > 2:  # nine columns of a degree want as many registers again: 440 bytes spilled else
        block_c, share = min(block_c, _WIDEST_OF_MANY), 2 * share
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
