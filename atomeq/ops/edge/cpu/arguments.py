"""What C functions of edges are given: sources, addresses, numbers of atoms, generators."""

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atomeq.ops.c_compiler import REALS, load, n_threads, source_of
from atomeq.ops.edge.wigner import generators


def source(name: str, dtype: torch.dtype, lmax: int, mmax: int) -> str:
    """Return a C file of this folder for a dtype and degrees."""
    defines = {"REAL": REALS[dtype], "LMAX": lmax, "MMAX": mmax}
    return source_of(f"edge/cpu/{name}.c", defines)


def address(tensor: Tensor | None) -> int | None:
    """Return a tensor's address, None for none.

    Raises:
        ValueError: The tensor is not contiguous.
    """
    if tensor is None:
        return None
    if not tensor.is_contiguous():
        raise ValueError(f"a C kernel was given strides {tensor.stride()}; pass .contiguous()")
    return tensor.data_ptr()


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array:
    """Return an array of the addresses of some tensors."""
    return (ctypes.c_void_p * max(1, len(tensors)))(*map(address, tensors))


def numbers_of_atoms(index: Tensor, atoms: Tensor) -> Tensor:
    """Return contiguous numbers of atoms, none of them beyond the atoms: else C reads anything.

    A frame has been checked already; a compiled graph comes here with indices nobody has seen.

    Raises:
        IndexError: If a number is not in 0..n_atoms - 1.
        ValueError: If the numbers are not int64.
    """
    if index.dtype != torch.long:
        raise ValueError(f"a C kernel was given {index.dtype} for the numbers of atoms; pass int64")
    index = index.contiguous()
    if not _in_range()(index.data_ptr(), len(index), len(atoms)):
        raise IndexError(f"an edge ends at an atom that is not among the {len(atoms)} given")
    return index


@functools.cache
def _in_range() -> Any:
    library = load(source_of("segment/cpu/segments.c", {"REAL": "float"}))
    library.segments_in_range.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    return library.segments_in_range


def threads_for(n_edges: int, each: int) -> int:
    """Return how many threads share some edges, of which each wants a few."""
    return min(n_threads(), n_edges // each) if n_edges >= 2 * each else 1


@functools.cache
def generator_elements(dtype: torch.dtype, n_sph: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the elements of the generators of rotations as the kernels take them.

    These are the values, one generator after the other, row and column of each, and where each
    generator starts and the last one ends.
    """
    table = generators(math.isqrt(n_sph) - 1)
    exist = table.abs() > 1e-9  # the others are rounding
    counts = [0, *exist.flatten(1).sum(1).cumsum(0).tolist()]
    places = exist.nonzero()[:, 1:].contiguous()
    return table[exist].to(dtype), places, torch.tensor(counts, device="cpu")
