"""Which structures are copies: what a division into training and test must not part.

They count as copies up to rotation, reflection, order of atoms and repetition of the cell; those
that differ in charge or multiplicity are none.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import KDTree

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import RadiusGraph
from atomeq.graph.convert import StructureLike
from atomeq.graph.electrons import electrons_text

#: Å, how far fingerprints look.
RADIUS = 5.0
#: Of the components of two fingerprints: what rounding in files leaves, and vibrations exceed.
_SAME = 1e-4


class Kind(NamedTuple):
    """What copies have in common at least: composition, periodic directions, electrons."""

    composition: tuple[tuple[int, int], ...]
    periodic: int
    electrons: str


def kind_of(graph: AtomGraph) -> Kind:
    """Return the kind of one structure."""
    counts, periodic = Counter(graph.atomic_numbers.tolist()), int(graph.pbc.sum())
    divisor = int(np.gcd.reduce(list(counts.values()))) if periodic else 1
    composition = tuple(sorted((z, n // divisor) for z, n in counts.items()))
    return Kind(composition, periodic, electrons_text(graph))


def copies_among(structures: Iterable[StructureLike]) -> list[int]:
    """Return the number of the group of copies that each of some structures is in."""
    build, kinds, prints = RadiusGraph(RADIUS), [], []
    for one in structures:
        graph = build(one)
        kinds.append(kind_of(graph))
        prints.append(fingerprint(graph))
    return groups_of_copies(kinds, prints)


def groups_of_copies(
    kinds: Sequence[Kind], fingerprints: Sequence[NDArray[np.float64]]
) -> list[int]:
    """Return the number of the group of copies that each structure is in.

    Args:
        kinds: From :func:`kind_of`.
        fingerprints: From :func:`fingerprint`.
    """
    of_kind: dict[Kind, list[int]] = {}
    for k, kind in enumerate(kinds):
        of_kind.setdefault(kind, []).append(k)
    group: dict[int, int] = {}
    for members in of_kind.values():
        prints = np.array([fingerprints[k] for k in members])
        tree = KDTree(prints)
        for index, member in enumerate(members):
            near = tree.query_ball_point(prints[index], _SAME, p=np.inf)
            known = [group[members[other]] for other in near if members[other] in group]
            group[member] = min(known, default=len(group))
    return [group[k] for k in range(len(kinds))]


def fingerprint(graph: AtomGraph) -> NDArray[np.float64]:
    """Return numbers that rotations, reflections, permutations and supercells leave as they are.

    Of each atom the density of neighbours, plain and weighed by elements, at 16 distances; of these
    the mean and the mean square over atoms, and without a cell the radius of gyration, which sees
    what lies beyond the neighbours.

    Args:
        graph: One structure with edges up to :data:`RADIUS`.
    """
    centres = torch.linspace(0.8, RADIUS, 16, dtype=torch.float64)
    source, target = graph.edge_index
    lengths = graph.edge_vectors().to(torch.float64).norm(dim=1)
    width = float(centres[1] - centres[0])
    smooth = (1 + torch.cos(torch.pi * lengths.clamp(max=RADIUS) / RADIUS)) / 2
    density = torch.exp(-(((lengths[:, None] - centres) / width) ** 2)) * smooth[:, None]
    charge = graph.atomic_numbers.to(torch.float64)
    weighed = density * ((charge[source] + 2 * charge[target]) / 30)[:, None]
    atoms = torch.zeros(graph.n_atoms, 32, dtype=torch.float64)
    atoms.index_add_(0, target, torch.cat([density, weighed], dim=1))
    gyration = 0.0
    if not bool(graph.pbc.any()):
        gyration = float((graph.pos - graph.pos.mean(dim=0)).square().sum(dim=1).mean().sqrt())
    means = torch.cat([atoms.mean(dim=0), atoms.square().mean(dim=0)])
    return np.append(means.numpy(), gyration)
