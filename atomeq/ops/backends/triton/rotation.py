"""Rotation into and out of the edge frames, and the torque: the raw kernels of eSCN convolutions.

Every kernel works on tiles (edges, rows of one degree, channels). The matrix of an edge meets the
features of one degree as a sum of outer products, so each feature is read once, in whole lines of
channels, and nothing but the result is written. All sums are in single precision (double for
double), whatever the features are.

Where an edge turns with an angular velocity omega, the derivative of its matrix is W (omega . X) with
the generators X_a of so(3). :func:`turned` makes it, an eighth of the features' size at most, and the
same kernels then serve the derivatives.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomeq.ops.backends.triton.launch import (
    accumulator,
    channel_tile,
    contiguous,
    degrees,
    edge_tile,
    launch,
    orders,
    slots,
)
from atomeq.ops.tables import constant_table, table_like
from atomeq.ops.wigner import generators, m_primary_order

TERMS = (1, 0, 0, 2, 2)  # the axis of each of the five terms of a column of omega . X
_FLAT = 1024  # elements of one program where they are all alike
_COEFFICIENT = 1e-9  # below this an element of a generator is rounding


def gather_rotate(
    x: Tensor,
    wigner: Tensor,
    indices: tuple[Tensor, ...],
    *,
    lmax: int,
    mmax: int,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gather atoms by each index, join along the channels, rotate into the edge frames, scale.

    Args:
        x: Features of atoms, (n_atoms, n_sph, channels).
        wigner: (n_edges, n_rows, n_sph).
        indices: Atoms of the edges, one index or two, (n_edges,).
        lmax: Highest degree.
        mmax: Highest order.
        scale: Factors by order and degree, shared by +m and -m, (n_edges, sum over m of
            (lmax - m + 1) * len(indices) * channels).
        dtype: Dtype of the result; that of x if not given.

    Returns:
        Rows in m-primary order, (n_edges, n_rows, len(indices) * channels).
    """
    x, wigner = contiguous(x), contiguous(wigner)
    n_edges, n_rows, _ = wigner.shape
    channels = x.shape[2]
    width = len(indices) * channels
    result = x.new_empty(n_edges, n_rows, width, dtype=dtype or x.dtype)
    sizes = slots(lmax, mmax)
    block_c = channel_tile(channels)
    block_e = edge_tile(max(sizes), block_c)
    grid = (triton.cdiv(n_edges, block_e), triton.cdiv(channels, block_c))
    for side, index in enumerate(indices):
        launch(
            _gather_rotate,
            grid,
            x,
            wigner,
            contiguous(index),
            None if scale is None else contiguous(scale),
            result,
            like=x,
            n_edges=n_edges,
            FIRST=side * channels,
            WIDTH=width,
            CHANNELS=channels,
            LMAX=lmax,
            MMAX=mmax,
            N_ROWS=wigner.shape[1],
            N_SCALES=sum(lmax - m + 1 for m in range(mmax + 1)),
            SLOTS=sizes,
            SCALED=scale is not None,
            SUM=accumulator(x.dtype),
            BLOCK_E=block_e,
            BLOCK_C=block_c,
        )
    return result


def scale_gradient(
    x: Tensor,
    wigner: Tensor,
    indices: tuple[Tensor, ...],
    grad: Tensor,
    *,
    lmax: int,
    mmax: int,
) -> Tensor:
    """Return the derivative of <grad, gather_rotate(x, ...)> with respect to its scale.

    The rotated features are made again, and only their products with the gradient are written.

    Args:
        x: As in :func:`gather_rotate`; so are the other arguments.
        wigner: (n_edges, n_rows, n_sph).
        indices: Atoms of the edges.
        grad: (n_edges, n_rows, len(indices) * channels).
        lmax: Highest degree.
        mmax: Highest order.

    Returns:
        (n_edges, sum over m of (lmax - m + 1) * len(indices) * channels).
    """
    x, wigner, grad = contiguous(x), contiguous(wigner), contiguous(grad)
    n_edges, channels, width = wigner.shape[0], x.shape[2], grad.shape[2]
    n_scales = sum(lmax - m + 1 for m in range(mmax + 1))
    result = grad.new_empty(n_edges, n_scales * width)
    sizes = orders(lmax, mmax)
    block_c = channel_tile(channels)
    block_e = edge_tile(max(sizes), block_c, share=2)
    grid = (triton.cdiv(n_edges, block_e), triton.cdiv(channels, block_c))
    for side, index in enumerate(indices):
        launch(
            _scale_gradient,
            grid,
            x,
            wigner,
            contiguous(index),
            grad,
            result,
            like=x,
            n_edges=n_edges,
            FIRST=side * channels,
            WIDTH=width,
            CHANNELS=channels,
            LMAX=lmax,
            MMAX=mmax,
            N_ROWS=wigner.shape[1],
            N_SCALES=n_scales,
            ORDERS=sizes,
            SUM=accumulator(x.dtype),
            BLOCK_E=block_e,
            BLOCK_C=block_c,
        )
    return result


def rotate_scatter(
    y: Tensor,
    wigner: Tensor,
    pointers: tuple[Tensor, ...],
    edges: tuple[Tensor | None, ...],
    *,
    lmax: int,
    mmax: int,
    envelope: Tensor | None = None,
) -> Tensor:
    """Rotate edge features back to the lab frame, scale them and sum them on atoms.

    One program owns one degree of one atom and adds its edges in their order: no atomics, and the
    same bits every time.

    Args:
        y: Rows in m-primary order, (n_edges, n_rows, len(pointers) * channels).
        wigner: (n_edges, n_rows, n_sph).
        pointers: Where the edges of each atom begin and end, (n_atoms + 1,), for each part of the
            channels; the sums of the parts are added.
        edges: The edges sorted by that atom, (n_edges,), or None where they are sorted already.
        lmax: Highest degree.
        mmax: Highest order.
        envelope: Factors, (n_edges,).

    Returns:
        (n_atoms, n_sph, channels).
    """
    y, wigner = contiguous(y), contiguous(wigner)
    width = y.shape[2]
    channels = width // len(pointers)
    n_atoms = pointers[0].shape[0] - 1
    result = y.new_empty(n_atoms, (lmax + 1) ** 2, channels)
    sizes = degrees(lmax)
    block_c = channel_tile(channels)
    grid = (n_atoms, lmax + 1, triton.cdiv(channels, block_c))
    for side, (pointer, order) in enumerate(zip(pointers, edges, strict=True)):
        launch(
            _rotate_scatter,
            grid,
            y,
            wigner,
            contiguous(pointer),
            None if order is None else contiguous(order),
            None if envelope is None else contiguous(envelope),
            result,
            like=y,
            FIRST=side * channels,
            WIDTH=width,
            CHANNELS=channels,
            LMAX=lmax,
            MMAX=mmax,
            N_ROWS=wigner.shape[1],
            DEGREES=sizes,
            SORTED=order is None,
            WEIGHTED=envelope is not None,
            ADDING=side > 0,
            SUM=accumulator(y.dtype),
            BLOCK_E=edge_tile(max(sizes), block_c, share=2),
            BLOCK_C=block_c,
        )
    return result


def rotate_back(
    y: Tensor,
    wigner: Tensor,
    *,
    lmax: int,
    mmax: int,
    envelope: Tensor | None = None,
) -> Tensor:
    """Rotate edge features back to the lab frame, one result per edge.

    Args:
        y: Rows in m-primary order, (n_edges, n_rows, channels).
        wigner: (n_edges, n_rows, n_sph).
        lmax: Highest degree.
        mmax: Highest order.
        envelope: Factors, (n_edges,).

    Returns:
        (n_edges, n_sph, channels).
    """
    y, wigner = contiguous(y), contiguous(wigner)
    n_edges, _, channels = y.shape
    result = y.new_empty(n_edges, (lmax + 1) ** 2, channels)
    sizes = degrees(lmax)
    block_c = channel_tile(channels)
    block_e = edge_tile(max(sizes), block_c)
    launch(
        _rotate_back,
        (triton.cdiv(n_edges, block_e), triton.cdiv(channels, block_c)),
        y,
        wigner,
        None if envelope is None else contiguous(envelope),
        result,
        like=y,
        n_edges=n_edges,
        CHANNELS=channels,
        LMAX=lmax,
        MMAX=mmax,
        N_ROWS=wigner.shape[1],
        DEGREES=sizes,
        WEIGHTED=envelope is not None,
        SUM=accumulator(y.dtype),
        BLOCK_E=block_e,
        BLOCK_C=block_c,
    )
    return result


def torque(
    x: Tensor,
    y: Tensor,
    wigner: Tensor,
    indices: tuple[Tensor, ...] | None,
    *,
    lmax: int,
    mmax: int,
) -> Tensor:
    """Return <x, X_a W^T y> of every edge for the three generators X_a.

    Neither the gathered nor the rotated features are written: three numbers per edge are.

    Args:
        x: Features in the lab frame: of atoms, (n_atoms, n_sph, channels), or of edges.
        y: Rows in m-primary order, (n_edges, n_rows, len(indices) * channels).
        wigner: (n_edges, n_rows, n_sph).
        indices: Atoms of the edges for each part of the channels; None if x belongs to the edges.
        lmax: Highest degree.
        mmax: Highest order.

    Returns:
        (n_edges, 3), in the dtype of the matrices.
    """
    x, y, wigner = contiguous(x), contiguous(y), contiguous(wigner)
    n_edges, channels = wigner.shape[0], x.shape[2]
    result = wigner.new_empty(n_edges, 3)
    sizes = degrees(lmax)
    block_c = channel_tile(channels)
    block_e = edge_tile(max(sizes), block_c, share=2)
    neighbours, coefficients = _columns_like(lmax, like=wigner)
    for side, index in enumerate((None,) if indices is None else indices):
        launch(
            _torque,
            (triton.cdiv(n_edges, block_e),),
            x,
            y,
            wigner,
            None if index is None else contiguous(index),
            neighbours,
            coefficients,
            result,
            like=x,
            n_edges=n_edges,
            FIRST=side * channels,
            WIDTH=y.shape[2],
            CHANNELS=channels,
            LMAX=lmax,
            MMAX=mmax,
            N_ROWS=wigner.shape[1],
            DEGREES=sizes,
            TERMS=TERMS,
            GATHERED=index is not None,
            ADDING=side > 0,
            SUM=accumulator(x.dtype),
            BLOCK_E=block_e,
            BLOCK_C=block_c,
        )
    return result


def turned(wigner: Tensor, omega: Tensor, *, lmax: int) -> Tensor:
    """Return W (omega . X), the derivative of the matrices of edges that turn.

    Args:
        wigner: (n_edges, n_rows, n_sph).
        omega: Angular velocities, (n_edges, 3).
        lmax: Highest degree.

    Returns:
        (n_edges, n_rows, n_sph).
    """
    wigner = contiguous(wigner)
    result = torch.empty_like(wigner)
    launch(
        _turned,
        (triton.cdiv(wigner.numel(), _FLAT),),
        wigner,
        contiguous(omega),
        *_columns_like(lmax, like=wigner),
        result,
        like=wigner,
        n_elements=wigner.numel(),
        N_ROWS=wigner.shape[1],
        N_SPH=wigner.shape[2],
        TERMS=TERMS,
        SUM=accumulator(wigner.dtype),
        BLOCK=_FLAT,
    )
    return result


def _columns_like(lmax: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
    return (
        table_like(_neighbours, lmax, like=like),
        table_like(_coefficients, lmax, like=like),
    )


@constant_table
def _neighbours(lmax: int) -> Tensor:
    """Return the rows that the five terms of each column of omega . X stand in, (n_sph, 5)."""
    return torch.tensor([[row for row, _ in column] for column in _columns(lmax)], dtype=torch.int32)


@constant_table
def _coefficients(lmax: int) -> Tensor:
    """Return the five terms of each column of omega . X, (n_sph, 5)."""
    terms = [[value for _, value in column] for column in _columns(lmax)]
    return torch.tensor(terms, dtype=torch.float64)


def _columns(lmax: int) -> list[list[tuple[int, float]]]:
    table = generators(lmax)
    columns = []
    for column in range(table.shape[2]):
        terms: list[tuple[int, float]] = []
        for axis in (1, 0, 2):
            entries = table[axis, :, column]
            found = [(row, entries[row].item()) for row in range(len(entries))]
            found = [(row, value) for row, value in found if abs(value) > _COEFFICIENT]
            absent = [(column, 0.0)] * (TERMS.count(axis) - len(found))
            terms += found + absent
        columns.append(terms)
    return columns


def n_rows(lmax: int, mmax: int) -> int:
    """Return the number of m-primary rows."""
    return len(m_primary_order(lmax, mmax))


# What follows runs on the device. Offsets of edges and atoms are 64-bit, those within one are not.


@triton.jit
def _row(l, m, minus, LMAX: tl.constexpr):
    """Return the place of (l, +m) or (l, -m) among the m-primary rows."""
    before = (LMAX + 1) + 2 * ((m - 1) * (LMAX + 1) - (m * (m - 1)) // 2)
    return tl.where(m == 0, l, before + minus * (LMAX + 1 - m) + l - m)


@triton.jit
def _turned(wigner, omega, neighbours, coefficients, result, n_elements, N_ROWS: tl.constexpr,
            N_SPH: tl.constexpr, TERMS: tl.constexpr, SUM: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = element < n_elements
    column = element % N_SPH
    first = element - column
    velocity = omega + element // (N_ROWS * N_SPH) * 3
    total = tl.zeros((BLOCK,), dtype=SUM)
    for q in tl.static_range(5):
        neighbour = tl.load(neighbours + column * 5 + q)
        factor = tl.load(coefficients + column * 5 + q).to(SUM)
        speed = tl.load(velocity + TERMS[q], mask=there, other=0.0).to(SUM)
        total += tl.load(wigner + first + neighbour, mask=there, other=0.0).to(SUM) * (
            factor * speed
        )
    tl.store(result + element, total, mask=there)


@triton.jit
def _gather_rotate(x, wigner, index, scale, result, n_edges,
                   FIRST: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
                   LMAX: tl.constexpr, MMAX: tl.constexpr, N_ROWS: tl.constexpr,
                   N_SCALES: tl.constexpr, SLOTS: tl.constexpr,
                   SCALED: tl.constexpr, SUM: tl.constexpr,
                   BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = edge < n_edges
    edge = edge.to(tl.int64)
    atom = tl.load(index + edge, mask=there, other=0).to(tl.int64)
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
            factor = (scale + edge * (N_SCALES * WIDTH))[:, None, None] + FIRST + (
                number[None, :, None] * WIDTH + channel[None, None, :]
            )
            total *= tl.load(factor, mask=kept, other=0.0).to(SUM)
        tl.store(out + (row * WIDTH)[None, :, None], total, mask=kept)


@triton.jit
def _scale_gradient(x, wigner, index, grad, result, n_edges,
                    FIRST: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
                    LMAX: tl.constexpr, MMAX: tl.constexpr, N_ROWS: tl.constexpr,
                    N_SCALES: tl.constexpr, ORDERS: tl.constexpr,
                    SUM: tl.constexpr,
                    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = edge < n_edges
    edge = edge.to(tl.int64)
    atom = tl.load(index + edge, mask=there, other=0).to(tl.int64)
    inside = there[:, None] & (channel < CHANNELS)[None, :]
    features = x + (atom * (N_SPH * CHANNELS))[:, None] + channel[None, :]
    matrix = (wigner + edge * (N_ROWS * N_SPH))[:, None]
    grads = (grad + edge * (N_ROWS * WIDTH))[:, None, None] + (FIRST + channel)[None, None, :]
    out = (result + edge * (N_SCALES * WIDTH))[:, None, None] + (FIRST + channel)[None, None, :]
    for l in tl.static_range(LMAX + 1):
        m = tl.arange(0, ORDERS[l])
        real = (m <= l) & (m <= MMAX)
        paired = real & (m > 0)
        plus = tl.where(real, _row(l, m, 0, LMAX), 0)
        minus = tl.where(paired, _row(l, m, 1, LMAX), 0)
        upper = tl.zeros((BLOCK_E, tl.constexpr(ORDERS[l]), BLOCK_C), dtype=SUM)
        lower = tl.zeros((BLOCK_E, tl.constexpr(ORDERS[l]), BLOCK_C), dtype=SUM)
        for column in tl.static_range(l * l, (l + 1) * (l + 1)):
            feature = tl.load(features + column * CHANNELS, mask=inside, other=0.0).to(SUM)
            element = tl.load(matrix + (plus * N_SPH + column)[None, :], mask=there[:, None],
                              other=0.0).to(SUM)  # fmt: skip
            upper += element[:, :, None] * feature[:, None, :]
            element = tl.load(matrix + (minus * N_SPH + column)[None, :], mask=there[:, None],
                              other=0.0).to(SUM)  # fmt: skip
            lower += element[:, :, None] * feature[:, None, :]
        kept = inside[:, None, :] & real[None, :, None]
        both = inside[:, None, :] & paired[None, :, None]
        upper *= tl.load(grads + (plus * WIDTH)[None, :, None], mask=kept, other=0.0).to(SUM)
        lower *= tl.load(grads + (minus * WIDTH)[None, :, None], mask=both, other=0.0).to(SUM)
        number = m * (LMAX + 1) - (m * (m - 1)) // 2 + l - m
        tl.store(out + (number * WIDTH)[None, :, None], upper + lower, mask=kept)


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
                    DEGREES: tl.constexpr, SORTED: tl.constexpr,
                    WEIGHTED: tl.constexpr, ADDING: tl.constexpr,
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
                if SORTED:
                    edge = edge.to(tl.int64)
                else:
                    edge = tl.load(order + edge, mask=there, other=0).to(tl.int64)
                inside = there[:, None] & (channel < CHANNELS)[None, :]
                rows = y + (edge * (N_ROWS * WIDTH))[:, None] + (FIRST + channel)[None, :]
                matrix = (wigner + edge * (N_ROWS * N_SPH))[:, None]
                if WEIGHTED:
                    factor = tl.load(envelope + edge, mask=there, other=0.0).to(SUM)[:, None]
                else:
                    factor = 1.0
                total = _add_lab_rows(total, rows, matrix, factor, there[:, None], inside, l, LMAX,
                                      MMAX, WIDTH, DEGREES[l], SUM)  # fmt: skip
                begin += BLOCK_E
            place = tl.arange(0, DEGREES[l])
            kept = (place < 2 * l + 1)[:, None] & (channel < CHANNELS)[None, :]
            out = result + atom * (N_SPH * CHANNELS) + (
                (l * l + place)[:, None] * CHANNELS + channel[None, :]
            )
            summed = tl.sum(total, axis=0)
            if ADDING:
                summed += tl.load(out, mask=kept, other=0.0).to(SUM)
            tl.store(out, summed, mask=kept)


@triton.jit
def _rotate_back(y, wigner, envelope, result, n_edges,
                 CHANNELS: tl.constexpr, LMAX: tl.constexpr, MMAX: tl.constexpr,
                 N_ROWS: tl.constexpr, DEGREES: tl.constexpr,
                 WEIGHTED: tl.constexpr, SUM: tl.constexpr,
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
    if WEIGHTED:
        factor = tl.load(envelope + edge, mask=there, other=0.0).to(SUM)[:, None]
    else:
        factor = 1.0
    for l in tl.static_range(LMAX + 1):
        lab = tl.zeros((BLOCK_E, tl.constexpr(DEGREES[l]), BLOCK_C), dtype=SUM)
        lab = _add_lab_rows(lab, rows, matrix, factor, there[:, None], inside, l, LMAX, MMAX,
                            CHANNELS, DEGREES[l], SUM)  # fmt: skip
        place = tl.arange(0, DEGREES[l])
        kept = inside[:, None, :] & (place < 2 * l + 1)[None, :, None]
        tl.store(out + ((l * l + place) * CHANNELS)[None, :, None], lab, mask=kept)


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
