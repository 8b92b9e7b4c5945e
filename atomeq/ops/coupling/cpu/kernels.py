"""The Clebsch-Gordan form on a CPU: a C kernel in mode uvu, products of matrices in the others.

The kernel adds to one end of each edge only, that of ``b``, which owns the edge. With b at the
target it makes dF/dz, with b at the source dF/dx; the other two derivatives come with either. In
uuu and uvw both factors have channels, so a path is no small matrix per edge; there the arithmetic
is that of large products, which torch does well.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from atomeq.ops.c_compiler import REALS, load, n_threads, refusal, source_of
from atomeq.ops.coupling.clebsch_gordan import Form, form_from, path_table
from atomeq.ops.coupling.cpu.symmetric_contraction import symmetric_partials
from atomeq.ops.tables import constant_table, table_like

__all__ = ["WANTS_SEGMENTS", "cg_partials", "refusal", "symmetric_partials"]

WANTS_SEGMENTS = False
_ZERO = 1e-12  # of a 3j symbol, which is a square root of a fraction or nothing
_EDGES_PER_THREAD = 64  # fewer do not pay for a thread
# What each argument is indexed by: edge e, rows i, j and k of a path, channels u, v and w.
_SUBSCRIPTS = {
    "uvu": {"x": "eiu", "y": "ej", "weights": "eu", "z": "eku"},
    "uuu": {"x": "eiu", "y": "eju", "weights": "eu", "z": "eku"},
    "uvw": {"x": "eiu", "y": "ejv", "weights": "euvw", "z": "ekw"},
}


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


def cg_partials(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    z: Tensor | None,
    edges: Sequence[Tensor],
    n_targets: int,
    arguments: str,
    form: str,
) -> list[Tensor]:
    """Return dF/ds for each argument; see :func:`~atomeq.ops.coupling.registered.cg_partials`.

    Raises:
        IndexError: If an end is no atom.
    """
    coupled, wanted = form_from(form), arguments.split()
    if coupled.mode != "uvu":
        return _by_paths(x, y, weights, z, edges, n_targets, wanted, coupled)
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
        shape = (n_targets, coupled.n_rows, x.shape[-1]) if atoms is None else atoms.shape
        if owner in wanted:
            results[owner] = x.new_zeros(shape)
        mine = {owner: results[owner]} if owner in wanted else {}
        if number == 0:  # the derivatives of the edges' own arguments
            mine |= {name: results[name] for name in ("y", "weights") if name in results}
        _pass(x, y, weights, z, edges, shape, owner, mine, coupled)
    return [results[name] for name in wanted]


def _pass(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    z: Tensor | None,
    edges: Sequence[Tensor],
    shape: Sequence[int],
    owner: str,
    results: dict[str, Tensor],
    form: Form,
) -> None:
    """Run over the edges once, in the order of the atoms that own them."""
    a, b = (x, z) if owner == "z" else (z, x)
    assert a is not None
    library = cg_library(x.dtype)
    source, target = (end.long().contiguous() for end in edges[:2]) if edges else (None, None)
    index_a, index_b = (source, target) if owner == "z" else (target, source)
    n_edges, n_parts = y.shape[0], max(1, min(n_threads(), y.shape[0] // _EDGES_PER_THREAD))
    order, starts = _order(library, index_b, index_a, n_edges, shape[0], a.shape[0], n_parts)
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
    failed = library.cg_partials(arguments, _at(order), _at(starts), n_parts, _at(sums))
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


def _by_paths(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    z: Tensor | None,
    edges: Sequence[Tensor],
    n_targets: int,
    wanted: Sequence[str],
    form: Form,
) -> list[Tensor]:
    """Return the same path by path in plain torch, in every mode."""
    per_edge = weights is None or weights.ndim == (5 if form.mode == "uvw" else 3)
    channels = weights.shape[-1] if weights is not None and form.mode == "uvw" else x.shape[-1]
    given: dict[str, Tensor | None] = {"x": x, "y": y, "weights": weights, "z": z}
    if edges:
        given["x"] = x.index_select(0, edges[0])
        given["z"] = None if z is None else z.index_select(0, edges[1])
    results = {
        name: x.new_zeros((len(y), form.n_rows, channels) if part is None else part.shape)
        for name, part in given.items()
        if name in wanted
    }
    subscripts = _SUBSCRIPTS[form.mode]
    if not per_edge:
        subscripts = subscripts | {"weights": subscripts["weights"][1:]}
    n_terms = form.n_terms(x.shape[-1], y.shape[-1])
    for number, row in enumerate(form.rows()):
        table = table_like(path_table, form, number, n_terms, like=x)
        parts = {
            name: None if part is None else _part(part, name, form, number, row)
            for name, part in given.items()
        }
        for name, total in results.items():
            place = _part(total, name, form, number, row)
            place += _contracted(parts, table, name, subscripts)
    if edges and "x" in wanted:
        results["x"] = torch.zeros_like(x).index_add_(0, edges[0], results["x"])
    if edges and "z" in wanted:
        total = x.new_zeros(n_targets, form.n_rows, channels)
        results["z"] = total.index_add_(0, edges[1], results["z"])
    return [results[name] for name in wanted]


def _part(values: Tensor, name: str, form: Form, number: int, row: int) -> Tensor:
    """Return a view of what one path reads or writes."""
    l1, l2, l3 = form.paths[number]
    if name == "weights":
        return values.select(-4 if form.mode == "uvw" else -2, number)
    if name == "y" and form.mode == "uvu":
        return values[:, l2 * l2 : (l2 + 1) ** 2]
    first, l = {"x": (l1 * l1, l1), "y": (l2 * l2, l2), "z": (row, l3)}[name]
    return values[:, first : first + 2 * l + 1]


def _contracted(
    parts: dict[str, Tensor | None], table: Tensor, wanted: str, subscripts: dict[str, str]
) -> Tensor:
    """Contract the other three arguments with the symbols, from left to right."""
    # First those that leave the least: x and y meet the symbols, z meets the weights.
    first = ("x", "y") if wanted in ("weights", "z") else ("z", "weights")
    others = [name for name in subscripts if name not in first and name != wanted]
    named = {
        **{name: (subscripts[name], part) for name, part in parts.items()},
        "3j": ("ijk", table),
    }
    operands = [named[name] for name in (*first, "3j", *others)]
    operands = [(letters, part) for letters, part in operands if part is not None]
    equation = ",".join(letters for letters, _ in operands)
    result: Tensor = torch.einsum(f"{equation}->{subscripts[wanted]}", *(t for _, t in operands))
    return result
