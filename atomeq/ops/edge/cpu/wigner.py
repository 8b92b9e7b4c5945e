"""The Wigner rows of edges by the C kernel."""

import ctypes
import functools

import torch
from torch import Tensor

from atomeq.ops.c_compiler import REALS, load, source_of
from atomeq.ops.edge.wigner import tilt_tables
from atomeq.ops.orders import row_degrees
from atomeq.ops.tables import constant_table, table_like


def edge_wigner(vectors: Tensor, lmax: int, mmax: int) -> Tensor:
    """Return the rows that take edges to +y."""
    degrees = table_like(row_degrees, lmax, mmax, like=vectors)
    tables = table_like(_dense_rows, lmax, mmax, like=vectors)
    vectors = vectors.contiguous()
    wigner = vectors.new_empty(len(vectors), len(degrees), (lmax + 1) ** 2)
    _library(vectors.dtype, lmax).edge_wigner(
        *map(ctypes.c_void_p, (vectors.data_ptr(), degrees.data_ptr(), tables.data_ptr())),
        ctypes.c_int64(len(degrees)),
        ctypes.c_void_p(wigner.data_ptr()),
        ctypes.c_int64(len(vectors)),
    )
    return wigner


@functools.cache
def _library(dtype: torch.dtype, lmax: int) -> ctypes.CDLL:
    return load(source_of("edge/cpu/wigner.c", {"REAL": REALS[dtype], "LMAX": lmax}))


@constant_table
def _dense_rows(lmax: int, mmax: int) -> Tensor:
    """Return, row by row, the factors of cos(k beta), k <= l, and of sin(k beta), 1 <= k <= l."""
    tilt = tilt_tables(lmax, mmax)[0]  # (2 lmax + 2, n_rows, n_sph)
    parts = []
    for row, l in enumerate(row_degrees(lmax, mmax).tolist()):
        own = tilt[:, row, l * l : (l + 1) ** 2]
        parts += [own[: l + 1], own[lmax + 2 : lmax + 2 + l]]
    return torch.cat([part.flatten() for part in parts])
