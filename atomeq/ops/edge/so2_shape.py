"""The sizes of an SO(2) map and where its parts lie in a row of numbers, one row per edge."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

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
        return (2 * self.mmax + 1) * (self.lmax + 1) - self.mmax * (self.mmax + 1)

    @property
    def n_scales(self) -> int:
        """Factors of an edge's input, one for each (l, |m|, channel)."""
        return (self.n_rows + self.lmax + 1) // 2 * self.c_in  # m = 0 has but one sign

    @property
    def width_in(self) -> int:
        """Numbers of an edge's input."""
        return self.n_rows * self.c_in

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


def so2_shape(
    c_in: int, weights: Sequence[Tensor], lmax: int, mmax: int, n_scalars: int | None
) -> SO2Shape:
    """Return the sizes of a map after checking every weight's shape against its input.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    if len(weights) != mmax + 1:
        raise ValueError(f"{len(weights)} weights given; mmax={mmax} needs one per order m")
    if mmax > 0 and weights[1].ndim >= 2:
        c_out = weights[1].shape[-2] // lmax
    else:
        c_out = (weights[0].shape[0] - (n_scalars or 0)) // (lmax + 1)
    if n_scalars is None:
        n_scalars = max(weights[0].shape[0] - (lmax + 1) * c_out, 0)
    expected: list[tuple[int, ...]] = []
    fits = True
    for m, weight in enumerate(weights):
        n, extra = lmax - m + 1, 0 if m else n_scalars
        real, shape = (extra + n * c_out, n * c_in), tuple(weight.shape)
        expected.append((2, *real) if m else real)
        fits = fits and (shape == real or shape == expected[m])
    if not fits:
        shapes = [tuple(weight.shape) for weight in weights]
        raise ValueError(f"weights are {shapes}; expected {expected} ({n_scalars} scalars)")
    return SO2Shape(lmax, mmax, c_in, c_out, n_scalars)


def shape_of(sizes: list[int]) -> SO2Shape:
    """Return the shape; a trace with symbolic sizes becomes one of these: they never change."""
    return SO2Shape(*map(int, sizes))


def views(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return views of the weights: of a leaf torch cannot tell whether its gradient is wanted."""
    return [weight.view_as(weight) if weight.requires_grad else weight for weight in weights]


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
