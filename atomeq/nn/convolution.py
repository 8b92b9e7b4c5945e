"""The Clebsch-Gordan convolution of features by irreps, as NequIP and MACE send their messages."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from atomeq.nn.irreps import Features, Irrep, Irreps
from atomeq.ops.coupling.operations import cg_conv
from atomeq.ops.paths import Path
from atomeq.typing import EdgeIndex

# Of each irrep of x: its paths in the order of the weights, and the irrep that each gives.
IrrepPaths = dict[Irrep, list[tuple[Path, Irrep]]]


def convolution_paths(
    inputs: Irreps, wanted: Mapping[Irrep, int], lmax_edge: int, parity: bool
) -> IrrepPaths:
    """Return the paths of each irrep of x to the irreps that are wanted, in the order of weights.

    Harmonics of degree l have parity (-1)^l, or 1 for all without parity.
    """
    found: IrrepPaths = {}
    for entry in inputs:
        paths = [
            (Path(entry.l, l2, l3), Irrep(l3, entry.p * ((-1) ** l2 if parity else 1)))
            for l2 in range(lmax_edge + 1)
            for l3 in range(abs(entry.l - l2), entry.l + l2 + 1)
        ]
        if kept := [(path, irrep) for path, irrep in paths if irrep in wanted]:
            found[entry] = kept
    return found


def coupled_irreps(inputs: Irreps, paths: IrrepPaths) -> Irreps:
    """Return the irreps of the sums: channels of all paths to each, one path after the other."""
    coupled: Irreps = {}
    for entry, some in paths.items():
        for _, irrep in some:
            coupled[irrep] = coupled.get(irrep, 0) + inputs[entry]
    return coupled


def numbers_of_weights(inputs: Irreps, paths: IrrepPaths) -> list[int]:
    """Return how many weights an edge has for each irrep of x."""
    return [len(some) * inputs[entry] for entry, some in paths.items()]


def convolve(
    x: Features,
    weights: Iterable[Tensor],
    harmonics: Tensor,
    edge_index: EdgeIndex,
    paths: IrrepPaths,
) -> Features:
    """Return sums of messages on the targets; one irrep of x at a time, so none is padded.

    Args:
        x: Features of the atoms, irrep -> (n_atoms, 2l + 1, channels).
        weights: Of the edges for each irrep of x, (n_edges, n_paths * channels).
        harmonics: Spherical harmonics of the edges, (n_edges, n_sph).
        edge_index: Row 0 is the source, row 1 the target.
        paths: Of each irrep of x.

    Returns:
        irrep -> (n_atoms, 2l + 1, channels); the channels are those of :func:`coupled_irreps`.
    """
    parts: dict[Irrep, list[Tensor]] = {}
    for (entry, some), weight in zip(paths.items(), weights, strict=True):
        own = weight.unflatten(1, (len(some), -1))  # (n_edges, n_paths, C)
        rows = nn.functional.pad(x[entry], (0, 0, entry.l**2, 0))  # degrees below are not read
        numbers = [path for path, _ in some]
        sums = cg_conv(rows, harmonics, own, edge_index, rows.shape[0], numbers, output="paths")
        sizes = [2 * path.l3 + 1 for path in numbers]
        for (_, irrep), part in zip(some, sums.split(sizes, dim=1), strict=True):
            parts.setdefault(irrep, []).append(part)
    return {irrep: torch.cat(some, dim=-1) for irrep, some in parts.items()}
