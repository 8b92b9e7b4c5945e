"""Rotation into and out of the edge frames, and the torque: the raw kernels of eSCN convolutions.

Every kernel works on tiles (edges, rows of one degree, channels). The matrix of an edge meets the
features of one degree as a sum of outer products, so each feature is read once, in whole lines of
channels, and nothing but the result is written. All sums are in single precision (double for
double), whatever the features are.
"""

# Only Triton's compiler goes through tl.static_range; to a type checker it raises.
# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomeq.ops.edge.wigner import generators
from atomeq.ops.orders import orders_of
from atomeq.ops.tables import constant_table, table_like
from atomeq.ops.triton_launch import (
    accumulator,
    ceil_div,
    channel_tile,
    contiguous,
    degrees,
    edge_tile,
    launch,
    operand_dtype,
    slots,
)

# X_x, X_y and X_z have at most 2, 1 and 2 nonzeros in a row: the axes of these five terms.
TERMS = (1, 0, 0, 2, 2)
_COEFFICIENT = 1e-9  # below this an element of a generator is rounding


def gather_rotate(
    x: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    *,
    scale: Tensor | None = None,
    operand: bool = False,
) -> Tensor:
    """Return scale * W G x, (n_edges, n_rows, S * channels).

    Args:
        x: Features of atoms, (n_atoms, n_sph, channels), or of edges if there are no indices.
        wigner: (n_edges, n_rows, n_sph), in m-primary order and block diagonal in l.
        indices: Atoms of the edges, (n_edges,) each; joined along the channels.
        scale: Factors shared by +m and -m, (n_edges, sum over m of (lmax - m + 1) * S * channels).
        operand: Whether the result is read by a map alone, and may have the precision of those.
    """
    x, wigner = contiguous(x), contiguous(wigner)
    n_edges, n_rows, n_sph = wigner.shape
    lmax, mmax = orders_of(n_rows, n_sph)
    channels = x.shape[2]
    width = max(1, len(indices)) * channels
    dtype = operand_dtype(x) if operand else x.dtype
    result = x.new_empty(n_edges, n_rows, width, dtype=dtype)
    sizes = slots(lmax, mmax)
    block_c = channel_tile(channels)
    block_e = edge_tile(max(sizes), block_c)
    for side, index in enumerate(indices or (None,)):
        launch(
            _gather_rotate,
            (ceil_div(n_edges, block_e), ceil_div(channels, block_c)),
            x,
            wigner,
            None if index is None else contiguous(index),
            None if scale is None else contiguous(scale),
            result,
            like=x,
            n_edges=n_edges,
            FIRST=side * channels,
            WIDTH=width,
            CHANNELS=channels,
            LMAX=lmax,
            MMAX=mmax,
            N_ROWS=n_rows,
            N_SCALES=sum(lmax - m + 1 for m in range(mmax + 1)),
            SLOTS=sizes,
            GATHERED=index is not None,
            SCALED=scale is not None,
            SUM=accumulator(x.dtype),
            BLOCK_E=block_e,
            BLOCK_C=block_c,
        )
    return result


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
    """Return G^T W^T (factor * rows).

    One program owns one degree of one atom and adds its edges in their order: no atomics, and the
    same bits every time.

    Args:
        rows: Rows in m-primary order, (n_edges, n_rows, S * channels).
        wigner: (n_edges, n_rows, n_sph).
        indices: Atoms of the edges for each part of the channels; none for a result per edge.
        segments: For each index where the edges of every atom begin, (n_atoms + 1,), in the list
            of edges sorted by that atom, (n_edges,), which follows.
        n_atoms: Number of atoms.
        factor: (n_edges,).
        total: The result is added to it, in place.

    Returns:
        (n_atoms, n_sph, channels), or (n_edges, n_sph, channels).
    """
    rows, wigner = contiguous(rows), contiguous(wigner)
    factor = None if factor is None else contiguous(factor)
    if not indices:
        return _rotate_back_into(rows, wigner, factor, total)
    lmax, mmax = orders_of(wigner.shape[1], wigner.shape[2])
    channels = rows.shape[2] // len(indices)
    adding = total is not None
    result = rows.new_empty(n_atoms, (lmax + 1) ** 2, channels) if total is None else total
    block_c = channel_tile(channels)
    for side in range(len(indices)):
        launch(
            _rotate_scatter,
            (n_atoms, lmax + 1, ceil_div(channels, block_c)),
            rows,
            wigner,
            contiguous(segments[2 * side]),
            contiguous(segments[2 * side + 1]),
            factor,
            result,
            like=rows,
            FIRST=side * channels,
            WIDTH=rows.shape[2],
            CHANNELS=channels,
            LMAX=lmax,
            MMAX=mmax,
            N_ROWS=wigner.shape[1],
            DEGREES=degrees(lmax),
            WEIGHTED=factor is not None,
            ADDING=adding or side > 0,
            SUM=accumulator(rows.dtype),
            BLOCK_E=2,  # two edges on two warps: 128 registers at lmax = 2, none spilled at 6
            BLOCK_C=block_c,
            num_warps=2,
        )
    return result


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
        WEIGHTED=factor is not None,
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
    x, rows, wigner = contiguous(x), contiguous(rows), contiguous(wigner)
    (n_edges, n_rows, n_sph), channels = wigner.shape, x.shape[2]
    lmax, mmax = orders_of(n_rows, n_sph)
    result = wigner.new_empty(n_edges, 3)
    sizes = degrees(lmax)
    block_c = channel_tile(channels)
    block_e = edge_tile(max(sizes), block_c, share=2)
    for side, index in enumerate(indices or (None,)):
        launch(
            _torque,
            (ceil_div(n_edges, block_e),),
            x,
            rows,
            wigner,
            None if index is None else contiguous(index),
            table_like(_neighbours, lmax, like=wigner),
            table_like(_coefficients, lmax, like=wigner),
            result,
            like=x,
            n_edges=n_edges,
            FIRST=side * channels,
            WIDTH=rows.shape[2],
            CHANNELS=channels,
            LMAX=lmax,
            MMAX=mmax,
            N_ROWS=n_rows,
            DEGREES=sizes,
            TERMS=TERMS,
            GATHERED=index is not None,
            ADDING=side > 0,
            SUM=accumulator(x.dtype),
            BLOCK_E=block_e,
            BLOCK_C=block_c,
        )
    return result


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
def _gather_rotate(x, wigner, index, scale, result, n_edges,
                   FIRST: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
                   LMAX: tl.constexpr, MMAX: tl.constexpr, N_ROWS: tl.constexpr,
                   N_SCALES: tl.constexpr, SLOTS: tl.constexpr,
                   GATHERED: tl.constexpr, SCALED: tl.constexpr, SUM: tl.constexpr,
                   BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = edge < n_edges
    edge = edge.to(tl.int64)
    atom = tl.load(index + edge, mask=there, other=0).to(tl.int64) if GATHERED else edge
    inside = there[:, None] & (channel < CHANNELS)[None, :]
    features = x + (atom * (N_SPH * CHANNELS))[:, None] + channel[None, :]
    matrix = (wigner + edge * (N_ROWS * N_SPH))[:, None]
    out = (result + edge * (N_ROWS * WIDTH))[:, None, None] + (FIRST + channel)[None, None, :]
    for l in tl.static_range(LMAX + 1):
        slot = tl.arange(0, SLOTS[l])
        m, minus = slot // 2, slot % 2
        real = (m <= l) & (m <= MMAX) & (m >= minus)  # there is no -0
        row = tl.where(real, _row(l, m, minus, LMAX), 0)
        total = tl.zeros((BLOCK_E, tl.constexpr(SLOTS[l]), BLOCK_C), dtype=SUM)
        for column in tl.static_range(l * l, (l + 1) * (l + 1)):
            element = tl.load(matrix + (row * N_SPH + column)[None, :], mask=there[:, None],
                              other=0.0).to(SUM)  # fmt: skip
            feature = tl.load(features + column * CHANNELS, mask=inside, other=0.0).to(SUM)
            total += element[:, :, None] * feature[:, None, :]
        kept = inside[:, None, :] & real[None, :, None]
        if SCALED:
            number = m * (LMAX + 1) - (m * (m - 1)) // 2 + l - m
            factor = (
                (scale + edge * (N_SCALES * WIDTH))[:, None, None]
                + FIRST
                + (number[None, :, None] * WIDTH + channel[None, None, :])
            )
            total *= tl.load(factor, mask=kept, other=0.0).to(SUM)
        tl.store(out + (row * WIDTH)[None, :, None], total, mask=kept)


@triton.jit
def _add_lab_rows(total, y, matrix, factor, present, inside, l: tl.constexpr, LMAX: tl.constexpr,
                  MMAX: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
                  SUM: tl.constexpr):  # fmt: skip
    """Add the coefficients of degree l of factor W^T y, (edges, 2 l + 1 and padding, channels)."""
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    place = tl.arange(0, SIZE)
    # The padding of the last degree would read beyond the matrix; what it makes is not used.
    column = tl.where(place < 2 * l + 1, l * l + place, 0)[None, :]
    for slot in tl.static_range(2 * l + 2):
        if slot != 1 and slot // 2 <= MMAX:  # there is no -0
            row = _row(l, slot // 2, slot % 2, LMAX)
            element = tl.load(matrix + row * N_SPH + column, mask=present, other=0.0).to(SUM)
            feature = tl.load(y + row * WIDTH, mask=inside, other=0.0).to(SUM)
            total += (element * factor)[:, :, None] * feature[:, None, :]
    return total


@triton.jit
def _rotate_scatter(y, wigner, pointer, order, envelope, result,
                    FIRST: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
                    LMAX: tl.constexpr, MMAX: tl.constexpr, N_ROWS: tl.constexpr,
                    DEGREES: tl.constexpr, WEIGHTED: tl.constexpr, ADDING: tl.constexpr,
                    SUM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    atom = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last = tl.load(pointer + atom), tl.load(pointer + atom + 1)
    for l in tl.static_range(LMAX + 1):
        if tl.program_id(1) == l:  # a branch that a whole program takes
            total = tl.zeros((BLOCK_E, tl.constexpr(DEGREES[l]), BLOCK_C), dtype=SUM)
            begin = first
            while begin < last:  # not range(): the interpreter has none over loaded numbers
                edge = begin + tl.arange(0, BLOCK_E)
                there = edge < last
                edge = tl.load(order + edge, mask=there, other=0).to(tl.int64)
                inside = there[:, None] & (channel < CHANNELS)[None, :]
                rows = y + (edge * (N_ROWS * WIDTH))[:, None] + (FIRST + channel)[None, :]
                matrix = (wigner + edge * (N_ROWS * N_SPH))[:, None]
                factor = 1.0
                if WEIGHTED:
                    factor = tl.load(envelope + edge, mask=there, other=0.0).to(SUM)[:, None]
                total = _add_lab_rows(total, rows, matrix, factor, there[:, None], inside, l, LMAX,
                                      MMAX, WIDTH, DEGREES[l], SUM)  # fmt: skip
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
                 N_ROWS: tl.constexpr, DEGREES: tl.constexpr,
                 WEIGHTED: tl.constexpr, ADDING: tl.constexpr, SUM: tl.constexpr,
                 BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = edge < n_edges
    edge = edge.to(tl.int64)
    inside = there[:, None] & (channel < CHANNELS)[None, :]
    rows = y + (edge * (N_ROWS * CHANNELS))[:, None] + channel[None, :]
    matrix = (wigner + edge * (N_ROWS * N_SPH))[:, None]
    out = (result + edge * (N_SPH * CHANNELS))[:, None, None] + channel[None, None, :]
    factor = 1.0
    if WEIGHTED:
        factor = tl.load(envelope + edge, mask=there, other=0.0).to(SUM)[:, None]
    for l in tl.static_range(LMAX + 1):
        lab = tl.zeros((BLOCK_E, tl.constexpr(DEGREES[l]), BLOCK_C), dtype=SUM)
        lab = _add_lab_rows(lab, rows, matrix, factor, there[:, None], inside, l, LMAX, MMAX,
                            CHANNELS, DEGREES[l], SUM)  # fmt: skip
        place = tl.arange(0, DEGREES[l])
        kept = inside[:, None, :] & (place < 2 * l + 1)[None, :, None]
        place_out = out + ((l * l + place) * CHANNELS)[None, :, None]
        if ADDING:
            lab += tl.load(place_out, mask=kept, other=0.0).to(SUM)
        tl.store(place_out, lab, mask=kept)


@triton.jit
def _torque(x, y, wigner, index, neighbours, coefficients, result, n_edges,
            FIRST: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
            LMAX: tl.constexpr, MMAX: tl.constexpr, N_ROWS: tl.constexpr, DEGREES: tl.constexpr,
            TERMS: tl.constexpr, GATHERED: tl.constexpr,
            ADDING: tl.constexpr, SUM: tl.constexpr,
            BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    there = edge < n_edges
    edge = edge.to(tl.int64)
    atom = tl.load(index + edge, mask=there, other=0).to(tl.int64) if GATHERED else edge
    matrix = (wigner + edge * (N_ROWS * N_SPH))[:, None]
    about_x = tl.zeros((BLOCK_E,), dtype=SUM)
    about_y = tl.zeros((BLOCK_E,), dtype=SUM)
    about_z = tl.zeros((BLOCK_E,), dtype=SUM)
    for start in tl.static_range(0, CHANNELS, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        inside = there[:, None] & (channel < CHANNELS)[None, :]
        rows = y + (edge * (N_ROWS * WIDTH))[:, None] + (FIRST + channel)[None, :]
        features = x + (atom * (N_SPH * CHANNELS))[:, None, None] + channel[None, None, :]
        for l in tl.static_range(1, LMAX + 1):
            lab = tl.zeros((BLOCK_E, tl.constexpr(DEGREES[l]), BLOCK_C), dtype=SUM)
            lab = _add_lab_rows(lab, rows, matrix, 1.0, there[:, None], inside, l, LMAX, MMAX,
                                WIDTH, DEGREES[l], SUM)  # fmt: skip
            place = tl.arange(0, DEGREES[l])
            real = place < 2 * l + 1
            column = tl.where(real, l * l + place, 0)
            kept = inside[:, None, :] & real[None, :, None]
            for q in tl.static_range(5):
                neighbour = tl.load(neighbours + column * 5 + q)
                factor = tl.load(coefficients + column * 5 + q).to(SUM)
                feature = tl.load(features + (neighbour * CHANNELS)[None, :, None], mask=kept,
                                  other=0.0).to(SUM)  # fmt: skip
                product = feature * lab * factor[None, :, None]
                part = tl.sum(tl.sum(product, axis=1), axis=1)
                if TERMS[q] == 0:
                    about_x += part
                elif TERMS[q] == 1:
                    about_y += part
                else:
                    about_z += part
    out = result + edge * 3
    if ADDING:
        about_x += tl.load(out, mask=there, other=0.0).to(SUM)
        about_y += tl.load(out + 1, mask=there, other=0.0).to(SUM)
        about_z += tl.load(out + 2, mask=there, other=0.0).to(SUM)
    tl.store(out, about_x, mask=there)
    tl.store(out + 1, about_y, mask=there)
    tl.store(out + 2, about_z, mask=there)
