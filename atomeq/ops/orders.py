"""Which coefficients (l, m) there are and in which order: by degree, or by order in edge frames."""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from atomeq.ops.tables import constant_table


def coefficient_index(lmax: int, mmax: int) -> list[int]:
    """Return the l-primary rows l*l + l + m with |m| <= mmax."""
    check_orders(lmax, mmax)
    orders = [(l, m) for l in range(lmax + 1) for m in range(-min(l, mmax), min(l, mmax) + 1)]
    return [l * l + l + m for l, m in orders]


def m_primary_order(lmax: int, mmax: int) -> list[int]:
    """Return the l-primary rows sorted by order: m = 0 (l ascending), then +1, -1, +2, -2, ..."""
    check_orders(lmax, mmax)
    rows = [l * l + l for l in range(lmax + 1)]
    for m in range(1, mmax + 1):
        rows += [l * l + l + m for l in range(m, lmax + 1)]
        rows += [l * l + l - m for l in range(m, lmax + 1)]
    return rows


@constant_table
def m_primary_rows(lmax: int, mmax: int) -> Tensor:
    """Return :func:`m_primary_order` as a tensor."""
    return torch.from_numpy(np.array(m_primary_order(lmax, mmax)))


@constant_table
def row_degrees(lmax: int, mmax: int) -> Tensor:
    """Return the degree l of each m-primary row."""
    return torch.from_numpy(np.sqrt(m_primary_order(lmax, mmax)).astype(np.int64))


@constant_table
def radial_rows(lmax: int, mmax: int) -> Tensor:
    """Return, for each m-primary row, the number of its (l, |m|), m ascending: +m and -m share."""
    numbers, start = list(range(lmax + 1)), lmax + 1
    for m in range(1, mmax + 1):
        numbers += 2 * list(range(start, start + lmax - m + 1))
        start += lmax - m + 1
    return torch.from_numpy(np.array(numbers))


@functools.cache
def orders_of(n_rows: int, n_sph: int) -> tuple[int, int]:
    """Return lmax and mmax of Wigner matrices with so many rows and columns."""
    lmax = math.isqrt(n_sph) - 1
    return lmax, next(m for m in range(lmax + 1) if len(m_primary_order(lmax, m)) == n_rows)


def check_orders(lmax: int, mmax: int) -> None:
    """Refuse orders above the degree with a ValueError."""
    if not 0 <= mmax <= lmax:
        raise ValueError(f"mmax must lie between 0 and lmax; got mmax={mmax}, lmax={lmax}")
