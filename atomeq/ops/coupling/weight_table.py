"""Weights of edges that are functions of their length, as a table of polynomials."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 6  # coefficients of a polynomial, as in cg.c


class WeightTable(NamedTuple):
    """One polynomial of degree five for each of equal intervals of the length.

    Attributes:
        lengths: Of the edges, in intervals, from 0; beyond the last one the weights stay as they
            are at its end, (n_edges,).
        polynomials: Coefficients by powers of the place in the interval, 0 to 1, (n_intervals, 6,
            n_weights).
    """

    lengths: Tensor
    polynomials: Tensor

    def weights(
        self, first: Tensor | int = 0, n_intervals: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the weights of each edge and their slopes per interval, (n_edges, n_weights).

        Args:
            first: Interval with which the table of each edge begins, where one follows the other.
            n_intervals: Of one table; by default there is but one.
        """
        at, end = self.lengths, len(self.polynomials) if n_intervals is None else n_intervals
        inside = (at >= 0) & (at < end)
        interval = at.detach().clamp(0, end - 1).long()
        t = torch.where(inside, at - interval, (at > 0).to(at))[:, None]
        values = slopes = torch.zeros_like(t)
        for row in reversed(self.polynomials.index_select(0, first + interval).unbind(1)):
            slopes = slopes * t + values
            values = values * t + row
        return values, slopes * inside[:, None]


def tabulated(weights: Callable[[Tensor], Tensor], step: float, n_intervals: int) -> Tensor:
    """Return the polynomials of a :class:`WeightTable`, through the values at Chebyshev's points.

    Args:
        weights: From lengths (n,) float64, Å, to weights (n, n_weights) float64.
        step: Width of an interval, Å.
        n_intervals: Number of intervals, from length 0.

    Returns:
        (n_intervals, 6, n_weights) float64.
    """
    orders = torch.arange(ROWS, dtype=torch.float64)
    points = (1 - torch.cos(math.pi * (orders + 0.5) / ROWS)) / 2
    lengths = (torch.arange(n_intervals, dtype=torch.float64)[:, None] + points) * step
    values = weights(lengths.flatten()).unflatten(0, (n_intervals, ROWS))
    return torch.linalg.solve(points[:, None] ** orders, values).contiguous()
