"""The matrices that take edges to +y, by wigner.c, and what their turns give the vectors."""

import functools
from types import SimpleNamespace

import torch
from torch import Tensor

from atomeq.ops.c_compiler import c_library, threads_for
from atomeq.ops.edge.wigner import tilt_tables
from atomeq.ops.orders import row_degrees
from atomeq.ops.tables import constant_table

_EDGES_PER_THREAD = 2000  # fewer do not pay for a thread


def wigner_rows(call: SimpleNamespace) -> Tensor:
    """Return the rows that take edges to +y, (n_edges, n_rows, n_sph)."""
    vectors, lmax = call.vectors, call.lmax
    degrees, tables = _tables_of(vectors.dtype, lmax, call.mmax)
    wigner = vectors.new_empty(len(vectors), len(degrees), (lmax + 1) ** 2)
    library = c_library("edge/cpu/wigner.c", vectors.dtype, LMAX=lmax)
    library.edge_wigner(
        *(vectors, degrees, tables, len(degrees), wigner, len(vectors)),
        threads_for(len(vectors), _EDGES_PER_THREAD),
    )
    return wigner


def vector_gradient(call: SimpleNamespace) -> Tensor:
    """Return sign t x v / |v|^2, (n_edges, 3)."""
    squared = call.vectors.square().sum(1, keepdim=True)
    return torch.linalg.cross(call.turn, call.vectors).mul_(call.sign / squared)


@functools.cache
def _tables_of(dtype: torch.dtype, lmax: int, mmax: int) -> tuple[Tensor, Tensor]:
    """Return the degree of each row, and the factors of its elements."""
    return row_degrees(lmax, mmax), _dense_rows(lmax, mmax).to(dtype)


@constant_table
def _dense_rows(lmax: int, mmax: int) -> Tensor:
    """Return, row by row, the factors of cos(k beta), k <= l, and of sin(k beta), 1 <= k <= l."""
    tilt = tilt_tables(lmax, mmax)[0]  # (2 lmax + 2, n_rows, n_sph)
    parts = []
    for row, l in enumerate(row_degrees(lmax, mmax).tolist()):
        own = tilt[:, row, l * l : (l + 1) ** 2]
        parts += [own[: l + 1], own[lmax + 2 : lmax + 2 + l]]
    return torch.cat([part.flatten() for part in parts])
