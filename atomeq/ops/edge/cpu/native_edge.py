"""The C kernels of the edge layer, called on contiguous tensors."""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from atomeq.ops.c_compiler import load, source_of, unavailable
from atomeq.ops.edge.wigner import generators
from atomeq.ops.tables import constant_table, table_like

_REAL = {torch.float32: "float", torch.float64: "double"}


def serves(tensor: Tensor) -> bool:
    """Say whether there are C kernels for a tensor's dtype on this machine."""
    return tensor.dtype in _REAL and tensor.device.type == "cpu" and available()


@cache
def available() -> bool:
    """Say whether this machine builds C kernels."""
    return unavailable() is None


def gather_rotate(
    x: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    scale: Tensor | None,
    rows: Tensor,
    degrees: tuple[int, int],
) -> None:
    """Write scale * W G x to ``rows``."""
    _library(x.dtype, *degrees).gather_rotate(
        pointer(x),
        pointer(wigner),
        *_index_array(indices, x),
        pointer(scale),
        pointer(rows),
        _number(len(rows)),
        _number(x.shape[2]),
    )


def rotate_scatter(
    rows: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    factor: Tensor | None,
    total: Tensor,
    degrees: tuple[int, int],
) -> None:
    """Add G^T W^T (factor * rows) to ``total``."""
    _library(rows.dtype, *degrees).rotate_scatter(
        pointer(rows),
        pointer(wigner),
        *_index_array(indices, total),
        pointer(factor),
        pointer(total),
        _number(len(rows)),
        _number(total.shape[2]),
    )


def torque(
    x: Tensor,
    rows: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    result: Tensor,
    degrees: tuple[int, int],
) -> None:
    """Write <W^T rows, X_k G x> to ``result``."""
    tables = generator_tables(rows, degrees[0])
    _library(rows.dtype, *degrees).torque(
        pointer(x),
        pointer(rows),
        pointer(wigner),
        *_index_array(indices, x),
        *map(pointer, tables.values()),
        pointer(result),
        _number(len(rows)),
        _number(x.shape[2]),
    )


def gather_gradient(
    x: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    grad: Tensor,
    scale: Tensor | None,
    results: tuple[Tensor | None, Tensor | None, Tensor | None],
    degrees: tuple[int, int],
) -> None:
    """Write or add the gradients of <grad, scale * W G x>.

    Args:
        x: Features of the atoms.
        wigner: Of the edges.
        indices: One or two.
        grad: (n_edges, n_rows, channels of all sides).
        scale: (n_edges, n_scales) or None for factors of 1.
        results: Of the scale, written; of x, added to; of a turn of each edge, written. None where
            it is not wanted.
        degrees: lmax and mmax.
    """
    tables = generator_tables(grad, degrees[0])
    _library(x.dtype, *degrees).gather_gradient(
        *(pointer(x), pointer(wigner), *_index_array(indices, x), pointer(grad), pointer(scale)),
        *map(pointer, (*results, *tables.values())),
        *(_number(len(grad)), _number(x.shape[2])),
    )


def rows_wise(
    name: str, tensors: Sequence[Tensor | None], channels: int, degrees: tuple[int, int]
) -> None:
    """Call ``gate``, ``scale_rows`` or one of their derivatives; the outputs are the last tensors.

    Args:
        name: Of the function in edge.c.
        tensors: As it takes them, the first axis being that of the edges.
        channels: Of a row.
        degrees: lmax and mmax.
    """
    last = tensors[-1]
    assert last is not None
    function = getattr(_library(last.dtype, *degrees), name)
    function(*map(pointer, tensors), _number(len(last)), _number(channels))


def source(dtype: torch.dtype, lmax: int, mmax: int) -> str:
    """Return the C source of these kernels."""
    return source_of("edge/cpu/edge.c", {"REAL": _REAL[dtype], "LMAX": lmax, "MMAX": mmax})


def generator_tables(like: Tensor, lmax: int) -> dict[str, Tensor]:
    """Return the elements of the generators of rotations as the kernels take them."""
    return {
        "generator": table_like(_generator_values, lmax, like=like),
        "place": _generator_places(lmax),
        "count": _generator_counts(lmax),
    }


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Return a tensor's address, null for none.

    Raises:
        ValueError: The tensor is not contiguous.
    """
    if tensor is None:
        return ctypes.c_void_p()
    if not tensor.is_contiguous():
        raise ValueError(f"a C kernel was given strides {tensor.stride()}; pass .contiguous()")
    return ctypes.c_void_p(tensor.data_ptr())


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    """Return the addresses of tensors; errors as in :func:`pointer`."""
    return (ctypes.c_void_p * len(tensors))(*map(pointer, tensors))


def index_pointer(index: Tensor, atoms: Tensor) -> ctypes.c_void_p:
    """Return the address of atoms' numbers, none of them beyond the atoms: else C reads anything.

    A frame has been checked already; a compiled graph comes here with indices nobody has seen.

    Raises:
        IndexError: If a number is not in 0..n_atoms - 1.
        ValueError: If the numbers are not contiguous int64.
    """
    if index.dtype != torch.long:
        raise ValueError(f"a C kernel was given {index.dtype} for the numbers of atoms; pass int64")
    place = pointer(index)
    if not _in_range()(place, _number(len(index)), _number(len(atoms))):
        raise IndexError(f"an edge ends at an atom that is not among the {len(atoms)} given")
    return place


@cache
def _in_range() -> Callable[..., int]:
    return load(source_of("segment/cpu/segments.c", {"REAL": "float"})).segments_in_range


@cache
def _library(dtype: torch.dtype, lmax: int, mmax: int) -> ctypes.CDLL:
    return load(source(dtype, lmax, mmax))


def _index_array(indices: Sequence[Tensor], atoms: Tensor) -> tuple[ctypes.Array, ctypes.c_int64]:
    places = [index_pointer(index, atoms) for index in indices]
    return (ctypes.c_void_p * max(1, len(places)))(*places), _number(len(places))


def _number(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


@constant_table
def _generator_values(lmax: int) -> Tensor:
    """Return the elements of the three generators that are not zero, one generator at a time."""
    return generators(lmax)[_exist(lmax)]


@constant_table
def _generator_places(lmax: int) -> Tensor:
    """Return row and column of each of these elements, (n, 2)."""
    return _exist(lmax).nonzero()[:, 1:].contiguous()


@constant_table
def _generator_counts(lmax: int) -> Tensor:
    """Return where the elements of each generator start, and where the last ones end, (4,)."""
    counts = _exist(lmax).flatten(1).sum(1)
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def _exist(lmax: int) -> Tensor:
    return generators(lmax).abs() > 1e-9  # the others are rounding
