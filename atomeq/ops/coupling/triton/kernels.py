"""The Clebsch-Gordan form of uvu coupling, with gather and sum inside: the raw kernels.

    F = sum over edges e, paths p, channels c of w[e,p,c] z[t,k,c] T_p[e,k,i] x[s,i,c],

with T_p[e,k,i] the 3j symbols contracted with y[e]. T has no channels, so it is a product of
matrices made once per call, a fraction of the weights' size, and linear in y: what is left is three
kinds of sums. For z and x a program owns one degree of one atom and adds its edges in their order,
without atomics; for w and T it owns some edges and one path. Nothing with rows and channels is
written for an edge.
"""

# Only Triton's compiler goes through tl.static_range; to a type checker it raises.
# pyright: reportGeneralTypeIssues=false

from itertools import accumulate
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomeq.ops.coupling.clebsch_gordan import Form, form_from, path_table
from atomeq.ops.coupling.triton.symmetric_contraction import symmetric_partials
from atomeq.ops.specification import OpSpec
from atomeq.ops.tables import constant_table, table_like
from atomeq.ops.triton_launch import (
    accumulator,
    architecture,
    ceil_div,
    channel_tile,
    edge_tile,
    launch,
    power_of_2,
)
from atomeq.ops.triton_launch import refusal as launch_refusal

__all__ = ["by_torch", "cg_partials", "refusal", "symmetric_partials"]


def refusal(spec: OpSpec) -> str | None:
    """Return None if these kernels serve the call, else the reason why not."""
    return None if by_torch(spec) else launch_refusal(spec)


def by_torch(spec: OpSpec) -> bool:
    """Whether channels couple in another way than uvu, which is all that these kernels know."""
    return spec.mode != "uvu"


def cg_partials(call: SimpleNamespace) -> list[Tensor]:
    """Return dF/ds for each argument; see :func:`~atomeq.ops.coupling.registered.cg_partials`."""
    evaluation = _Evaluation(call)
    return [evaluation.partial(argument) for argument in call.arguments.split()]


class _Pass(NamedTuple):
    """How one path reads: its number, first row and rows of the input, place and strides in T."""

    number: int
    first: int
    size: int
    place: int
    out_stride: int
    in_stride: int


class _Block(NamedTuple):
    """Rows that one program writes, and the paths that contribute."""

    first: int
    size: int
    padded: int
    passes: tuple[_Pass, ...]


class _Evaluation:
    """One evaluation of derivatives of F: the tensors and the tables they share."""

    def __init__(self, call: SimpleNamespace) -> None:
        self.x, self.y, self.weights, self.z = call.x, call.y, call.weights, call.z
        self.ends, self.segments, self.n_targets = call.edges[:2], call.edges[2:], call.n_targets
        self.form = form = form_from(call.form)
        self.n_edges, self.channels = self.y.shape[0], self.x.shape[2]
        self.symbols = table_like(_symbols, form, like=self.y)  # (n2, columns of T)
        self.table = self.y[:, : len(self.symbols)] @ self.symbols

    def partial(self, argument: str) -> Tensor:
        """Return dF by the named argument."""
        if argument == "z":
            rows = self.form.n_rows
            result = self.x.new_zeros(self.n_targets, rows, self.channels)
            return self._summed(result, self.x, 0, _blocks(self.form, back=False))
        if argument == "x":
            result = torch.zeros_like(self.x)
            return self._summed(result, self._given_z(), 1, _blocks(self.form, back=True))
        if argument == "weights":
            return self._by_weights()
        return self._by_y()

    def _given_z(self) -> Tensor:
        if self.z is None:
            raise ValueError("z is missing, but another derivative than that by z is asked for")
        return self.z

    def _summed(
        self, result: Tensor, features: Tensor, end: int, blocks: tuple[_Block, ...]
    ) -> Tensor:
        """Sum over the edges of each atom at the other end than that of the features."""
        pointer, order = self.segments[2 * end : 2 * end + 2] if self.ends else (None, None)
        block_c = channel_tile(self.channels)
        passes = [each for block in blocks for each in block.passes]
        lasts = list(accumulate(len(block.passes) for block in blocks))
        launch(
            _couple_and_sum,
            (len(result), len(blocks), ceil_div(self.channels, block_c)),
            features,
            self.table,
            self.weights,
            self.ends[end] if self.ends else None,
            pointer,
            order,
            result,
            like=self.x,
            CHANNELS=self.channels,
            IN_ROWS=features.shape[1],
            OUT_ROWS=result.shape[1],
            TABLE=self.table.shape[1],
            N_BLOCKS=len(blocks),
            BLOCKS=tuple(
                (*block[:3], last - len(block.passes), last)
                for block, last in zip(blocks, lasts, strict=True)
            ),
            PASSES=tuple(map(tuple, passes)),  # Triton knows tuples of tuples, no deeper ones
            **self._weighting(),
            SEGMENTED=bool(self.ends),
            SUM=accumulator(self.x.dtype),
            BLOCK_E=2 if self.ends else 1,
            BLOCK_C=block_c,
            num_warps=2 if architecture(self.x) < 100 else 4,  # two spill on Blackwell
        )
        return result

    def _by_weights(self) -> Tensor:
        n_paths = len(self.form.paths)
        result = self.x.new_empty(self.n_edges, n_paths, self.channels)
        self._by_edges(_weight_partial, result, channel_programs=True)
        shared = self.weights is None or self.weights.ndim == 2
        return result.sum(0) if shared else result

    def _by_y(self) -> Tensor:
        gradient = torch.empty_like(self.table)
        self._by_edges(_table_partial, gradient, channel_programs=False)
        used = gradient @ self.symbols.T
        return torch.nn.functional.pad(used, (0, self.y.shape[1] - used.shape[1]))

    def _by_edges(self, kernel: object, result: Tensor, *, channel_programs: bool) -> None:
        """Launch a kernel over blocks of edges and paths."""
        z = self._given_z()
        paths = _paths(self.form)
        block_c = channel_tile(self.channels)
        block_e = edge_tile(max(path[4] for path in paths), block_c, share=2)
        grid = (ceil_div(self.n_edges, block_e), len(paths))
        launch(
            kernel,
            (*grid, ceil_div(self.channels, block_c)) if channel_programs else grid,
            self.x,
            self.table,
            self.weights,
            z,
            *(self.ends or (None, None)),
            table_like(_numbers, self.form, like=self.table),
            result,
            like=self.x,
            n_edges=self.n_edges,
            CHANNELS=self.channels,
            X_ROWS=self.x.shape[1],
            Z_ROWS=z.shape[1],
            TABLE=self.table.shape[1],
            N_PATHS=len(paths),
            NUMBERS=len(paths[0]),
            SIZES=tuple(sorted({path[4] for path in paths})),
            **self._weighting(),
            GATHERED=bool(self.ends),
            SUM=accumulator(self.x.dtype),
            BLOCK_E=block_e,
            BLOCK_C=block_c,
        )

    def _weighting(self) -> dict[str, bool | int]:
        per_edge = self.weights is not None and self.weights.ndim == 3
        return {
            "WEIGHTED": self.weights is not None,
            "STRIDE": len(self.form.paths) * self.channels if per_edge else 0,
        }


@constant_table
def _symbols(form: Form) -> Tensor:
    """Return the matrix from y to T, (rows of y that are read, columns of T)."""
    n2 = (max(path.l2 for path in form.paths) + 1) ** 2
    columns = []
    for number, (l1, l2, l3) in enumerate(form.paths):
        block = torch.zeros(n2, (2 * l3 + 1) * (2 * l1 + 1), dtype=torch.float64, device="cpu")
        symbols = path_table(form, number, 1)  # (2 l1 + 1, 2 l2 + 1, 2 l3 + 1)
        block[l2 * l2 : (l2 + 1) ** 2] = symbols.permute(1, 2, 0).flatten(1)
        columns.append(block)
    return torch.cat(columns, dim=1)


def _places(form: Form) -> list[int]:
    """Return the first column of each path in T."""
    places = [0]
    for l1, _, l3 in form.paths:
        places.append(places[-1] + (2 * l1 + 1) * (2 * l3 + 1))
    return places


def _paths(form: Form) -> tuple[tuple[int, ...], ...]:
    """Return for each path: first row and rows of x, first row, rows and padded rows of z, T."""
    return tuple(
        (l1 * l1, 2 * l1 + 1, row, 2 * l3 + 1, power_of_2(2 * l3 + 1), place)
        for (l1, _, l3), row, place in zip(form.paths, form.rows(), _places(form), strict=False)
    )


@constant_table
def _numbers(form: Form) -> Tensor:
    """Return :func:`_paths` for a kernel that reads it.

    Written into the code, with a branch for each path, it would compile for a minute at lmax 6.
    """
    return torch.tensor(_paths(form), dtype=torch.int32, device="cpu")


def _blocks(form: Form, *, back: bool) -> tuple[_Block, ...]:
    """Group the paths by the rows they add to: those of z, or those of x on the way back."""
    found: dict[tuple[int, int], list[_Pass]] = {}
    for number, (x_row, n1, z_row, n3, _, place) in enumerate(_paths(form)):
        key = (x_row, n1) if back else (z_row, n3)
        reads = (z_row, n3) if back else (x_row, n1)
        strides = (1, n1) if back else (n1, 1)
        found.setdefault(key, []).append(_Pass(number, *reads, place, *strides))
    return tuple(
        _Block(first, size, power_of_2(size), tuple(passes))
        for (first, size), passes in found.items()
    )


@triton.jit
def _couple_and_sum(features, table, weights, end, pointer, order, result,
                    CHANNELS: tl.constexpr, IN_ROWS: tl.constexpr, OUT_ROWS: tl.constexpr,
                    TABLE: tl.constexpr, N_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
                    PASSES: tl.constexpr,
                    WEIGHTED: tl.constexpr, STRIDE: tl.constexpr, SEGMENTED: tl.constexpr,
                    SUM: tl.constexpr, BLOCK_E: tl.constexpr,
                    BLOCK_C: tl.constexpr):  # fmt: skip
    atom = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, last = atom, atom + 1
    if SEGMENTED:
        begin, last = tl.load(pointer + atom), tl.load(pointer + atom + 1)
    for b in tl.static_range(N_BLOCKS):
        if tl.program_id(1) == b:  # a branch that a whole program takes
            place = tl.arange(0, BLOCKS[b][2])
            real = place < BLOCKS[b][1]
            column = tl.where(real, place, 0)
            total = tl.zeros((BLOCK_E, tl.constexpr(BLOCKS[b][2]), BLOCK_C), dtype=SUM)
            while begin < last:  # not range(): the interpreter has none over loaded numbers
                edge = begin + tl.arange(0, BLOCK_E)
                there = edge < last
                atom_in = edge
                if SEGMENTED:
                    edge = tl.load(order + edge, mask=there, other=0)
                    atom_in = tl.load(end + edge, mask=there, other=0).to(tl.int64)
                edge = edge.to(tl.int64)
                inside = there[:, None] & (channel < CHANNELS)[None, :]
                read = features + (atom_in * (IN_ROWS * CHANNELS))[:, None] + channel[None, :]
                element = table + (edge * TABLE)[:, None]
                for p in tl.static_range(tl.constexpr(BLOCKS[b][3]), tl.constexpr(BLOCKS[b][4])):
                    weight = tl.full((BLOCK_E, BLOCK_C), 1.0, dtype=SUM)
                    if WEIGHTED:
                        own = weights + (edge * STRIDE)[:, None] + channel[None, :]
                        weight = tl.load(own + PASSES[p][0] * CHANNELS, mask=inside,
                                         other=0.0).to(SUM)  # fmt: skip
                    for i in range(PASSES[p][2]):
                        feature = tl.load(read + (PASSES[p][1] + i) * CHANNELS, mask=inside,
                                          other=0.0).to(SUM)  # fmt: skip
                        at = PASSES[p][3] + column * PASSES[p][4]
                        symbol = tl.load(element + (at + i * PASSES[p][5])[None, :],
                                         mask=there[:, None], other=0.0).to(SUM)  # fmt: skip
                        total += symbol[:, :, None] * (weight * feature)[:, None, :]
                begin += BLOCK_E
            out = (
                result
                + atom * (OUT_ROWS * CHANNELS)
                + ((BLOCKS[b][0] + place)[:, None] * CHANNELS + channel[None, :])
            )
            kept = real[:, None] & (channel < CHANNELS)[None, :]
            tl.store(out, tl.sum(total, axis=0), mask=kept)


@triton.jit
def _ends(source, target, n_edges, GATHERED: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the edges of a program, which of them there are, and their atoms."""
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    there = edge < n_edges
    edge = edge.to(tl.int64)
    first, second = edge, edge
    if GATHERED:
        first = tl.load(source + edge, mask=there, other=0).to(tl.int64)
        second = tl.load(target + edge, mask=there, other=0).to(tl.int64)
    return edge, there, first, second


@triton.jit
def _weight_partial(x, table, weights, z, source, target, paths, result, n_edges,
                    CHANNELS: tl.constexpr, X_ROWS: tl.constexpr, Z_ROWS: tl.constexpr,
                    TABLE: tl.constexpr, N_PATHS: tl.constexpr, NUMBERS: tl.constexpr,
                    SIZES: tl.constexpr, WEIGHTED: tl.constexpr, STRIDE: tl.constexpr,
                    GATHERED: tl.constexpr, SUM: tl.constexpr,
                    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    edge, there, first, second = _ends(source, target, n_edges, GATHERED, BLOCK_E)
    path = tl.program_id(1)
    x_row, n_x, z_row, n_z, padded, first_column = _path(paths + path * NUMBERS)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = there[:, None] & (channel < CHANNELS)[None, :]
    read = x + (first * (X_ROWS * CHANNELS))[:, None] + channel[None, :]
    element = table + (edge * TABLE)[:, None]
    out = result + (edge * (N_PATHS * CHANNELS))[:, None] + channel[None, :]
    for s in tl.static_range(len(SIZES)):
        if padded == SIZES[s]:  # a branch that a whole program takes
            place = tl.arange(0, SIZES[s])
            real = place < n_z
            column = first_column + tl.where(real, place, 0) * n_x
            total = tl.zeros((BLOCK_E, tl.constexpr(SIZES[s]), BLOCK_C), dtype=SUM)
            i = 0
            while i < n_x:  # not range(): the interpreter has none over loaded numbers
                feature = tl.load(read + (x_row + i) * CHANNELS, mask=inside, other=0.0)
                symbol = tl.load(element + (column + i)[None, :], mask=there[:, None], other=0.0)
                total += symbol.to(SUM)[:, :, None] * feature.to(SUM)[:, None, :]
                i += 1
            at = (z + second * (Z_ROWS * CHANNELS))[:, None, None] + (
                (z_row + place)[None, :, None] * CHANNELS + channel[None, None, :]
            )
            kept = inside[:, None, :] & real[None, :, None]
            total *= tl.load(at, mask=kept, other=0.0).to(SUM)
            tl.store(out + path * CHANNELS, tl.sum(total, axis=1), mask=inside)


@triton.jit
def _table_partial(x, table, weights, z, source, target, paths, result, n_edges,
                   CHANNELS: tl.constexpr, X_ROWS: tl.constexpr, Z_ROWS: tl.constexpr,
                   TABLE: tl.constexpr, N_PATHS: tl.constexpr, NUMBERS: tl.constexpr,
                   SIZES: tl.constexpr, WEIGHTED: tl.constexpr, STRIDE: tl.constexpr,
                   GATHERED: tl.constexpr, SUM: tl.constexpr,
                   BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    edge, there, first, second = _ends(source, target, n_edges, GATHERED, BLOCK_E)
    path = tl.program_id(1)
    x_row, n_x, z_row, n_z, padded, first_column = _path(paths + path * NUMBERS)
    for s in tl.static_range(len(SIZES)):
        if padded == SIZES[s]:
            place = tl.arange(0, SIZES[s])
            real = place < n_z
            row = z_row + tl.where(real, place, 0)  # what is read of no row is not written
            out = result + (edge * TABLE + first_column)[:, None]
            i = 0
            while i < n_x:
                total = tl.zeros((BLOCK_E, tl.constexpr(SIZES[s])), dtype=SUM)
                for start in tl.static_range(0, CHANNELS, BLOCK_C):
                    channel = start + tl.arange(0, BLOCK_C)
                    inside = there[:, None] & (channel < CHANNELS)[None, :]
                    at = (x + first * (X_ROWS * CHANNELS))[:, None] + channel[None, :]
                    feature = tl.load(at + (x_row + i) * CHANNELS, mask=inside, other=0.0)
                    feature = feature.to(SUM)
                    if WEIGHTED:
                        at = (weights + edge * STRIDE)[:, None] + channel[None, :]
                        at += path * CHANNELS
                        feature *= tl.load(at, mask=inside, other=0.0).to(SUM)
                    at = (z + second * (Z_ROWS * CHANNELS))[:, None, None] + (
                        row[None, :, None] * CHANNELS + channel[None, None, :]
                    )
                    pull = tl.load(at, mask=inside[:, None, :], other=0.0).to(SUM)
                    total += tl.sum(pull * feature[:, None, :], axis=2)
                column = place * n_x + i
                tl.store(out + column[None, :], total, mask=there[:, None] & real[None, :])
                i += 1


@triton.jit
def _path(numbers):
    """Return what :func:`_paths` says of one path."""
    return (
        tl.load(numbers),
        tl.load(numbers + 1),
        tl.load(numbers + 2),
        tl.load(numbers + 3),
        tl.load(numbers + 4),
        tl.load(numbers + 5),
    )
