"""Tables of functions of the edges' lengths: a program has all functions of some edges."""

# Only Triton's compiler goes through tl.static_range; to a type checker it raises.
# pyright: reportGeneralTypeIssues=false

from types import SimpleNamespace

import triton
import triton.language as tl
from torch import Tensor

from atomeq.ops.coupling.weight_table import ROWS
from atomeq.ops.specification import OpSpec
from atomeq.ops.triton_launch import accumulator, launch, power_of_2
from atomeq.ops.triton_launch import refusal as launch_refusal

_NUMBERS = 1024  # functions of one program at a time, of some edges


def refusal(spec: OpSpec) -> str | None:
    """Return None if these kernels serve the call, else the reason why not."""
    return launch_refusal(spec, any_channels=True)


def read_pairs(call: SimpleNamespace) -> list[Tensor]:
    """Return the functions, a tensor (n_edges, width) for each width."""
    found = [call.vectors.new_empty(len(call.vectors), width) for width in call.widths]
    _launch(_read, call, found)
    return found


def read_pairs_gradient(call: SimpleNamespace) -> Tensor:
    """Return the gradient by the vectors, (n_edges, 3)."""
    result = call.vectors.new_zeros(len(call.vectors), 3)
    _launch(_read_gradient, call, call.grads, result)
    return result


def _launch(kernel: object, call: SimpleNamespace, parts: list[Tensor], *result: Tensor) -> None:
    n_kinds, n_intervals, _, n_functions = call.polynomials.shape[1:]
    start = 0
    for part in parts:
        width = part.shape[1]
        block = power_of_2(width)
        edges = max(1, min(32, _NUMBERS // block))
        launch(
            *(kernel, (-(-len(part) // edges),), call.vectors, call.edge_index, call.kinds),
            *(call.polynomials, part, *result),
            like=part,
            n_edges=len(part),
            STEP=call.step,  # an argument would be rounded to single precision
            N_KINDS=n_kinds,
            N_INTERVALS=n_intervals,
            N_FUNCTIONS=n_functions,
            DEGREE=ROWS - 1,
            SUM=accumulator(part.dtype),
            WIDTH=width,
            BLOCK=block,
            EDGES=edges,
            START=start,
        )
        start += width


@triton.jit
def _places(vectors, ends, kinds, n_edges, STEP: tl.constexpr, N_KINDS: tl.constexpr,
            N_INTERVALS: tl.constexpr, EDGES: tl.constexpr, SUM: tl.constexpr):  # fmt: skip
    """Return the edges, which there are, x, y, z, lengths, tables' intervals and places in them."""
    edge = tl.program_id(0).to(tl.int64) * EDGES + tl.arange(0, EDGES)
    there = edge < n_edges
    x = tl.where(there, tl.load(vectors + 3 * edge, mask=there, other=0.0).to(SUM), 1.0)
    y = tl.load(vectors + 3 * edge + 1, mask=there, other=0.0).to(SUM)
    z = tl.load(vectors + 3 * edge + 2, mask=there, other=0.0).to(SUM)
    length = tl.sqrt(x * x + y * y + z * z)
    at = length / STEP
    inside = at < N_INTERVALS
    interval = tl.where(inside, at, N_INTERVALS - 1).to(tl.int64)
    place = tl.where(inside, at - interval.to(at.dtype), 1.0)
    if N_KINDS > 1:
        source = tl.load(kinds + tl.load(ends + edge, mask=there, other=0))
        target = tl.load(kinds + tl.load(ends + n_edges + edge, mask=there, other=0))
        interval += (source * N_KINDS + target) * N_INTERVALS
    return edge, there, x, y, z, length, interval, place, inside


@triton.jit
def _read(vectors, ends, kinds, polynomials, result, n_edges, STEP: tl.constexpr,
          N_KINDS: tl.constexpr, N_INTERVALS: tl.constexpr, N_FUNCTIONS: tl.constexpr,
          DEGREE: tl.constexpr, SUM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
          EDGES: tl.constexpr, START: tl.constexpr):  # fmt: skip
    edge, there, _x, _y, _z, _length, interval, t, _near = _places(
        vectors, ends, kinds, n_edges, STEP, N_KINDS, N_INTERVALS, EDGES, SUM)  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = there[:, None] & (column < WIDTH)[None, :]
    rows = (
        polynomials + (interval * ((DEGREE + 1) * N_FUNCTIONS))[:, None] + START + column[None, :]
    )
    value = tl.load(rows + DEGREE * N_FUNCTIONS, mask=inside, other=0.0).to(SUM)
    for power in tl.static_range(1, DEGREE + 1):
        row = tl.load(rows + (DEGREE - power) * N_FUNCTIONS, mask=inside, other=0.0).to(SUM)
        value = value * t[:, None] + row
    tl.store(result + (edge * WIDTH)[:, None] + column[None, :], value, mask=inside)


@triton.jit
def _read_gradient(vectors, ends, kinds, polynomials, grad, result, n_edges, STEP: tl.constexpr,
                   N_KINDS: tl.constexpr, N_INTERVALS: tl.constexpr, N_FUNCTIONS: tl.constexpr,
                   DEGREE: tl.constexpr, SUM: tl.constexpr, WIDTH: tl.constexpr,
                   BLOCK: tl.constexpr, EDGES: tl.constexpr, START: tl.constexpr):  # fmt: skip
    """Add the gradient of some functions to ``result``."""
    edge, there, x, y, z, length, interval, t, near = _places(
        vectors, ends, kinds, n_edges, STEP, N_KINDS, N_INTERVALS, EDGES, SUM)  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = there[:, None] & (column < WIDTH)[None, :]
    rows = (
        polynomials + (interval * ((DEGREE + 1) * N_FUNCTIONS))[:, None] + START + column[None, :]
    )
    slope = tl.load(rows + DEGREE * N_FUNCTIONS, mask=inside, other=0.0).to(SUM) * DEGREE
    for power in tl.static_range(1, DEGREE):
        row = tl.load(rows + (DEGREE - power) * N_FUNCTIONS, mask=inside, other=0.0).to(SUM)
        slope = slope * t[:, None] + row * (DEGREE - power)
    pull = tl.load(grad + (edge * WIDTH)[:, None] + column[None, :], mask=inside, other=0.0)
    along = tl.where(near & (length > 0.0), tl.sum(slope * pull, axis=1) / (STEP * length), 0.0)
    for axis in tl.static_range(3):
        out = result + 3 * edge + axis
        part = x if axis == 0 else (y if axis == 1 else z)
        before = tl.load(out, mask=there, other=0.0)
        tl.store(out, before + along * part, mask=there)
