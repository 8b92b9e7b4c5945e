"""The Clebsch-Gordan form in uvu mode by the C kernel: what it is given, and in which order.

The kernel adds to one end of each edge only, that of ``b``, which owns the edge. With b at the
target it makes dF/dz, with b at the source dF/dx; the other two derivatives come with either.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from atomeq.ops.c_compiler import load, n_threads, source_of
from atomeq.ops.coupling.clebsch_gordan import Form, path_table
from atomeq.ops.tables import constant_table, table_like

REALS = {torch.float32: "float", torch.float64: "double"}
_ZERO = 1e-12  # of a 3j symbol, which is a square root of a fraction or nothing
_EDGES_PER_THREAD = 64  # fewer do not pay for a thread


class _FormArguments(ctypes.Structure):
    """form_t of cg.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n_edges", "n_paths", "channels")),
        *(
            (name, ctypes.c_void_p)
            for name in ("paths", "terms", "coefficients", "index_a", "index_b", "a", "y")
        ),
        *((name, ctypes.c_void_p) for name in ("weights", "b")),
        *((name, ctypes.c_int64) for name in ("rows_a", "rows_y", "rows_b")),
        *((name, ctypes.c_int64) for name in ("weight_edge", "weight_path")),
        *((name, ctypes.c_void_p) for name in ("to_y", "to_weights", "to_b")),
        ("to_weight_edge", ctypes.c_int64),
    )


def cg_library(dtype: torch.dtype) -> ctypes.CDLL:
    """Return the library of one dtype, built if it was not.

    Raises:
        BuildError: If it can not be built.
    """
    return _declared(load(source_of("coupling/cpu/cg.c", {"REAL": REALS[dtype]})))


def partials(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    z: Tensor | None,
    ends: Sequence[Tensor],
    n_targets: int,
    wanted: tuple[str, ...],
    form: Form,
) -> list[Tensor]:
    """Return dF/ds for each wanted s; see :func:`~atomeq.ops.coupling.registered.cg_partials`.

    Raises:
        IndexError: If an end is no atom.
    """
    x, y = x.contiguous(), y.contiguous()
    weights = None if weights is None else weights.contiguous()
    z = None if z is None else z.contiguous()
    results: dict[str, Tensor] = {}
    if "y" in wanted:
        results["y"] = torch.empty_like(y)
    if "weights" in wanted and weights is not None:
        results["weights"] = torch.empty_like(weights)
    passes = [end for end in ("x", "z") if end in wanted] or ["x"]
    for number, owner in enumerate(passes):
        atoms = z if owner == "z" else x
        shape = (n_targets, form.n_rows, x.shape[-1]) if atoms is None else atoms.shape
        if owner in wanted:
            results[owner] = x.new_zeros(shape)
        mine = {owner: results[owner]} if owner in wanted else {}
        if number == 0:  # the derivatives of the edges' own arguments
            mine |= {name: results[name] for name in ("y", "weights") if name in results}
        _pass(x, y, weights, z, ends, shape, owner, mine, form)
    return [results[name] for name in wanted]


def _pass(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    z: Tensor | None,
    ends: Sequence[Tensor],
    shape: Sequence[int],
    owner: str,
    results: dict[str, Tensor],
    form: Form,
) -> None:
    """Run over the edges once, in the order of the atoms that own them."""
    a, b = (x, z) if owner == "z" else (z, x)
    assert a is not None
    library = cg_library(x.dtype)
    source, target = (end.long().contiguous() for end in ends) if ends else (None, None)
    index_a, index_b = (source, target) if owner == "z" else (target, source)
    n_edges, n_parts = y.shape[0], max(1, min(n_threads(), y.shape[0] // _EDGES_PER_THREAD))
    edges, starts = _order(library, index_b, index_a, n_edges, shape[0], a.shape[0], n_parts)
    paths, terms, coefficients = _tables(form, owner, x)
    per_edge = weights is not None and weights.ndim == 3
    stride = 0 if weights is None else x.shape[-1]
    sums = None
    if "weights" in results and not per_edge:
        sums = x.new_zeros(n_parts, *results["weights"].shape)
    arguments = _FormArguments(
        n_edges, len(form.paths), x.shape[-1], _at(paths), _at(terms), _at(coefficients),
        _at(index_a), _at(index_b), _at(a), _at(y), _at(weights), _at(b),
        a.shape[1], y.shape[1], shape[1], stride * len(form.paths) if per_edge else 0, stride,
        _at(results.get("y")), _at(results.get("weights")), _at(results.get(owner)),
        stride * len(form.paths) if per_edge else 0,
    )  # fmt: skip
    failed = library.cg_partials(arguments, _at(edges), _at(starts), n_parts, _at(sums))
    if failed:
        raise MemoryError("no memory for the scratch of the Clebsch-Gordan kernel")
    if sums is not None:
        torch.sum(sums, dim=0, out=results["weights"])


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


def _tables(form: Form, owner: str, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    paths, terms = _path_rows(form, owner), _terms(form, owner)
    return paths, terms, table_like(_coefficients, form, owner, like=like)


def _turned(form: Form, number: int, owner: str) -> Tensor:
    """Return the symbols of a path as (rows of a, rows of b, rows of y)."""
    table = path_table(form, number, 1)
    return table.permute(0, 2, 1) if owner == "z" else table.permute(2, 0, 1)


@constant_table
def _path_rows(form: Form, owner: str) -> Tensor:
    """Return path_t of cg.c for each path, (n_paths, 6) int32."""
    rows, last = [], 0
    for number, ((l1, _, l3), row) in enumerate(zip(form.paths, form.rows(), strict=True)):
        ends = ((l1 * l1, 2 * l1 + 1), (row, 2 * l3 + 1))
        a, b = ends if owner == "z" else ends[::-1]
        first, last = last, last + int((_turned(form, number, owner).abs() > _ZERO).sum())
        rows.append((*a, *b, first, last))
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
