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
    def blocks(self) -> list[Block]:
        """One for each order."""
        return _blocks(self)


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


def scale_by_row(x: Tensor, scale: Tensor, shape: SO2Shape) -> Tensor:
    """Return rows (n_edges, n_rows, c_in) times the factors that +m and -m share."""
    sizes = [part.stop - part.start for block in shape.blocks for part in block.inputs]
    parts = iter(x.flatten(1).split(sizes, dim=1))
    scaled = [next(parts) * scale[:, block.scales] for block in shape.blocks for _ in block.inputs]
    return torch.cat(scaled, dim=1).view(x.shape)
