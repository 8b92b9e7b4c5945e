"""Copies: structures that differ only in the cell, the order of atoms and small displacements.

Candidates for a comparison share the reduced formula and have nearly the same volume per atom and
neighbour distances, which hardly change with the displacements that are tolerated. A bucket by
space group, as is usual, would tear copies apart: noise of 1e-3 Å takes a crystal to P1. Those
that are left pymatgen's StructureMatcher compares, and for molecules the distances between all
atoms. The structures compared with are kept in the ledger, not in memory. Mirror images count as
the same: their energies are.
"""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.geometry import minkowski_reduce
from numpy.typing import NDArray
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from atomeq.graph.electrons import electrons_text
from atomeq.graph.neighbors import neighbor_list_with_lengths
from atomeq.screening.ledger import Ledger
from atomeq.screening.steps import Dedupe
from atomeq.screening.symmetry import primitive_cell

_NEIGHBORS = 6  # distances of every atom that go into the fingerprint
_VACUUM = 10.0  # Å, along directions that are not periodic
_REACH = 3.0  # Å; the neighbour search begins there and goes further where it finds too few
_FARTHEST = 25.0


class Matcher:
    """Finds the structure of which another is a copy.

    Args:
        step: Tolerances.
        ledger: Keeps the structures that later ones are compared with.
    """

    def __init__(self, step: Dedupe, ledger: Ledger) -> None:
        self._step, self._ledger = step, ledger

    def original_of(self, identifier: str, atoms: Atoms) -> str | None:
        """Return the hash of an earlier structure that is the same; None makes this one such.

        Args:
            identifier: Of this structure.
            atoms: The structure, which must be valid.
        """
        if self._ledger.has_representative(identifier):
            return None  # it was first in a run that was interrupted
        primitive = _primitive(atoms, self._step.tolerance)
        mark = _fingerprint(primitive)
        size = float(mark[0])
        stretch, swelling = _strains(self._step, primitive)
        margin = swelling * abs(size) + 1e-9
        bucket = bucket_of(atoms)
        for other, stored in self._ledger.representatives(bucket, size - margin, size + margin):
            representative, other_mark = _load(stored)
            if self._near(mark, other_mark, stretch) and self._same(primitive, representative):
                return other
        self._ledger.represent(identifier, bucket, size, _dump(primitive, mark))
        return None

    def are_close(self, atoms: Atoms, other: Atoms) -> bool:
        """Return whether crystals are copies atom by atom, as they are given.

        It takes a hundredth of the time of :meth:`original_of`, whose way over primitive cells also
        finds copies of other cells and orders.
        """
        if not (
            atoms.pbc.all() and other.pbc.all() and np.array_equal(atoms.numbers, other.numbers)
        ):
            return False
        cells = np.stack([atoms.cell.array, other.cell.array])
        lengths = np.linalg.norm(cells, axis=2, keepdims=True)
        if np.abs(lengths[0] / lengths[1] - 1).max() > self._step.length:
            return False
        unit = cells / lengths
        angles = np.degrees(np.arccos((unit @ unit.transpose(0, 2, 1)).clip(-1, 1)))
        if np.abs(angles[0] - angles[1]).max() > self._step.angle:
            return False
        # Against the first atom none is near to where the difference of two images turns over.
        scaled = np.stack([atoms.positions, other.positions]) @ np.linalg.inv(cells)
        shifts = scaled[0] - scaled[1]
        shifts -= shifts[0]
        moved = (shifts - np.round(shifts)) @ cells[1]
        return bool(
            np.linalg.norm(moved - moved.mean(axis=0), axis=1).max() <= self._step.tolerance
        )

    def remember(self, identifier: str, atoms: Atoms) -> None:
        """Keep a structure for comparison without looking for what it may be a copy of."""
        if not self._ledger.has_representative(identifier):
            primitive = _primitive(atoms, self._step.tolerance)
            mark = _fingerprint(primitive)
            bucket = bucket_of(atoms)
            self._ledger.represent(identifier, bucket, float(mark[0]), _dump(primitive, mark))

    def _near(self, mark: NDArray[np.float64], other: NDArray[np.float64], stretch: float) -> bool:
        if mark.shape != other.shape:
            return False
        # Both ends of a distance move, and another cell moves them all. What is not known of one
        # of the two, NaN, tells nothing.
        allowed = 2 * self._step.tolerance + stretch * np.abs(mark[1:])
        return not bool((np.abs(mark[1:] - other[1:]) > allowed).any())

    def _same(self, atoms: Atoms, other: Atoms) -> bool:
        if not atoms.pbc.any():
            return self._same_molecule(atoms, other)
        return self._compare(atoms, other, primitive=len(atoms) != len(other))

    def _same_molecule(self, atoms: Atoms, other: Atoms) -> bool:
        if len(atoms) != len(other):
            return False
        difference = np.abs(_all_distances(atoms) - _all_distances(other))
        return bool(difference.max(initial=0.0) <= 2 * self._step.tolerance)  # both ends move

    def _compare(self, atoms: Atoms, other: Atoms, *, primitive: bool) -> bool:
        # The matcher measures displacements in units of the length per atom.
        first, second = _structure(atoms), _structure(other)
        per_atom = (first.volume / len(first)) ** (1 / 3)
        matcher = StructureMatcher(
            ltol=self._step.length,
            stol=self._step.tolerance / per_atom,
            angle_tol=self._step.angle,
            primitive_cell=primitive,
            scale=False,
        )
        return bool(matcher.fit(first, second))


def bucket_of(atoms: Atoms) -> str:
    """Return what copies share to the letter: reduced formula, periodic directions, electrons."""
    numbers, counts = np.unique(atoms.numbers, return_counts=True)
    divisor = int(np.gcd.reduce(counts)) if len(counts) else 1
    formula = (f"{z}:{count // divisor}" for z, count in zip(numbers, counts, strict=True))
    return f"{' '.join(formula)} {int(atoms.pbc.sum())}{electrons_text(atoms)}"


def _primitive(atoms: Atoms, tolerance: float) -> Atoms:
    """Return the primitive cell within a tolerance, Å; a molecule as it is."""
    if not atoms.pbc.all():
        return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell.array, pbc=atoms.pbc)
    found = primitive_cell(atoms, tolerance)
    if found is None:
        return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell.array, pbc=True)
    return found


def _strains(step: Dedupe, atoms: Atoms) -> tuple[float, float]:
    """Return the largest share by which a distance and the volume differ between equal cells.

    Lengths and angles of a reduced cell change its metric; the strain is linear in them to first
    order, so that it is largest at a corner of what is allowed.
    """
    if not atoms.pbc.any():
        return step.length, 3 * step.length
    cell, _ = minkowski_reduce(_boxed(atoms).cell.array)
    unit = cell / np.linalg.norm(cell, axis=1)[:, None]
    metric = unit @ unit.T
    corners = np.array(list(itertools.product((-1.0, 1.0), repeat=6)))
    longer = step.length * corners[:, :3]
    change = (longer[:, :, None] + longer[:, None, :]) * metric  # (64, 3, 3)
    for k, (i, j) in enumerate(((0, 1), (0, 2), (1, 2))):
        sine = np.sqrt(max(0.0, 1 - metric[i, j] ** 2))
        change[:, i, j] += np.radians(step.angle) * sine * corners[:, 3 + k]
        change[:, j, i] = change[:, i, j]
    root = np.linalg.inv(np.linalg.cholesky(metric))
    strains = root @ change @ root.T / 2
    swelling = float(np.abs(np.trace(strains, axis1=1, axis2=2)).max())
    return float(np.abs(np.linalg.eigvalsh(strains)).max()), max(3 * step.length, swelling)


def _fingerprint(atoms: Atoms) -> NDArray[np.float64]:
    """Return what copies share whatever their cell: a size, and distances between neighbours.

    The size is the volume per atom, Å³, of a molecule the number of its atoms. Of the distances to
    the nearest neighbours there are the mean, least and largest over the atoms of each element;
    then come the shortest distances between any two elements, NaN where they are no neighbours. No
    mark changes more than a distance can: order statistics move no further than what they order.
    """
    size = atoms.get_volume() / len(atoms) if atoms.pbc.all() else float(len(atoms))
    edge_index, lengths = _neighbors(atoms)
    nearest = _nearest(edge_index[1], lengths, len(atoms))
    elements, kinds = np.unique(atoms.numbers, return_inverse=True)
    marks = [np.array([size])]
    for kind in range(len(elements)):
        of_kind = nearest[kinds == kind]
        marks += [of_kind.mean(axis=0), of_kind.min(axis=0), of_kind.max(axis=0)]
    shortest = np.full((len(elements), len(elements)), np.inf)
    np.minimum.at(shortest, tuple(np.sort(kinds[edge_index], axis=0)), lengths)
    shortest = shortest[np.triu_indices(len(elements))]
    marks.append(np.where(np.isfinite(shortest), shortest, np.nan))
    return np.concatenate(marks)


def _neighbors(atoms: Atoms) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return edges (2, n_edges) and their lengths, Å, so many that every atom has its nearest."""
    wanted = _NEIGHBORS if atoms.pbc.any() else min(_NEIGHBORS, len(atoms) - 1)
    reach = _REACH
    while True:
        edges, lengths = neighbor_list_with_lengths(
            atoms.positions, atoms.cell.array, atoms.pbc, reach
        )
        counts = np.bincount(edges.edge_index[1], minlength=len(atoms))
        if counts.min() >= wanted or reach > _FARTHEST:
            return edges.edge_index, lengths
        reach *= 1.5


def _nearest(
    centers: NDArray[np.int64], lengths: NDArray[np.float64], n_atoms: int
) -> NDArray[np.float64]:
    """Return the sorted distances of every atom's nearest neighbours, (n_atoms, 6), Å.

    Where there are fewer, as in small molecules, the rest is zero.
    """
    table = np.zeros((n_atoms, _NEIGHBORS))
    order = np.lexsort((lengths, centers))
    counts = np.bincount(centers, minlength=n_atoms)
    starts = np.concatenate([[0], np.cumsum(counts)])[:-1]
    ranks = np.arange(len(order)) - starts[centers[order]]
    inside = ranks < _NEIGHBORS
    table[centers[order][inside], ranks[inside]] = lengths[order][inside]
    return table


def _all_distances(atoms: Atoms) -> NDArray[np.float64]:
    """Return the distances of all pairs, sorted within each pair of elements."""
    first, second = np.triu_indices(len(atoms), k=1)
    low = np.minimum(atoms.numbers[first], atoms.numbers[second])
    high = np.maximum(atoms.numbers[first], atoms.numbers[second])
    lengths = np.linalg.norm(atoms.positions[first] - atoms.positions[second], axis=1)
    return lengths[np.lexsort((lengths, high, low))]


def _boxed(atoms: Atoms) -> Atoms:
    if atoms.pbc.all():
        return atoms
    boxed = atoms.copy()
    boxed.center(vacuum=_VACUUM, axis=np.flatnonzero(~atoms.pbc).tolist())
    return boxed


def _structure(atoms: Atoms) -> Structure:
    """Return pymatgen's structure; directions that are not periodic get some vacuum."""
    boxed = _boxed(atoms)
    return Structure(
        Lattice(boxed.cell.array), boxed.numbers.tolist(), boxed.get_scaled_positions()
    )


def _dump(atoms: Atoms, mark: NDArray[np.float64]) -> bytes:
    document = {
        "numbers": atoms.numbers.tolist(),
        "positions": atoms.positions.tolist(),
        "cell": atoms.cell.array.tolist(),
        "pbc": atoms.pbc.tolist(),
        "mark": mark.tolist(),
    }
    return json.dumps(document).encode()


def _load(stored: bytes) -> tuple[Atoms, NDArray[np.float64]]:
    document: dict[str, Any] = json.loads(stored)
    mark: Sequence[float] = document.pop("mark")
    return Atoms(**document), np.array(mark)
