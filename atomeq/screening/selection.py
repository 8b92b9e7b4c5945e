"""select(): from a pool of structures to those worth labelling, without copies.

The pool is looked at in the order of the structures' hashes, which are their ids: the same pool in
another order or in other files gives the same choice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
from ase import Atoms

from atomeq.data.copies import RADIUS, fingerprint, groups_of_copies, kind_of
from atomeq.graph.builders import RadiusGraph
from atomeq.potential.potential import Potential
from atomeq.potential.selection import (
    batches_of,
    d_optimal,
    farthest_points,
    features_of,
    spread_of,
)
from atomeq.screening.identity import content_hash

By: TypeAlias = Literal["d_optimal", "farthest", "spread", "random"]
CRITERIA: tuple[By, ...] = get_args(By)

_UNIT = {
    "d_optimal": "log det",
    "farthest": "distance of features",
    "spread": "eV/Å",
    "random": "order",
}


@dataclass(frozen=True)
class Chosen:
    """A structure that was chosen.

    Attributes:
        index: In the pool as it was given.
        id: Hash of its content, as in a screening.
        score: What it was chosen for, in :attr:`Selection.unit`.
    """

    index: int
    id: str
    score: float


@dataclass
class Selection:
    """What came of a pool.

    Attributes:
        by: The criterion.
        unit: Of the scores.
        n_pool: Structures that were given.
        chosen: In the order of choice, the most telling first.
        copies: What was left out, by index in the pool: the id of what it repeats, or ``training``.
    """

    by: By
    unit: str
    n_pool: int
    chosen: list[Chosen] = field(default_factory=list)
    copies: dict[int, str] = field(default_factory=dict)


def select(
    pool: Sequence[Atoms],
    number: int,
    potential: Potential,
    *,
    by: By = "d_optimal",
    training: Sequence[Atoms] = (),
    seed: int = 0,
    observe: Callable[[], None] | None = None,
) -> Selection:
    """Choose the structures of a pool whose labels would tell a potential most.

    Copies (rotated, reflected, reordered or repeated cells too) count once, and copies of training
    structures not at all.

    Args:
        pool: Structures; labels, if any, are not looked at.
        number: How many to choose, at most.
        potential: Of a committee the features are those of its first member.
        by: ``d_optimal`` enlarges the volume of last-layer features, ``farthest`` their reach,
            ``spread`` takes what a committee disagrees on or a calibrated potential doubts most,
            and ``random`` is what the others are measured by.
        training: What the potential was trained on: to be far from, for the first two.
        seed: Of ``random``.
        observe: Called for each structure that is looked at.

    Raises:
        ValueError: An unknown criterion, or a potential that offers no features or spread.

    Example:
        >>> chosen = select(pool, 50, load_potential("cu-pbe"))  # doctest: +SKIP
        >>> [pool[one.index] for one in chosen.chosen]  # doctest: +SKIP
    """
    if by not in CRITERIA:
        raise ValueError(f"by is one of {', '.join(CRITERIA)}, not {by!r}")
    if number < 1:
        raise ValueError(f"the number to choose is 1 or more, not {number}")
    ids = [content_hash(atoms) for atoms in pool]
    order = sorted(range(len(pool)), key=lambda k: (ids[k], k))
    found = Selection(by, _UNIT[by], len(pool))
    kept = _without_copies(pool, order, ids, training, found)
    batches = batches_of(potential, (pool[k] for k in kept), observe)
    if by == "random":
        shuffled = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))
        ranked = [(k, float(place)) for place, k in enumerate(shuffled.tolist()[:number])]
    elif by == "spread":
        doubts = spread_of(potential, batches)
        ranked = sorted(enumerate(doubts), key=lambda pair: -pair[1])[:number]
    else:
        greedy = d_optimal if by == "d_optimal" else farthest_points
        features = features_of(potential, batches)
        known = features_of(potential, batches_of(potential, training))
        ranked = greedy(features, number, known) if kept else []
    found.chosen = [Chosen(kept[k], ids[kept[k]], score) for k, score in ranked]
    return found


def _without_copies(
    pool: Sequence[Atoms],
    order: Sequence[int],
    ids: Sequence[str],
    training: Sequence[Atoms],
    found: Selection,
) -> list[int]:
    """Return what of the pool is neither in the training set nor there already; tell the rest."""
    build = RadiusGraph(RADIUS)
    kinds, prints = [], []
    for atoms in (*training, *(pool[k] for k in order)):
        graph = build(atoms)
        kinds.append(kind_of(graph))
        prints.append(fingerprint(graph))
    groups = groups_of_copies(kinds, prints)
    first: dict[int, str] = dict.fromkeys(groups[: len(training)], "training")
    kept = []
    for k, group in zip(order, groups[len(training) :], strict=True):
        if group in first:
            found.copies[k] = first[group]
        else:
            first[group] = ids[k]
            kept.append(k)
    return kept
