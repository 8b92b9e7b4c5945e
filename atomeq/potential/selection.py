"""Which structures tell a potential most: by the features of their atoms, or by its own doubt.

Both greedy methods take rows of features of atoms, those of structures that are known already
included, and return an order that does not depend on labels: none are needed to choose.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.rewiring import in_batches
from atomeq.ops.segment.operations import segment_mean
from atomeq.potential.potential import Potential
from atomeq.potential.uncertainty import atom_features

_RIDGE = 1e-6  # of the mean variance of a feature: directions below it are rounding of float32
_MAX_EDGES = 20_000  # of a batch


def batches_of(
    potential: Potential,
    structures: Iterable[Any],
    observe: Callable[[], None] | None = None,
) -> Iterator[AtomGraph]:
    """Return structures as batches with edges, in their order.

    Args:
        potential: Builds the graphs.
        structures: As :meth:`~atomeq.potential.predictor.Predictor.build_graph` takes them.
        observe: Called for each structure.
    """

    def graphs() -> Iterator[AtomGraph]:
        for structure in structures:
            yield potential.build_graph(structure)
            if observe is not None:
                observe()

    return in_batches(graphs(), _MAX_EDGES)


def features_of(potential: Potential, batches: Iterable[AtomGraph]) -> list[Tensor]:
    """Return the last-layer features of the atoms of each structure, each (n_atoms, n_features)."""
    found: list[Tensor] = []
    for graph in batches:
        found += atom_features(potential, graph).cpu().split(graph.natoms.tolist())
    return found


def spread_of(potential: Potential, batches: Iterable[AtomGraph]) -> list[float]:
    """Return how far off a potential may be: rms of its forces' uncertainty, eV/Å, by structure.

    Raises:
        ValueError: It does not know: it is neither a committee nor calibrated.
    """
    found: list[float] = []
    for graph in batches:
        doubt = potential(graph, ("forces_uncertainty",))["forces_uncertainty"]
        mean = segment_mean(doubt.detach().square()[:, None], graph.batch, graph.n_graphs)
        found += mean.sqrt().flatten().tolist()
    return found


def farthest_points(
    features: Sequence[Tensor], number: int, known: Sequence[Tensor] = ()
) -> list[tuple[int, float]]:
    """Choose, one after another, the structure with the atom farthest from all atoms so far.

    Args:
        features: Of the atoms of each structure, each (n_atoms, n_features).
        number: How many to choose.
        known: The same of structures that are not to be chosen.

    Returns:
        Indices in the order of choice with the distance each had. With nothing known the first is
        the one whose mean is farthest from that of all.
    """
    rows = torch.cat(list(features))
    sizes = [len(one) for one in features]
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    nearest = torch.full((len(rows),), math.inf, dtype=rows.dtype)
    for other in known:
        nearest = torch.minimum(nearest, _to_nearest(rows, other))
    chosen: list[tuple[int, float]] = []
    left = torch.ones(len(features), dtype=torch.bool)
    for _ in range(min(number, len(features))):
        if not known and not chosen:
            means = torch.stack([one.mean(dim=0) for one in features])
            scores = (means - rows.mean(dim=0)).norm(dim=1)
        else:
            scores = torch.stack([part.max() for part in nearest.split(sizes)])
        best = int(torch.where(left, scores, -1.0).argmax())
        chosen.append((best, float(scores[best])))
        left[best] = False
        own = rows[starts[best] : starts[best + 1]]
        nearest = torch.minimum(nearest, _to_nearest(rows, own))
    return chosen


def d_optimal(
    features: Sequence[Tensor], number: int, known: Sequence[Tensor] = ()
) -> list[tuple[int, float]]:
    """Choose, one after another, what enlarges the volume of the known features most.

    That is log det(ς² + Σ f fᵀ) over all atoms so far, whose inverse is the covariance of the last
    layer's weights. What a structure would add only falls as others are chosen, so that it is
    computed again for those alone that come out on top: the order is the greedy one.

    Args:
        features: Of the atoms of each structure, each (n_atoms, n_features).
        number: How many to choose.
        known: The same of structures that are not to be chosen.

    Returns:
        Indices in the order of choice with what each added to the logarithm.
    """
    everything = torch.cat([*features, *known])
    eye = torch.eye(everything.shape[1], dtype=everything.dtype)
    information = _RIDGE * everything.square().mean().clamp(min=1e-300) * eye
    for one in known:
        information = information + one.T @ one
    lower = torch.linalg.cholesky(information)
    heap = [(-_gain(lower, one), k, 0) for k, one in enumerate(features)]
    heapq.heapify(heap)
    chosen: list[tuple[int, float]] = []
    while heap and len(chosen) < number:
        negative, k, seen = heapq.heappop(heap)
        if seen < len(chosen):
            heapq.heappush(heap, (-_gain(lower, features[k]), k, len(chosen)))
            continue
        chosen.append((k, -negative))
        information = information + features[k].T @ features[k]
        lower = torch.linalg.cholesky(information)
    return chosen


def _gain(lower: Tensor, rows: Tensor) -> float:
    """Return log det(1 + F A⁻¹ Fᵀ) of A = L Lᵀ."""
    whitened = torch.linalg.solve_triangular(lower, rows.T, upper=False)  # (n_features, n_atoms)
    small = whitened if whitened.shape[1] <= whitened.shape[0] else whitened.T
    gram = small.T @ small
    return float(torch.logdet(gram + torch.eye(len(gram), dtype=gram.dtype)))


def _to_nearest(rows: Tensor, others: Tensor) -> Tensor:
    return torch.cat([torch.cdist(part, others).amin(dim=1) for part in rows.split(4096)])
