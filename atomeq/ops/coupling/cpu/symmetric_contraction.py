"""The symmetric contraction by the C kernel: the tree of its monomials, and what it is given."""

import functools
from types import SimpleNamespace

import torch
from torch import Tensor

from atomeq.ops.c_compiler import c_library, threads_for
from atomeq.ops.coupling.symmetric_contraction_basis import SymmetricForm
from atomeq.ops.tables import constant_table, table_like

_ATOMS_PER_THREAD = 8  # fewer do not pay for a thread


def symmetric_partials(call: SimpleNamespace) -> list[Tensor]:
    """Return the wanted partials of D^k F; see ../symmetric_contraction.py.

    Raises:
        IndexError: If an atom's species has no weights.
    """
    x, species, form = call.x, call.species.long(), _form(call)
    wanted, inputs = call.arguments.split(), [x, *call.directions]
    shapes = {"weights": call.weights.shape, "z": (len(x), form.n_rows, x.shape[2])}
    results = {
        name: x.new_zeros(shapes[name]) if name in shapes else torch.empty_like(x)
        for name in wanted
    }
    names = ["x", *(f"directions.{k}" for k in range(len(call.directions)))]
    nodes, pairs = _nodes(form), _pairs(form)
    library = c_library(
        "coupling/cpu/symmetric_contraction.c", x.dtype, DIRECTIONS=len(call.directions)
    )
    arguments = library.form_t(
        n_atoms=len(x),
        channels=x.shape[2],
        n_components=form.n_components,
        n_columns=form.n_columns,
        n_rows=form.n_rows,
        n_species=len(call.weights),
        n_nodes=len(nodes),
        n_kept=len(_tree(form)[1]),
        n_pairs=len(pairs),
        nodes=nodes,
        entries=_entries(form),
        coefficients=table_like(_coefficients, form, like=x),
        pairs=pairs,
        species=species,
        inputs=inputs,
        weights=call.weights,
        z=call.z,
        to_inputs=[results.get(name) for name in names],
        to_weights=results.get("weights"),
        to_z=results.get("z"),
    )
    failed = library.symmetric_partials(arguments, threads_for(len(x), _ATOMS_PER_THREAD))
    if failed == 2:
        raise IndexError(
            f"species are {int(species.min())} to {int(species.max())}, but there are weights of "
            f"{len(call.weights)} species"
        )
    if failed:
        raise MemoryError("no memory for the scratch of the symmetric contraction")
    return [results[name] for name in wanted]


@functools.cache
def _tree(form: SymmetricForm) -> tuple[list[tuple[int, ...]], dict[tuple[int, ...], int]]:
    """Return the monomials with their prefixes, short ones first, and the places of the kept."""
    wanted = {term.monomial for term in form.terms()}
    nodes = {m[:n] for m in wanted for n in range(1, len(m) + 1)}
    ordered = sorted(nodes, key=lambda m: (len(m), m))
    parents = {m[:-1] for m in nodes}  # the root among them: ()
    kept = {m: place for place, m in enumerate([(), *(m for m in ordered if m in parents)])}
    return ordered, kept


@functools.cache
def _by_node(form: SymmetricForm) -> list[list[tuple[int, float]]]:
    """Return the pairs of each node, with coefficients."""
    pairs = {pair: n for n, pair in enumerate(_pair_list(form))}
    found: dict[tuple[int, ...], list[tuple[int, float]]] = {}
    for term in form.terms():
        entry = pairs[term.column, term.row], term.coefficient
        found.setdefault(term.monomial, []).append(entry)
    return [found.get(monomial, []) for monomial in _tree(form)[0]]


def _pair_list(form: SymmetricForm) -> list[tuple[int, int]]:
    return sorted({(term.column, term.row) for term in form.terms()})


@constant_table
def _nodes(form: SymmetricForm) -> Tensor:
    """Return node_t of symmetric_contraction.c for each node, (n_nodes, 5) int32."""
    ordered, kept = _tree(form)
    rows, last = [], 0
    for monomial, entries in zip(ordered, _by_node(form), strict=True):
        first, last = last, last + len(entries)
        rows.append((kept[monomial[:-1]], monomial[-1], kept.get(monomial, 0), first, last))
    return torch.tensor(rows, dtype=torch.int32, device="cpu")


@constant_table
def _entries(form: SymmetricForm) -> Tensor:
    entries = [pair for some in _by_node(form) for pair, _ in some]
    return torch.tensor(entries, dtype=torch.int32, device="cpu")


@constant_table
def _coefficients(form: SymmetricForm) -> Tensor:
    values = [coefficient for some in _by_node(form) for _, coefficient in some]
    return torch.tensor(values, dtype=torch.float64, device="cpu")


@constant_table
def _pairs(form: SymmetricForm) -> Tensor:
    return torch.tensor(_pair_list(form), dtype=torch.int32, device="cpu")


def _form(call: SimpleNamespace) -> SymmetricForm:
    return SymmetricForm(call.lmax, tuple(call.degrees), call.order)
