"""The symmetric contraction by the C kernel: the tree of its monomials, and what it is given."""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from atomeq.ops.c_compiler import REALS, load, n_threads, source_of
from atomeq.ops.coupling.symmetric_contraction_basis import SymmetricForm
from atomeq.ops.tables import constant_table, table_like

_ATOMS_PER_THREAD = 8  # fewer do not pay for a thread


@functools.cache
def _library(dtype: torch.dtype, n_directions: int) -> tuple[ctypes.CDLL, type[ctypes.Structure]]:
    """Return the library for a dtype and a number of directions, and form_t of its source."""
    defines = {"REAL": REALS[dtype], "DIRECTIONS": n_directions}
    library = load(source_of("coupling/cpu/symmetric_contraction.c", defines))
    pointers = ctypes.c_void_p * (1 + n_directions)
    sizes = ("n_atoms", "channels", "n_components", "n_columns", "n_rows", "n_species")
    tables = ("nodes", "entries", "coefficients", "pairs", "species")
    fields = (
        *((name, ctypes.c_int64) for name in (*sizes, "n_nodes", "n_kept", "n_pairs")),
        *((name, ctypes.c_void_p) for name in tables),
        ("inputs", pointers),
        *((name, ctypes.c_void_p) for name in ("weights", "z")),
        ("to_inputs", pointers),
        *((name, ctypes.c_void_p) for name in ("to_weights", "to_z")),
    )
    structure = type("Form", (ctypes.Structure,), {"_fields_": fields})
    library.symmetric_partials.argtypes = (ctypes.POINTER(structure), ctypes.c_int)
    return library, structure


def symmetric_partials(
    x: Tensor,
    directions: Sequence[Tensor],
    weights: Tensor,
    z: Tensor | None,
    species: Tensor,
    wanted: tuple[str, ...],
    form: SymmetricForm,
) -> list[Tensor]:
    """Return the wanted partials of D^k F; see symmetric_contraction_registered.py.

    Raises:
        IndexError: If an atom's species has no weights.
    """
    library, structure = _library(x.dtype, len(directions))
    inputs = [part.contiguous() for part in (x, *directions)]
    names = ["x", *(f"directions.{k}" for k in range(len(directions)))]
    weights, species = weights.contiguous(), species.long().contiguous()
    z = None if z is None else z.contiguous()
    shapes = {"weights": weights.shape, "z": (len(x), form.n_rows, x.shape[2])}
    results = {
        name: x.new_zeros(shapes[name]) if name in shapes else torch.empty_like(inputs[0])
        for name in wanted
    }
    nodes, entries = _nodes(form), _entries(form)
    coefficients, pairs = table_like(_coefficients, form, like=x), _pairs(form)
    pointers = ctypes.c_void_p * len(inputs)
    arguments = structure(
        len(x), x.shape[2], form.n_components, form.n_columns, form.n_rows, len(weights),
        len(nodes), len(_tree(form)[1]), len(pairs),
        *(table.data_ptr() for table in (nodes, entries, coefficients, pairs, species)),
        pointers(*(part.data_ptr() for part in inputs)), weights.data_ptr(), _at(z),
        pointers(*(_at(results.get(name)) for name in names)),
        _at(results.get("weights")), _at(results.get("z")),
    )  # fmt: skip
    n_parts = max(1, min(n_threads(), len(x) // _ATOMS_PER_THREAD))
    failed = library.symmetric_partials(arguments, n_parts)
    if failed == 2:
        raise IndexError(
            f"species are {int(species.min())} to {int(species.max())}, but there are weights of "
            f"{len(weights)} species"
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


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
