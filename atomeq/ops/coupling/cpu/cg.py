"""The Clebsch-Gordan form in uvu mode by the C kernel: what it is given, and in which order.

The kernel adds to one end of each edge only, that of ``b``, which owns the edge. With b at the
target it makes dF/dz, with b at the source dF/dx; the other two derivatives come with either.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atomeq.ops.c_compiler import REALS, load, n_threads, source_of
from atomeq.ops.coupling.clebsch_gordan import Form, path_table
from atomeq.ops.coupling.weight_table import WeightTable
from atomeq.ops.tables import constant_table, table_like

_ZERO = 1e-12  # of a 3j symbol, which is a square root of a fraction or nothing
_EDGES_PER_THREAD = 64  # fewer do not pay for a thread


class Place(NamedTuple):
    """Where a path finds the rows of its degree in one of several tensors; place_t of cg.c."""

    tensor: int
    start: int  # of an atom's numbers
    stride: int  # from row to row


class PathPlaces(NamedTuple):
    """Where a path reads x and z, how many channels it has, and the first of its weights."""

    x: Place
    z: Place
    channels: int
    weight: int


class _TensorArguments(ctypes.Structure):
    """tensor_t of cg.c."""

    _fields_ = (("at", ctypes.c_void_p), ("to", ctypes.c_void_p), ("atom", ctypes.c_int64))


class _FormArguments(ctypes.Structure):
    """form_t of cg.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_paths", "n_weights", "rows_y")),
        *((name, ctypes.c_void_p) for name in ("paths", "terms", "coefficients")),
        *((name, ctypes.c_void_p) for name in ("index_a", "index_b")),
        *((name, ctypes.POINTER(_TensorArguments)) for name in ("a", "b")),
        *((name, ctypes.c_void_p) for name in ("y", "weights")),
        ("weight_edge", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("table", "lengths")),
        ("n_intervals", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("to_y", "to_weights", "to_lengths")),
        ("to_weight_edge", ctypes.c_int64),
    )


def cg_library(dtype: torch.dtype) -> ctypes.CDLL:
    """Return the library of one dtype, built if it was not.

    Raises:
        BuildError: If it can not be built.
    """
    return _declared(load(source_of("coupling/cpu/cg.c", {"REAL": REALS[dtype]})))


def block_partials(
    x: Sequence[Tensor],
    y: Tensor,
    weights: Tensor | WeightTable | None,
    z: Sequence[Tensor] | None,
    shapes: Sequence[Sequence[int]],
    ends: Sequence[Tensor],
    wanted: Sequence[str],
    form: Form,
    places: tuple[PathPlaces, ...],
) -> dict[str, list[Tensor]]:
    """Return dF/ds for each wanted s, where x and z are several tensors with their own channels.

    Args:
        x: (n_sources, rows, channels) each.
        y: (n_edges, n2).
        weights: ([n_edges,] ...), a table for ``lengths`` among the wanted, or None for 1.
        z: (n_targets, rows, channels) each; None where only its own derivative is wanted.
        shapes: Of these.
        ends: Source and target of each edge; empty if x and z belong to the edges.
        wanted: Of ``x``, ``y``, ``z``, and ``weights`` or ``lengths``.
        form: The paths, in uvu mode.
        places: Of each path.

    Raises:
        IndexError: If an end is no atom.
    """
    x, y = [one.contiguous() for one in x], y.contiguous()
    z = None if z is None else [one.contiguous() for one in z]
    results: dict[str, list[Tensor]] = {}
    if "y" in wanted:
        results["y"] = [torch.empty_like(y)]
    if isinstance(weights, WeightTable):
        weights = WeightTable(*(member.contiguous() for member in weights))
        if "lengths" in wanted:
            results["lengths"] = [torch.empty_like(weights.lengths)]
    elif weights is not None:
        weights = weights.contiguous()
        if "weights" in wanted:
            results["weights"] = [torch.empty_like(weights)]
    edges = dict(results)
    passes = [end for end in ("x", "z") if end in wanted] or ["x"]
    for number, owner in enumerate(passes):
        mine = edges if number == 0 else {}  # the derivatives of the edges' own arguments
        if owner in wanted:
            sizes = shapes if owner == "z" else [one.shape for one in x]
            results[owner] = [y.new_zeros(tuple(size)) for size in sizes]
            mine = mine | {owner: results[owner]}
        _pass(x, y, weights, z, shapes, ends, owner, mine, form, places)
    return results


def _pass(
    x: Sequence[Tensor],
    y: Tensor,
    weights: Tensor | WeightTable | None,
    z: Sequence[Tensor] | None,
    shapes: Sequence[Sequence[int]],
    ends: Sequence[Tensor],
    owner: str,
    results: dict[str, list[Tensor]],
    form: Form,
    places: tuple[PathPlaces, ...],
) -> None:
    """Run over the edges once, in the order of the atoms that own them."""
    library = cg_library(y.dtype)
    source, target = (end.long().contiguous() for end in ends) if ends else (None, None)
    n_edges, n_parts = y.shape[0], max(1, min(n_threads(), y.shape[0] // _EDGES_PER_THREAD))
    if owner == "z":
        tensors = (_tensors(x, None), _tensors(z, results.get("z")))
        ends_of, n_atoms = (source, target), (len(x[0]), shapes[0][0])
    else:
        tensors = (_tensors(z, None), _tensors(x, results.get("x")))
        ends_of, n_atoms = (target, source), (shapes[0][0], len(x[0]))
    # One thread needs no owners, and there are more rows of z to keep at hand than of x.
    by = 0 if owner == "x" and n_parts == 1 else 1
    edges, starts = _order(
        library, ends_of[by], ends_of[1 - by], n_edges, n_atoms[by], n_atoms[1 - by], n_parts
    )
    paths, terms, coefficients = _tables(form, owner, places, y)
    table = weights if isinstance(weights, WeightTable) else None
    given = None if isinstance(weights, WeightTable) else weights
    n_weights = places[-1].weight + places[-1].channels
    per_edge = given is not None and given.ndim == 3
    to_weights, sums = results.get("weights", [None])[0], None
    if to_weights is not None and not per_edge:
        sums = y.new_zeros(n_parts, *to_weights.shape)
    arguments = _FormArguments(
        len(form.paths), n_weights, y.shape[1], _at(paths), _at(terms), _at(coefficients),
        _at(ends_of[0]), _at(ends_of[1]), *tensors, _at(y), _at(given),
        n_weights if per_edge else 0,
        None if table is None else _at(table.polynomials),
        None if table is None else _at(table.lengths),
        0 if table is None else len(table.polynomials),
        _at(results.get("y", [None])[0]), _at(to_weights), _at(results.get("lengths", [None])[0]),
        n_weights if per_edge else 0,
    )  # fmt: skip
    failed = library.cg_partials(arguments, _at(edges), _at(starts), n_parts, _at(sums))
    if failed:
        raise MemoryError("no memory for the scratch of the Clebsch-Gordan kernel")
    if sums is not None and to_weights is not None:
        torch.sum(sums, dim=0, out=to_weights)


def _tensors(
    values: Sequence[Tensor] | None, partials: Sequence[Tensor] | None
) -> ctypes.Array[_TensorArguments]:
    members = [
        _TensorArguments(
            None if values is None else values[number].data_ptr(),
            None if partials is None else partials[number].data_ptr(),
            one[0].numel() if len(one) else 0,
        )
        for number, one in enumerate(values or partials or [])
    ]
    return (_TensorArguments * len(members))(*members)


def _order(
    library: ctypes.CDLL,
    index_b: Tensor | None,
    index_a: Tensor | None,
    n_edges: int,
    n_b: int,
    n_a: int,
    n_parts: int,
) -> tuple[Tensor, Tensor]:
    """Return the edges in the order of their owners, and where each thread's share begins."""
    starts = torch.arange(n_parts + 1) * n_edges // n_parts
    if index_b is None or index_a is None:
        return torch.arange(n_edges), starts
    edges, counts = torch.empty(n_edges, dtype=torch.long), torch.empty(n_b + 1, dtype=torch.long)
    outside = library.cg_order(
        _at(index_b), n_edges, n_b, _at(counts), _at(edges), _at(starts), n_parts
    ) or not library.cg_in_range(_at(index_a), n_edges, n_a)
    if outside:
        raise IndexError(f"edge_index names an atom that is not among the {n_b} and {n_a} given")
    return edges, starts


def _tables(
    form: Form, owner: str, places: tuple[PathPlaces, ...], like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    paths, terms = _path_rows(form, owner, places), _terms(form, owner)
    return paths, terms, table_like(_coefficients, form, owner, like=like)


@functools.cache
def places_of(form: Form, channels: int) -> tuple[PathPlaces, ...]:
    """Return where the paths of one x and one z are, all of them with the same channels."""
    return tuple(
        PathPlaces(
            Place(0, path.l1**2 * channels, channels),
            Place(0, row * channels, channels),
            channels,
            number * channels,
        )
        for number, (path, row) in enumerate(zip(form.paths, form.rows(), strict=True))
    )


def _turned(form: Form, number: int, owner: str) -> Tensor:
    """Return the symbols of a path as (rows of a, rows of b, rows of y)."""
    table = path_table(form, number, 1)
    return table.permute(0, 2, 1) if owner == "z" else table.permute(2, 0, 1)


@constant_table
def _path_rows(form: Form, owner: str, places: tuple[PathPlaces, ...]) -> Tensor:
    """Return path_t of cg.c for each path, (n_paths, 12) int32."""
    rows, last = [], 0
    for number, ((l1, _, l3), place) in enumerate(zip(form.paths, places, strict=True)):
        ends = ((*place.x, 2 * l1 + 1), (*place.z, 2 * l3 + 1))
        a, b = ends if owner == "z" else ends[::-1]
        first, last = last, last + int((_turned(form, number, owner).abs() > _ZERO).sum())
        rows.append((*a, *b, place.channels, place.weight, first, last))
    return torch.tensor(rows, dtype=torch.int32, device="cpu")


@constant_table
def _terms(form: Form, owner: str) -> Tensor:
    """Return term_t of cg.c for each nonzero symbol, (n_terms, 2) int32."""
    terms = []
    for number, path in enumerate(form.paths):
        table = _turned(form, number, owner)
        pair, j = (table.flatten(0, 1).abs() > _ZERO).nonzero(as_tuple=True)
        terms.append(torch.stack((pair, path.l2**2 + j), dim=1))
    return torch.cat(terms).to(torch.int32)


@constant_table
def _coefficients(form: Form, owner: str) -> Tensor:
    tables = [_turned(form, number, owner).flatten() for number in range(len(form.paths))]
    return torch.cat([table[table.abs() > _ZERO] for table in tables])


@functools.cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.cg_partials.argtypes = (
        ctypes.POINTER(_FormArguments), pointer, pointer, ctypes.c_int, pointer,
    )  # fmt: skip
    library.cg_order.argtypes = (pointer, size, size, pointer, pointer, pointer, ctypes.c_int)
    library.cg_in_range.argtypes = (pointer, size, size)
    return library


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
