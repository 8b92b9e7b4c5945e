"""Rotation into and out of the edge frames, and the torque, by edge.c."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atomeq.ops.c_compiler import c_library, checked_index, threads_for
from atomeq.ops.edge.along import Radial
from atomeq.ops.edge.blockwise import WayIn
from atomeq.ops.edge.cpu.memory import empty
from atomeq.ops.edge.so2_map import SO2Shape
from atomeq.ops.edge.wigner import generators
from atomeq.ops.orders import orders_of

_ROTATED_PER_THREAD = 2000  # edges; fewer do not pay for a thread


def gather_rotate(
    x: Tensor,
    wigner: Tensor,
    indices: Sequence[Tensor],
    *,
    scale: Tensor | None = None,
    radial: Radial | None = None,
    operand: bool = False,
) -> Tensor:
    """Return scale * W G x, (n_edges, n_rows, S * channels); an operand is like any other here.

    Args:
        x: (n_atoms, n_sph, channels), or of the edges if there are no indices.
        wigner: (n_edges, n_rows, n_sph), in m-primary order and block diagonal in l; the product
            with an infinitesimal rotation from the right is still that.
        indices: Atoms of the edges, (n_edges,), joined along the channels.
        scale: (n_edges, n_scales); +m and -m share theirs.
        radial: In the place of the scale: values, weight and bias that give it.
        operand: Whether a map alone reads the result.
    """
    scale = scale if radial is None else torch.nn.functional.linear(*radial)
    x, wigner, scale = x.contiguous(), wigner.contiguous(), plain(scale)
    ends = [checked_atoms(index, x) for index in indices]
    rows = empty((*wigner.shape[:2], max(1, len(ends)) * x.shape[2]), x)
    _rotations(wigner).gather_rotate_on(
        *(x, wigner, ends, len(ends), scale, rows, len(rows), x.shape[2]),
        threads_for(len(rows), _ROTATED_PER_THREAD),
    )
    return rows


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
    """Return G^T W^T (factor * rows), (n_atoms, n_sph, channels), added to the total if given.

    ``factor`` is (n_edges,). Without indices the result is of each edge.
    """
    rows, wigner, factor = rows.contiguous(), wigner.contiguous(), plain(factor)
    if total is None:
        size = (n_atoms if indices else len(rows), wigner.shape[2])
        total = rows.new_zeros(*size, rows.shape[2] // max(1, len(indices)))
    ends = [checked_atoms(index, total) for index in indices]
    _rotations(wigner).rotate_scatter_on(
        *(rows, wigner, ends, len(ends), factor, total, len(rows), total.shape[2]),
        threads_for(len(rows), _ROTATED_PER_THREAD),
    )
    return total


def torque(x: Tensor, rows: Tensor, wigner: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """Return <W^T rows, X_k G x> for the three generators X_k, (n_edges, 3)."""
    x, rows, wigner = x.contiguous(), rows.contiguous(), wigner.contiguous()
    ends = [checked_atoms(index, x) for index in indices]
    found = rows.new_empty(len(rows), 3)
    _rotations(wigner).torque_on(
        *(x, rows, wigner, ends, len(ends), *generator_elements(x.dtype, x.shape[1])),
        *(found, len(rows), x.shape[2], threads_for(len(rows), _ROTATED_PER_THREAD)),
    )
    return found


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
    operand: bool = False,  # a CPU's products are not rounded
) -> Tensor:
    """Return f W G x + also, (n_edges, n_rows, channels); of <f W G x, rows> write gradients.

    That of f is written, turns are lessened by the torque; None is unwanted, or there are no rows.
    """
    found = gather_rotate(x, wigner, indices)
    if rows is not None and to_factor is not None:
        torch.linalg.vecdot(found.flatten(1), rows.flatten(1), out=to_factor)
    if rows is not None and turn is not None:
        own = torque(x, rows, wigner, indices)
        turn -= own if factor is None else own * factor[:, None]
    found = found if factor is None else found.mul_(factor[:, None, None])
    return found if also is None else found.add_(also)


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

    Without ``scale`` the factors are 1. z is s W G x, where that is wanted.
    """
    x, wigner, scale = x.contiguous(), wigner.contiguous(), plain(scale)
    ends = [checked_atoms(index, x) for index in indices]
    given, sizes = (x, wigner, ends, len(ends)), (len(grad), x.shape[2])
    library = _rotations(wigner)
    if z is not None:
        library.gather_rotate(*given, scale, z, *sizes)
    if any([where is not None for where in into]):
        generator = generator_elements(x.dtype, x.shape[1])
        library.gather_gradient(*given, grad, scale, *into, *generator, *sizes)


def checked_atoms(index: Tensor, atoms: Tensor) -> Tensor:
    """Check again: a frame has been, a compiled graph comes with indices nobody has seen."""
    return checked_index(index, len(atoms), "an edge ends at an atom")


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


def _rotations(wigner: Tensor) -> Any:
    return edge_functions(wigner.dtype, *orders_of(wigner.shape[1], wigner.shape[2]))


def edge_functions(dtype: torch.dtype, lmax: int, mmax: int) -> Any:
    """Return the functions of edge.c for some degrees."""
    return c_library("edge/cpu/edge.c", dtype, LMAX=lmax, MMAX=mmax)


def plain(tensor: Tensor | None) -> Tensor | None:
    """Return what C can go through: the tensor in the order of its axes, or None."""
    return None if tensor is None else tensor.contiguous()
