"""The gate between the two maps of an edge layer: SiLU on l = 0, sigmoid gates on l > 0.

Value, gradient and second derivative each read every number once and write every result once.
"""

# Only Triton's compiler goes through tl.static_range; to a type checker it raises.
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from atomeq.ops.edge.so2_map import SO2Shape
from atomeq.ops.edge.triton.rotation_kernels import row_of
from atomeq.ops.triton_launch import (
    accumulator,
    ceil_div,
    channel_tile,
    contiguous,
    launch,
)


class Gate:
    """Value a(y), Jacobian J and second derivative.

    Of y, (n_edges, lmax * channels + n_rows * channels), the gates of l = 1..lmax come first.
    """

    def __init__(self, y: Tensor, shape: SO2Shape) -> None:
        self.y = contiguous(y)
        self.shape = shape

    def value(self) -> Tensor:
        """Return SiLU of l = 0, and gated rows, (n_edges, n_rows * channels)."""
        value = self.y.new_empty(len(self.y), self.shape.n_rows * self.shape.c_out)
        self._launch(_gate, value)
        return value

    def gradient(
        self, grad: Tensor, also: Tensor | None = None, value: Tensor | None = None
    ) -> Tensor:
        """Return J^T grad + also, like y; the value is written where it is wanted."""
        result = torch.empty_like(self.y)
        also = None if also is None else contiguous(also)
        self._launch(_gate_gradient, contiguous(grad), also, value, result)
        return result

    def second(
        self, moved: Tensor, grad: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return J moved, the gradient of <moved, J^T grad> in y, to ``out`` too, and J^T grad."""
        grad = contiguous(grad)
        value, gradient = torch.empty_like(grad), torch.empty_like(self.y)
        curved = torch.empty_like(self.y) if out is None else out
        self._launch(_gate_second, contiguous(moved), grad, value, curved, gradient)
        return value, curved, gradient

    def _launch(self, kernel: object, *tensors: Tensor | None) -> None:
        shape, n_edges = self.shape, len(self.y)
        block_c = channel_tile(shape.c_out)
        block_e = max(1, 1024 // block_c)
        launch(
            kernel,
            (ceil_div(n_edges, block_e), ceil_div(shape.c_out, block_c)),
            self.y,
            *tensors,
            like=self.y,
            n_edges=n_edges,
            CHANNELS=shape.c_out,
            LMAX=shape.lmax,
            MMAX=shape.mmax,
            N_ROWS=shape.n_rows,
            SUM=accumulator(self.y.dtype),
            BLOCK_E=block_e,
            BLOCK_C=block_c,
        )


@triton.jit
def _places(n_edges, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_E: tl.constexpr,
            BLOCK_C: tl.constexpr):  # fmt: skip
    """Return the offsets of a tile in rows of some width, and which of them there are."""
    edge = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (edge < n_edges)[:, None] & (channel < CHANNELS)[None, :]
    return (edge.to(tl.int64) * WIDTH)[:, None] + channel[None, :], inside


@triton.jit
def _gate(y, value, n_edges, CHANNELS: tl.constexpr, LMAX: tl.constexpr, MMAX: tl.constexpr,
          N_ROWS: tl.constexpr, SUM: tl.constexpr, BLOCK_E: tl.constexpr,
          BLOCK_C: tl.constexpr):  # fmt: skip
    ROWS: tl.constexpr = N_ROWS * CHANNELS
    given, inside = _places(n_edges, LMAX * CHANNELS + ROWS, CHANNELS, BLOCK_E, BLOCK_C)
    made, inside = _places(n_edges, ROWS, CHANNELS, BLOCK_E, BLOCK_C)
    for l in tl.static_range(LMAX + 1):
        # The gate of l = 0 is the row l = 0 itself, which lies behind those of l > 0.
        place = (LMAX if l == 0 else l - 1) * CHANNELS
        gate = tl.sigmoid(tl.load(y + given + place, mask=inside, other=0.0).to(SUM))
        for slot in tl.static_range(2 * l + 2):
            if slot != 1 and slot // 2 <= MMAX:
                row = row_of(l, slot // 2, slot % 2, LMAX) * CHANNELS
                number = tl.load(y + given + LMAX * CHANNELS + row, mask=inside, other=0.0)
                tl.store(value + made + row, number.to(SUM) * gate, mask=inside)


@triton.jit
def _gate_gradient(y, grad, also, value, result, n_edges, CHANNELS: tl.constexpr,
                   LMAX: tl.constexpr, MMAX: tl.constexpr, N_ROWS: tl.constexpr,
                   SUM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    ROWS: tl.constexpr = N_ROWS * CHANNELS
    given, inside = _places(n_edges, LMAX * CHANNELS + ROWS, CHANNELS, BLOCK_E, BLOCK_C)
    made, inside = _places(n_edges, ROWS, CHANNELS, BLOCK_E, BLOCK_C)
    for l in tl.static_range(LMAX + 1):
        place = (LMAX if l == 0 else l - 1) * CHANNELS
        gate = tl.sigmoid(tl.load(y + given + place, mask=inside, other=0.0).to(SUM))
        slope = gate * (1.0 - gate)
        through = tl.zeros((BLOCK_E, BLOCK_C), dtype=SUM)
        for slot in tl.static_range(2 * l + 2):
            if slot != 1 and slot // 2 <= MMAX:
                row = row_of(l, slot // 2, slot % 2, LMAX) * CHANNELS
                number = tl.load(y + given + LMAX * CHANNELS + row, mask=inside, other=0.0).to(SUM)
                pull = tl.load(grad + made + row, mask=inside, other=0.0).to(SUM)
                through += pull * number * slope
                if value is not None:
                    tl.store(value + made + row, number * gate, mask=inside)
                if l == 0:
                    through += pull * gate
                else:
                    at = given + LMAX * CHANNELS + row
                    pull *= gate
                    if also is not None:
                        pull += tl.load(also + at, mask=inside, other=0.0).to(SUM)
                    tl.store(result + at, pull, mask=inside)
        if also is not None:
            through += tl.load(also + given + place, mask=inside, other=0.0).to(SUM)
        tl.store(result + given + place, through, mask=inside)


@triton.jit
def _gate_second(y, moved, grad, value, curved, result, n_edges, CHANNELS: tl.constexpr,
                 LMAX: tl.constexpr, MMAX: tl.constexpr, N_ROWS: tl.constexpr, SUM: tl.constexpr,
                 BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    ROWS: tl.constexpr = N_ROWS * CHANNELS
    given, inside = _places(n_edges, LMAX * CHANNELS + ROWS, CHANNELS, BLOCK_E, BLOCK_C)
    made, inside = _places(n_edges, ROWS, CHANNELS, BLOCK_E, BLOCK_C)
    for l in tl.static_range(LMAX + 1):
        place = (LMAX if l == 0 else l - 1) * CHANNELS
        gate = tl.sigmoid(tl.load(y + given + place, mask=inside, other=0.0).to(SUM))
        turn = tl.load(moved + given + place, mask=inside, other=0.0).to(SUM)
        slope = gate * (1.0 - gate)
        bend = slope * (1.0 - 2.0 * gate)
        through = tl.zeros((BLOCK_E, BLOCK_C), dtype=SUM)
        first = tl.zeros((BLOCK_E, BLOCK_C), dtype=SUM)
        for slot in tl.static_range(2 * l + 2):
            if slot != 1 and slot // 2 <= MMAX:
                row = row_of(l, slot // 2, slot % 2, LMAX) * CHANNELS
                at = given + LMAX * CHANNELS + row
                number = tl.load(y + at, mask=inside, other=0.0).to(SUM)
                step = tl.load(moved + at, mask=inside, other=0.0).to(SUM)
                pull = tl.load(grad + made + row, mask=inside, other=0.0).to(SUM)
                tl.store(value + made + row, step * gate + number * slope * turn, mask=inside)
                through += pull * (step * slope + number * bend * turn)
                first += pull * number * slope
                if l == 0:
                    through += pull * slope * turn
                    first += pull * gate
                else:
                    tl.store(curved + at, pull * slope * turn, mask=inside)
                    tl.store(result + at, pull * gate, mask=inside)
        tl.store(curved + given + place, through, mask=inside)
        tl.store(result + given + place, first, mask=inside)
