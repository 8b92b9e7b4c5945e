"""The symmetric contraction and its derivatives by one Triton kernel: sums of products of rows.

Each partial derivative of D^k F by whatever argument is, row by row of its result, a sum of terms:
a coefficient, rows of x, of directions and of z, and mostly a row of the weights. The rows of an
atom are laid one below the other, the terms of each result are worked out once for each form, and
a program owns a row of some atoms, so nothing is added from two sides.
"""

# Only Triton's compiler goes through tl.static_range; to a type checker it raises.
# pyright: reportGeneralTypeIssues=false

from functools import cache
from itertools import permutations
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomeq.ops.coupling.symmetric_contraction_basis import SymmetricForm
from atomeq.ops.segment.operations import segment_total
from atomeq.ops.tables import constant_table, table_like
from atomeq.ops.triton_launch import accumulator, ceil_div, channel_tile, edge_tile, launch

_SHARE = 8  # accumulators' worth of registers that products of rows take

# Result row, column of the weights (0 without), rows that are multiplied -> coefficient.
_Products = dict[tuple[int, int, tuple[int, ...]], float]


def symmetric_partials(call: SimpleNamespace) -> list[Tensor]:
    """Return the wanted partials of D^k F; see ../symmetric_contraction.py."""
    x, weights, species = call.x, call.weights, call.species
    form, k = SymmetricForm(call.lmax, tuple(call.degrees), call.order), len(call.directions)
    rows = torch.cat([x.new_ones(len(x), 1, x.shape[2]), x, *call.directions], dim=1)
    both = rows if call.z is None else torch.cat((rows, call.z), dim=1)
    results = []
    for name in call.arguments.split():
        result = _summed(rows if name == "z" else both, weights, species, form, name, k)
        if name == "weights":
            result = segment_total(result, species, len(weights), "triton")
        results.append(result)
    return results


def _summed(
    rows: Tensor, weights: Tensor, species: Tensor, form: SymmetricForm, wanted: str, k: int
) -> Tensor:
    n_atoms, n_rows, channels = rows.shape
    sizes = {"z": form.n_rows, "weights": form.n_columns}
    result = rows.new_empty(n_atoms, sizes.get(wanted, form.n_components), channels)
    block_c = channel_tile(channels)
    block_n = edge_tile(1, block_c, share=_SHARE)
    numbers = table_like(_numbers, form, wanted, k, like=rows)
    launch(
        _sum_of_products,
        (ceil_div(n_atoms, block_n), result.shape[1], ceil_div(channels, block_c)),
        rows,
        weights,
        species,
        table_like(_starts, form, wanted, k, like=rows),
        numbers,
        table_like(_coefficients, form, wanted, k, like=rows),
        result,
        like=rows,
        n_atoms=n_atoms,
        ROWS=n_rows,
        RESULTS=result.shape[1],
        COLUMNS=weights.shape[1],
        CHANNELS=channels,
        FACTORS=numbers.shape[1] - 1,
        WEIGHTED=wanted != "weights",
        SUM=accumulator(rows.dtype),
        BLOCK_N=block_n,
        BLOCK_C=block_c,
    )
    return result


@cache
def _products(form: SymmetricForm, wanted: str, k: int) -> _Products:
    """Return the terms of a partial of D^k F, where k of the factors of each are directions.

    Rows are those of 1, x, the directions and z, in this order.
    """
    n_x, padding = form.n_components, (0,) * form.order
    first_z = 1 + (1 + k) * n_x
    missing = {"x": 0} | {f"directions.{j}": 1 + j for j in range(k)}
    found: _Products = {}
    for monomial, column, row, coefficient in form.terms():
        n = len(monomial)
        for places in permutations(range(n), k):  # of the directions
            inputs = [places.index(place) + 1 if place in places else 0 for place in range(n)]
            factors = [1 + source * n_x + i for source, i in zip(inputs, monomial, strict=True)]
            factors += padding[n:]
            if wanted == "z":
                terms = [(row, column, factors)]
            elif wanted == "weights":
                terms = [(column, 0, [*factors, first_z + row])]
            else:  # z stands in the place of the factor
                terms = [
                    (i, column, [*factors[:place], first_z + row, *factors[place + 1 :]])
                    for place, i in enumerate(monomial)
                    if inputs[place] == missing[wanted]
                ]
            for result, q, product in terms:
                key = result, q, tuple(sorted(product))
                found[key] = found.get(key, 0.0) + coefficient
    return dict(sorted(found.items()))


@constant_table
def _starts(form: SymmetricForm, wanted: str, k: int) -> Tensor:
    """Return where the terms of each result begin, (n_results + 1) int32."""
    sizes = {"z": form.n_rows, "weights": form.n_columns}
    counts = [0] * (sizes.get(wanted, form.n_components) + 1)
    for result, *_ in _products(form, wanted, k):
        counts[result + 1] += 1
    return torch.tensor(counts, device="cpu").cumsum(0).to(torch.int32)


@constant_table
def _numbers(form: SymmetricForm, wanted: str, k: int) -> Tensor:
    """Return the column of each term and the rows that it multiplies, (n_terms, 1 + n) int32."""
    n_factors = form.order + (wanted == "weights")
    rows = [(column, *factors) for _, column, factors in _products(form, wanted, k)]
    return torch.tensor(rows, dtype=torch.int32, device="cpu").view(-1, 1 + n_factors)


@constant_table
def _coefficients(form: SymmetricForm, wanted: str, k: int) -> Tensor:
    values = list(_products(form, wanted, k).values())
    return torch.tensor(values, dtype=torch.float64, device="cpu")


@triton.jit
def _sum_of_products(rows, weights, species, starts, numbers, coefficients, result, n_atoms,
                     ROWS: tl.constexpr, RESULTS: tl.constexpr, COLUMNS: tl.constexpr,
                     CHANNELS: tl.constexpr, FACTORS: tl.constexpr, WEIGHTED: tl.constexpr,
                     SUM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    atom = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = atom < n_atoms
    atom = atom.to(tl.int64)
    inside = there[:, None] & (channel < CHANNELS)[None, :]
    own = rows + (atom * (ROWS * CHANNELS))[:, None] + channel[None, :]
    kind = tl.load(species + atom, mask=there, other=0).to(tl.int64)
    weight = weights + (kind * (COLUMNS * CHANNELS))[:, None] + channel[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_C), dtype=SUM)
    term = tl.load(starts + tl.program_id(1))
    last = tl.load(starts + tl.program_id(1) + 1)
    while term < last:  # not range(): the interpreter has none over loaded numbers
        number = numbers + term * (FACTORS + 1)
        product = tl.full((BLOCK_N, BLOCK_C), 1.0, dtype=SUM)
        product *= tl.load(coefficients + term).to(SUM)
        if WEIGHTED:
            column = tl.load(number)
            product *= tl.load(weight + column * CHANNELS, mask=inside, other=0.0).to(SUM)
        for f in tl.static_range(FACTORS):
            row = tl.load(number + (f + 1))
            product *= tl.load(own + row * CHANNELS, mask=inside, other=0.0).to(SUM)
        total += product
        term += 1
    out = result + (atom * (RESULTS * CHANNELS))[:, None] + channel[None, :]
    tl.store(out + tl.program_id(1) * CHANNELS, total, mask=inside)
