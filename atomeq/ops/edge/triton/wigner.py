"""The rows that take edges to +y, and gradients by the vectors of edges from those by a turn."""

# Only Triton's compiler goes through tl.static_range; to a type checker it raises.
# pyright: reportGeneralTypeIssues=false

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomeq.ops.edge.wigner import column_orders, tilt_tables
from atomeq.ops.tables import table_like
from atomeq.ops.triton_launch import accumulator, ceil_div, launch, power_of_2

_NUMBERS = 1024  # of one row of some edges, in a program
_EDGES = 128


def wigner_rows(call: SimpleNamespace) -> Tensor:
    """Return :func:`~atomeq.ops.edge.wigner.edge_wigner`, (n_edges, n_rows, n_sph)."""
    vectors, lmax = call.vectors, call.lmax
    tables = table_like(tilt_tables, lmax, call.mmax, like=vectors)
    n_rows, n_sph = tables.shape[2:]
    result = vectors.new_empty(len(vectors), n_rows, n_sph)
    block_c = power_of_2(n_sph)
    block_e = max(1, _NUMBERS // block_c)
    launch(
        *(_wigner, (ceil_div(len(vectors), block_e), n_rows), vectors, tables),
        *(table_like(column_orders, lmax, like=vectors), result),
        like=vectors,
        n_edges=len(vectors),
        LMAX=lmax,
        N_ROWS=n_rows,
        SUM=accumulator(vectors.dtype),
        BLOCK_E=block_e,
        BLOCK_C=block_c,
    )
    return result


def vector_gradient(call: SimpleNamespace) -> Tensor:
    """Return :func:`~atomeq.ops.edge.rotation.vector_gradient`, (n_edges, 3)."""
    result, n_edges = torch.empty_like(call.vectors), len(call.vectors)
    launch(
        *(_across, (ceil_div(n_edges, _EDGES),), call.turn, call.vectors, result),
        like=result,
        n_edges=n_edges,
        sign=call.sign,
        BLOCK_E=_EDGES,
    )
    return result


@triton.jit
def _wigner(vectors, tables, orders, result, n_edges, LMAX: tl.constexpr, N_ROWS: tl.constexpr,
            SUM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Write one row of some edges: multiples of both angles by recursion, see edge_wigner."""
    N_SPH: tl.constexpr = (LMAX + 1) * (LMAX + 1)
    HALF: tl.constexpr = (LMAX + 1) * N_ROWS * N_SPH  # of the table of cosines, or of sines
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    there = edge < n_edges
    edge = edge.to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    real = column < N_SPH
    x = tl.load(vectors + 3 * edge, mask=there, other=0.0).to(SUM)
    y = tl.load(vectors + 3 * edge + 1, mask=there, other=1.0).to(SUM)
    z = tl.load(vectors + 3 * edge + 2, mask=there, other=0.0).to(SUM)
    length = tl.sqrt(x * x + y * y + z * z)
    x, y, z = x / length, y / length, z / length
    # Beside the poles the squares of x and z may underflow, those of their ratio do not.
    larger = tl.maximum(tl.abs(x), tl.abs(z))
    divisor = tl.where(larger > 0.0, larger, 1.0)
    x, z = x / divisor, z / divisor
    across = tl.where(larger > 0.0, tl.sqrt(x * x + z * z), 1.0)
    polar = larger * across
    around_cos, around_sin = tl.where(larger > 0.0, z / across, 1.0), x / across
    order = tl.load(orders + column, mask=real, other=0)
    straight = tl.zeros((BLOCK_E, BLOCK_C), dtype=SUM)
    flipped = tl.zeros((BLOCK_E, BLOCK_C), dtype=SUM)
    alpha_cos = tl.zeros((BLOCK_E, BLOCK_C), dtype=SUM)
    alpha_sin = tl.zeros((BLOCK_E, BLOCK_C), dtype=SUM)
    b_cos, b_sin = tl.full((BLOCK_E,), 1.0, dtype=SUM), tl.zeros((BLOCK_E,), dtype=SUM)
    a_cos, a_sin = tl.full((BLOCK_E,), 1.0, dtype=SUM), tl.zeros((BLOCK_E,), dtype=SUM)
    for k in tl.static_range(LMAX + 1):
        at = tables + (k * N_ROWS + tl.program_id(1)) * N_SPH + column
        for turned in tl.static_range(2):
            cosine = tl.load(at + 2 * HALF * turned, mask=real, other=0.0).to(SUM)
            sine = tl.load(at + 2 * HALF * turned + HALF, mask=real, other=0.0).to(SUM)
            part = b_cos[:, None] * cosine[None, :] + b_sin[:, None] * sine[None, :]
            if turned:
                flipped += part
            else:
                straight += part
        own = (tl.abs(order) == k)[None, :]
        alpha_cos = tl.where(own, a_cos[:, None], alpha_cos)
        alpha_sin = tl.where(own, a_sin[:, None], alpha_sin)
        before = b_cos
        b_cos = before * y - b_sin * polar
        b_sin = b_sin * y + before * polar
        before = a_cos
        a_cos = before * around_cos - a_sin * around_sin
        a_sin = a_sin * around_cos + before * around_sin
    sign = tl.where(order > 0, -1.0, 1.0)[None, :]
    value = straight * alpha_cos + flipped * alpha_sin * sign
    out = (result + (edge * N_ROWS + tl.program_id(1)) * N_SPH)[:, None] + column[None, :]
    tl.store(out, value, mask=there[:, None] & real[None, :])


@triton.jit
def _across(turn, vectors, result, n_edges, sign, BLOCK_E: tl.constexpr):
    """Write sign t x v / |v|^2."""
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    there = edge < n_edges
    at = edge.to(tl.int64) * 3
    squared = tl.zeros((BLOCK_E,), dtype=vectors.dtype.element_ty)
    for axis in tl.static_range(3):
        part = tl.load(vectors + at + axis, mask=there, other=1.0)
        squared += part * part
    for axis in tl.static_range(3):
        one, two = (axis + 1) % 3, (axis + 2) % 3
        value = tl.load(turn + at + one, mask=there, other=0.0) * tl.load(
            vectors + at + two, mask=there, other=0.0)  # fmt: skip
        value -= tl.load(turn + at + two, mask=there, other=0.0) * tl.load(
            vectors + at + one, mask=there, other=0.0)  # fmt: skip
        tl.store(result + at + axis, sign * value / squared, mask=there)
