"""The sizes of an SO(2) map and where its parts lie in a row of numbers, one row per edge."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """What one order m reads and writes: columns of the input, columns of the output."""

    order: int
    inputs: tuple[slice, ...]  # +m, -m; one for m = 0
    scales: slice  # of the factors that +m and -m share
    outputs: tuple[slice, ...]  # m = 0 includes the extra scalars, which come first


class SO2Shape(NamedTuple):
    """Sizes of the map (n_edges, n_rows * c_in) -> (n_edges, n_scalars + n_rows * c_out)."""

    lmax: int
    mmax: int
    c_in: int
    c_out: int
    n_scalars: int

    @property
    def n_rows(self) -> int:
        """Rows |m| <= mmax of an edge."""
        return sum((self.lmax - m + 1) * (1 if m == 0 else 2) for m in range(self.mmax + 1))

    @property
    def n_scales(self) -> int:
        """Factors of an edge's input, one for each (l, |m|, channel)."""
        return sum(self.lmax - m + 1 for m in range(self.mmax + 1)) * self.c_in

    @property
    def width(self) -> int:
        """Numbers of an edge's output."""
        return self.n_scalars + self.n_rows * self.c_out

    @property
    def n_biases(self) -> int:
        """Outputs of m = 0, extra scalars included."""
        return self.n_scalars + (self.lmax + 1) * self.c_out

    @property
    def blocks(self) -> list[Block]:
        """One for each order."""
        return _blocks(self)


def shape_of(sizes: list[int]) -> SO2Shape:
    """Return the shape; a trace with symbolic sizes becomes one of these: they never change."""
    return SO2Shape(*(int(size) for size in sizes))


@cache
def _blocks(shape: SO2Shape) -> list[Block]:
    found, start, scales, first = [], 0, 0, shape.n_scalars
    for m in range(shape.mmax + 1):
        step, step_out = (shape.lmax + 1 - m) * shape.c_in, (shape.lmax + 1 - m) * shape.c_out
        signs = range(1 if m == 0 else 2)
        inputs = tuple(slice(start + i * step, start + (i + 1) * step) for i in signs)
        outputs = tuple(slice(first + i * step_out, first + (i + 1) * step_out) for i in signs)
        if m == 0:
            outputs = (slice(0, outputs[0].stop),)
        found.append(Block(m, inputs, slice(scales, scales + step), outputs))
        start, scales, first = inputs[-1].stop, scales + step, outputs[-1].stop
    return found


def scale_rows_(rows: Tensor, scale: Tensor, shape: SO2Shape) -> Tensor:
    """Multiply rows (n_edges, n_rows * c_in) by the factors that +m and -m share, in place."""
    for block in shape.blocks:
        for columns in block.inputs:
            rows[:, columns].mul_(scale[:, block.scales])
    return rows


def add_scaled_rows_(total: Tensor, rows: Tensor, scale: Tensor, shape: SO2Shape) -> Tensor:
    """Add the scaled rows to ``total``, in place."""
    for block in shape.blocks:
        for columns in block.inputs:
            total[:, columns].addcmul_(rows[:, columns], scale[:, block.scales])
    return total


def scale_gradient(grad: Tensor, rows: Tensor, shape: SO2Shape) -> Tensor:
    """Return the gradient of the factors, (n_edges, n_scales)."""
    result = rows.new_empty(len(rows), shape.n_scales)
    for block in shape.blocks:
        part = result[:, block.scales]
        torch.mul(grad[:, block.inputs[0]], rows[:, block.inputs[0]], out=part)
        for columns in block.inputs[1:]:
            part.addcmul_(grad[:, columns], rows[:, columns])
    return result
