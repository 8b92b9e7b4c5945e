"""The Clebsch-Gordan convolution of features by irreps, as NequIP and MACE send their messages."""

from collections.abc import Mapping

from torch import Tensor

from atomeq.nn.irreps import Features, Irrep, Irreps
from atomeq.ops.coupling.irreps_conv import irreps_conv
from atomeq.ops.coupling.weight_table import WeightTable
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


def number_of_weights(inputs: Irreps, paths: IrrepPaths) -> int:
    """Return how many weights an edge has: those of each irrep of x, path after path."""
    return sum(len(some) * inputs[entry] for entry, some in paths.items())


def convolve(
    x: Features,
    weights: Tensor | WeightTable,
    harmonics: Tensor,
    edge_index: EdgeIndex,
    paths: IrrepPaths,
) -> Features:
    """Return sums of messages on the targets.

    Args:
        x: Features of the atoms, irrep -> (n_atoms, 2l + 1, channels).
        weights: Of the edges, (n_edges, n_weights), or a table of them.
        harmonics: Spherical harmonics of the edges, (n_edges, n_sph).
        edge_index: Row 0 is the source, row 1 the target.
        paths: Of each irrep of x.

    Returns:
        irrep -> (n_atoms, 2l + 1, channels); the channels are those of :func:`coupled_irreps`.
    """
    sums = list(dict.fromkeys(irrep for some in paths.values() for _, irrep in some))
    routes = [
        (path, number, sums.index(irrep))
        for number, some in enumerate(paths.values())
        for path, irrep in some
    ]
    rows = [x[entry] for entry in paths]
    found = irreps_conv(rows, harmonics, weights, edge_index, rows[0].shape[0], routes)
    return dict(zip(sums, found, strict=True))
