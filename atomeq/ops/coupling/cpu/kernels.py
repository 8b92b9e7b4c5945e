"""The Clebsch-Gordan form on a CPU: a C kernel in mode uvu, products of matrices in the others.

In uuu and uvw both factors have channels, so a path is no small matrix per edge; there the
arithmetic is that of large products, which torch does well. The C kernel adds to one end of each
edge only, that of ``b``, which owns the edge. With b at the target it makes dF/dz, with b at the
source dF/dx; the other two derivatives come with either.
"""

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atomeq.ops.c_compiler import c_library, checked_index, refusal, threads_for
from atomeq.ops.coupling.clebsch_gordan import Form, form_from, path_table
from atomeq.ops.coupling.cpu.symmetric_contraction import symmetric_partials
from atomeq.ops.coupling.weight_table import WeightTable
from atomeq.ops.tables import constant_table, table_like

__all__ = ["cg_partials", "refusal", "symmetric_partials"]

# What each argument is indexed by: edge e, rows i, j and k of a path, channels u, v and w.
_SUBSCRIPTS = {
    "uvu": {"x": "eiu", "y": "ej", "weights": "eu", "z": "eku"},
    "uuu": {"x": "eiu", "y": "eju", "weights": "eu", "z": "eku"},
    "uvw": {"x": "eiu", "y": "ejv", "weights": "euvw", "z": "ekw"},
}
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


def cg_partials(call: SimpleNamespace) -> list[Tensor]:
    """Return dF/ds for each argument; see :func:`~atomeq.ops.coupling.registered.cg_partials`.

    Raises:
        IndexError: If an end is no atom.
    """
    form, wanted, x, z = form_from(call.form), call.arguments.split(), call.x, call.z
    if form.mode != "uvu":
        return _by_paths(call, wanted, form)
    shape = (call.n_targets, form.n_rows, x.shape[-1]) if z is None else z.shape
    found = block_partials(
        *([x], call.y, call.weights, None if z is None else [z], [shape], call.edges[:2]),
        *(wanted, form, _places_of(form, x.shape[-1])),
    )
    return [part for name in wanted for part in found[name]]


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
    results: dict[str, list[Tensor]] = {}
    if "y" in wanted:
        results["y"] = [torch.empty_like(y)]
    if isinstance(weights, WeightTable):
        if "lengths" in wanted:
            results["lengths"] = [torch.empty_like(weights.lengths)]
    elif weights is not None and "weights" in wanted:
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
    library = c_library("coupling/cpu/cg.c", y.dtype)
    source, target = [end.long().contiguous() for end in ends] or (None, None)
    n_edges, n_parts = y.shape[0], threads_for(y.shape[0], _EDGES_PER_THREAD)
    own = results.get(owner)
    if owner == "z":
        a, b = _tensors(library, x, None), _tensors(library, z, own)
        ends_of, n_atoms = (source, target), (len(x[0]), shapes[0][0])
    else:
        a, b = _tensors(library, z, None), _tensors(library, x, own)
        ends_of, n_atoms = (target, source), (shapes[0][0], len(x[0]))
    # One thread needs no owners, and there are more rows of z to keep at hand than of x.
    by = 0 if owner == "x" and n_parts == 1 else 1
    given = (ends_of[by], ends_of[1 - by], n_edges, n_atoms[by], n_atoms[1 - by])
    edges, starts = _order(library, *given, n_parts)
    table = weights._asdict() if isinstance(weights, WeightTable) else {}
    plain = None if isinstance(weights, WeightTable) else weights
    n_weights = places[-1].weight + places[-1].channels
    per_edge = n_weights if plain is not None and plain.ndim == 3 else 0
    to = {f"to_{name}": results[name][0] for name in ("y", "weights", "lengths") if name in results}
    sums = None
    if "to_weights" in to and not per_edge:
        sums = y.new_zeros(n_parts, *to["to_weights"].shape)
    arguments = library.form_t(
        n_paths=len(form.paths),
        n_weights=n_weights,
        rows_y=y.shape[1],
        paths=_path_rows(form, owner, places),
        terms=_terms(form, owner),
        coefficients=table_like(_coefficients, form, owner, like=y),
        index_a=ends_of[0],
        index_b=ends_of[1],
        a=a,
        b=b,
        y=y,
        weights=plain,
        weight_edge=per_edge,
        table=table.get("polynomials"),
        lengths=table.get("lengths"),
        n_intervals=len(table["polynomials"]) if table else 0,
        to_weight_edge=per_edge,
        **to,
    )
    if library.cg_partials(arguments, edges, starts, n_parts, sums):
        raise MemoryError("no memory for the scratch of the Clebsch-Gordan kernel")
    if sums is not None:
        torch.sum(sums, dim=0, out=to["to_weights"])


def _tensors(
    library: Any, values: Sequence[Tensor] | None, partials: Sequence[Tensor] | None
) -> Any:
    """Return an array of tensor_t of cg.c."""
    some = values or partials or []
    members = [
        library.tensor_t(
            at=None if values is None else values[number],
            to=None if partials is None else partials[number],
            atom=one[0].numel() if len(one) else 0,
        )
        for number, one in enumerate(some)
    ]
    return (library.tensor_t * len(members))(*members)


def _order(
    library: Any,
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
    checked_index(index_a, n_a, "edge_index names an atom")
    if library.cg_order(index_b, n_edges, n_b, counts, edges, starts, n_parts):
        raise IndexError(f"edge_index names an atom that is not among the {n_b} given")
    return edges, starts


@cache
def _places_of(form: Form, channels: int) -> tuple[PathPlaces, ...]:
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


def _by_paths(call: SimpleNamespace, wanted: Sequence[str], form: Form) -> list[Tensor]:
    """Return the same path by path in plain torch, in every mode."""
    x, y, weights, z, edges = call.x, call.y, call.weights, call.z, call.edges
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
        total = x.new_zeros(call.n_targets, form.n_rows, channels)
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
