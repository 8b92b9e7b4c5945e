"""How close atoms may come: below the distances of its data a potential only guesses.

Covalent radii from Cordero et al., Dalton Trans. 2832 (2008).
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.convert import element_symbols
from atomeq.traces import known_to_the_host

_RADII = """
    0.31 0.28 1.28 0.96 0.84 0.76 0.71 0.66 0.57 0.58 1.66 1.41 1.21 1.11 1.07 1.05 1.02 1.06 2.03
    1.76 1.70 1.60 1.53 1.39 1.39 1.32 1.26 1.24 1.32 1.22 1.22 1.20 1.19 1.20 1.20 1.16 2.20 1.95
    1.90 1.75 1.64 1.54 1.47 1.46 1.42 1.39 1.45 1.44 1.42 1.39 1.39 1.38 1.39 1.40 2.44 2.15 2.07
    2.04 2.03 2.01 1.99 1.98 1.98 1.96 1.94 1.92 1.92 1.89 1.90 1.87 1.87 1.75 1.70 1.62 1.51 1.44
    1.41 1.36 1.36 1.32 1.45 1.46 1.48 1.40 1.50 1.50 2.60 2.21 2.15 2.06 2.00 1.96 1.90 1.87 1.80
    1.69
"""
#: Å, by atomic number; H to Cm.
COVALENT_RADII = (0.0, *map(float, _RADII.split()))

#: Of the sum of covalent radii: what counts as short where nobody says how short the data are. Of
#: 400 sampled frames of MPtrj one has a shorter distance; triple bonds of N2 have 0.77.
SHORTEST = 0.65

#: Of a distance that is known: a potential reaches so far beyond it before anybody is told.
REACH = 0.97

_N = 119  # rows of tables by atomic number
_SYMBOLS = element_symbols(torch.arange(_N))
_NUMBERS = {symbol: number for number, symbol in enumerate(_SYMBOLS)}


class KnownDistances(nn.Module):
    """The shortest distance that a potential knows of each pair of elements.

    Args:
        shortest: Å, by pairs of symbols as ``Cu-O``; other pairs have :data:`SHORTEST`.

    Attributes:
        told: Whether a structure with a shorter one has come by; it is told of once.

    Raises:
        ValueError: A pair is none of two elements, or a distance is not positive.
    """

    limits: Tensor
    reach: Tensor

    def __init__(self, shortest: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.shortest = dict(shortest or {})
        radii = torch.full((_N,), COVALENT_RADII[-1])
        radii[: len(COVALENT_RADII)] = torch.tensor(COVALENT_RADII)
        limits = SHORTEST * (radii[:, None] + radii[None, :])
        for pair, distance in self.shortest.items():
            numbers = [_NUMBERS.get(symbol, 0) for symbol in pair.split("-")]
            if len(numbers) != 2 or 0 in numbers or not 0 < distance < math.inf:
                raise ValueError(f"{pair}: {distance!r} is no distance of two elements, as Cu-O")
            one, other = numbers
            limits[one, other] = limits[other, one] = distance
        self.register_buffer("limits", limits, persistent=False)
        self.register_buffer("reach", REACH * limits, persistent=False)
        self.told = False

    def limit(self, pair: str) -> float:
        """Return the shortest distance of a pair as ``Cu-O``, Å."""
        one, other = (_NUMBERS[symbol] for symbol in pair.split("-"))
        return float(self.limits[one, other])

    def widened(self, shortest: Mapping[str, float]) -> "KnownDistances":
        """Return what is known with further data, whose shortest distances are given, Å."""
        further = {pair: min(d, self.limit(pair)) for pair, d in shortest.items()}
        return KnownDistances(self.shortest | further)

    @torch.no_grad()
    def first_shorter(self, graph: AtomGraph) -> str | None:
        """Describe, the first time, the worst of the distances of a batch that are not known.

        Args:
            graph: With its edges, and perhaps with their lengths ``edge_lengths``.
        """
        if self.told or not graph.n_edges:
            return None
        lengths = graph.get("edge_lengths")
        if lengths is None:
            lengths = graph.edge_vectors().norm(dim=1)
        numbers, (source, target) = graph.atomic_numbers, graph.edge_index
        if known_to_the_host(numbers):  # most often none is shorter than the longest of them
            elements = numbers.unique()
            if not bool((lengths < self.reach[elements][:, elements].max()).any()):
                return None
        if not bool((lengths < self.reach[numbers[target], numbers[source]]).any()):
            return None
        self.told, limits = True, self.limits[numbers[target], numbers[source]]
        worst = int((lengths / limits).argmin())
        i, j = int(target[worst]), int(source[worst])
        one, other = (_SYMBOLS[int(numbers[k])] for k in (i, j))
        structure = int(graph.batch[i])
        first = int(graph.natoms[:structure].sum())
        return (
            f"structure {structure}: atoms {i - first} ({one}) and {j - first} ({other}) are "
            f"{float(lengths[worst]):.3f} Å apart, less than the {float(limits[worst]):.2f} Å from "
            f"which on {one}-{other} is known"
        )


def shortest_distances(graphs: Iterable[AtomGraph]) -> dict[str, float]:
    """Return the shortest distance of each pair of elements, Å, rounded down a little.

    Args:
        graphs: With their edges.
    """
    table = torch.full((_N * _N,), math.inf, dtype=torch.float64)
    for graph in graphs:
        if graph.n_edges:
            pairs = graph.atomic_numbers[graph.edge_index].sort(dim=0).values
            lengths = graph.edge_vectors().norm(dim=1).to(torch.float64)
            table.scatter_reduce_(0, pairs[0] * _N + pairs[1], lengths, "amin")
    found = {}
    for index in torch.nonzero(torch.isfinite(table)).flatten().tolist():
        one, other = (_SYMBOLS[z] for z in divmod(index, _N))
        found[f"{one}-{other}"] = math.floor(1000 * float(table[index]) - 1e-3) / 1000
    return found
