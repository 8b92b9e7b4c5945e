"""A Clebsch-Gordan product as e3nn and its relatives write it: irreps, instructions, mul_ir rows.

The adapters' border: our features are (*, n_sph, channels), the channel running fastest, which
those libraries call ir_mul; in e3nn's own layout, mul_ir, it runs slowest within a degree.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from atomeq.ops.paths import Path
from atomeq.ops.specification import Mode

Instruction = tuple[int, int, int, str, bool]


class Problem(NamedTuple):
    """The arguments that e3nn's ``o3.TensorProduct`` and OpenEquivariance's ``TPProblem`` share.

    Both default to ``component`` irreps and ``element`` paths, the normalisation of
    :func:`~atomeq.ops.coupling.operations.tensor_product`. All irreps are written even: our paths
    are chosen before, and these libraries refuse only what parity forbids.
    """

    irreps1: str
    irreps2: str
    irreps_out: str
    instructions: list[Instruction]


def product_problem(
    paths: tuple[Path, ...],
    degrees: tuple[int, int],
    channels: tuple[int, int, int],
    mode: Mode,
    *,
    stacked: bool,
    weighted: bool,
) -> Problem:
    """Write a product down in e3nn's terms.

    Args:
        paths: Which degrees couple, in the order of the weights.
        degrees: Highest degree of x and of y.
        channels: Of x, of y (1 in mode uvu) and of the output.
        mode: How channels couple.
        stacked: Each path has an output of its own; else paths of equal l3 share one.
        weighted: Whether paths have weights.
    """
    slots = [number if stacked else path.l3 for number, path in enumerate(paths)]
    return Problem(
        _irreps(range(degrees[0] + 1), channels[0]),
        _irreps(range(degrees[1] + 1), channels[1]),
        _irreps(output_degrees(paths, stacked=stacked), channels[2]),
        [(p.l1, p.l2, slot, mode, weighted) for p, slot in zip(paths, slots, strict=True)],
    )


def output_degrees(paths: tuple[Path, ...], *, stacked: bool) -> list[int]:
    """Return the degree of each block of rows of the output."""
    if stacked:
        return [path.l3 for path in paths]
    return list(range(max(path.l3 for path in paths) + 1))


def output_channels(x: Tensor, weights: Tensor | None, mode: Mode) -> int:
    """Return the channels of the product: those of x, but in mode uvw the last axis of weights."""
    return weights.shape[-1] if mode == "uvw" and weights is not None else x.shape[-1]


def highest_degree(n_sph: int) -> int:
    """Return lmax of (lmax + 1)^2 rows; rows beyond the last full degree take no part."""
    return math.isqrt(n_sph) - 1


def to_mul_ir(x: Tensor) -> Tensor:
    """Rewrite (*, n_sph, channels) as e3nn's (*, n_sph * channels)."""
    degrees = range(highest_degree(x.shape[-2]) + 1)
    return torch.cat([x[..., l * l : (l + 1) ** 2, :].mT.flatten(-2) for l in degrees], dim=-1)


def from_mul_ir(flat: Tensor, degrees: list[int], channels: int) -> Tensor:
    """Rewrite e3nn's features, blocks of the given degrees, as (*, rows, channels)."""
    parts = flat.split([(2 * l + 1) * channels for l in degrees], dim=-1)
    return torch.cat([part.unflatten(-1, (channels, -1)).mT for part in parts], dim=-2)


def _irreps(degrees: list[int] | range, channels: int) -> str:
    return " + ".join(f"{channels}x{l}e" for l in degrees)
