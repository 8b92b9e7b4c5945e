"""The Clebsch-Gordan form on a CPU: a C kernel in mode uvu, products of matrices in the others.

In uuu and uvw both factors have channels, so a path is no small matrix per edge; there the
arithmetic is that of large products, which torch does well.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from atomeq.ops.c_compiler import refusal
from atomeq.ops.coupling.clebsch_gordan import Form, form_from, path_table
from atomeq.ops.coupling.cpu import cg
from atomeq.ops.coupling.cpu.symmetric_contraction import symmetric_partials
from atomeq.ops.tables import table_like

__all__ = ["cg_partials", "refusal", "symmetric_partials"]

# What each argument is indexed by: edge e, rows i, j and k of a path, channels u, v and w.
_SUBSCRIPTS = {
    "uvu": {"x": "eiu", "y": "ej", "weights": "eu", "z": "eku"},
    "uuu": {"x": "eiu", "y": "eju", "weights": "eu", "z": "eku"},
    "uvw": {"x": "eiu", "y": "ejv", "weights": "euvw", "z": "ekw"},
}


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
    shape = (n_targets, coupled.n_rows, x.shape[-1]) if z is None else z.shape
    found = cg.block_partials(
        *([x], y, weights, None if z is None else [z], [shape], edges[:2]),
        *(wanted, coupled, cg.places_of(coupled, x.shape[-1])),
    )
    return [part for name in wanted for part in found[name]]


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
