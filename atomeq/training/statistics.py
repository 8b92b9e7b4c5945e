"""What is in the data, said before the first step: ranges, copies, leaks, outliers, distances.

Structures count as copies of each other up to rotation, reflection, order of atoms and repetition
of the cell, with the same charge and multiplicity: what a division into training and test must not
part.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from atomeq.data.copies import Kind, fingerprint, groups_of_copies, kind_of
from atomeq.graph.atom_graph import MIN_VOLUME, AtomGraph
from atomeq.graph.convert import element_symbols
from atomeq.graph.electrons import charge_of
from atomeq.potential.distances import COVALENT_RADII, SHORTEST
from atomeq.potential.references import least_squares_shift
from atomeq.units import GPA

#: eV/atom; copies whose energies differ by more contradict each other.
_CONTRADICTION = 1e-3
#: eV/Å per atom; a larger sum of forces is no rounding.
_NET_FORCE = 1e-3
#: Robust standard deviations of the energy per atom, and root mean squares of forces.
_FAR = 10.0
_LISTED = 5

#: Set -> where each structure came from, and the structure with its edges and labels.
LabelledSets: TypeAlias = Mapping[str, Iterable[tuple[str, AtomGraph]]]


@dataclass(frozen=True, eq=False)
class _Row:
    """What is kept of a structure."""

    place: str
    numbers: torch.Tensor
    kind: Kind
    charge: float  # e
    energy: float  # eV/atom
    force: float  # eV/Å, the longest
    net_force: float  # eV/Å per atom
    squared: float  # eV²/Å², sum over components
    stress: tuple[float, float]  # GPa, smallest and largest component
    volume: float  # Å³/atom
    fingerprint: NDArray[np.float64]
    shortest: dict[tuple[int, int], float]  # Å

    @property
    def n_atoms(self) -> int:
        return len(self.numbers)

    @property
    def isolated(self) -> bool:
        return self.n_atoms == 1 and not self.kind.periodic


def data_statistics(sets: LabelledSets) -> dict[str, Any]:
    """Return what is in sets of structures, as plain values that JSON can hold.

    Args:
        sets: Graphs have the edges of ``RadiusGraph(RADIUS)``; read once, one structure at a time.

    Returns:
        ``sets``, of each its sizes, elements, labels and ranges; and of all together ``references``
        (energies of elements by least squares), ``copies``, ``leakage``, ``outliers`` and
        ``distances`` (the shortest of each pair of elements, Å).
    """
    rows = {name: [_row(place, graph) for place, graph in items] for name, items in sets.items()}
    everything = [row for some in rows.values() for row in some]
    references, residuals = _references(everything)
    copies = _copies(rows)
    return {
        "sets": {name: _of_set(some) for name, some in rows.items()},
        "references": references,
        "copies": {name: _copies_within(name, some, copies) for name, some in rows.items()},
        "leakage": _leakage(rows, copies),
        "outliers": _outliers(everything, residuals),
        "distances": _distances(everything),
    }


def _row(place: str, graph: AtomGraph) -> _Row:
    n_atoms, nothing = graph.n_atoms, float("nan")
    forces = graph.get("forces", torch.full((n_atoms, 3), nothing))
    stress = graph.get("stress", torch.full((1, 3, 3), nothing))
    volume = float(graph.volume()[0])
    return _Row(
        place,
        graph.atomic_numbers,
        kind_of(graph),
        float(charge_of(graph)),
        float(graph.energy[0]) / n_atoms if "energy" in graph else nothing,
        float(forces.norm(dim=1).max()),
        float(forces.sum(dim=0).norm()) / n_atoms,
        float(forces.square().sum()),
        (float(stress.min()) / GPA, float(stress.max()) / GPA),
        volume / n_atoms if bool(graph.pbc.all()) and volume > MIN_VOLUME else nothing,
        fingerprint(graph),
        _shortest(graph),
    )


def _shortest(graph: AtomGraph) -> dict[tuple[int, int], float]:
    pairs, group = (
        graph.atomic_numbers[graph.edge_index].sort(dim=0).values.unique(dim=1, return_inverse=True)
    )
    lengths = graph.edge_vectors().norm(dim=1)
    least = lengths.new_full((pairs.shape[1],), float("inf"))
    least.scatter_reduce_(0, group, lengths, "amin")
    return {(z, y): d for (z, y), d in zip(pairs.T.tolist(), least.tolist(), strict=True)}


def _of_set(rows: list[_Row]) -> dict[str, Any]:
    sizes = np.array([row.n_atoms for row in rows])
    elements = Counter(z for row in rows for z in set(row.numbers.tolist()))
    components = 3 * sum(row.n_atoms for row in rows if np.isfinite(row.force))
    stresses = [row.stress for row in rows if np.isfinite(row.stress[0])]
    squared = np.nansum([row.squared for row in rows])
    return {
        "structures": len(rows),
        "atoms": {**_range([float(n) for n in sizes]), "total": int(sizes.sum())},
        "elements": {_symbol(z): n for z, n in sorted(elements.items())},
        "periodic_directions": {
            str(k): v for k, v in Counter(r.kind.periodic for r in rows).items()
        },
        "electrons": Counter(row.kind.electrons.strip() or "neutral" for row in rows),
        "labels": {
            "energy": sum(bool(np.isfinite(row.energy)) for row in rows),
            "forces": sum(bool(np.isfinite(row.force)) for row in rows),
            "stress": len(stresses),
        },
        "energy_per_atom_eV": _range([row.energy for row in rows]),
        "force_rms_eV_per_A": float(np.sqrt(squared / components)) if components else None,
        "force_max_eV_per_A": _range([row.force for row in rows]).get("max"),
        "net_force_max_eV_per_A_atom": _range([row.net_force for row in rows]).get("max"),
        "net_forces": sum(row.net_force > _NET_FORCE for row in rows),
        "stress_GPa": _range([part for pair in stresses for part in pair]),
        "volume_per_atom_A3": _range([row.volume for row in rows]),
    }


def _range(values: list[float]) -> dict[str, float]:
    known = np.array([value for value in values if np.isfinite(value)])
    if not len(known):
        return {}
    return {
        "min": float(known.min()),
        "median": float(np.median(known)),
        "max": float(known.max()),
    }


def _references(rows: list[_Row]) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """Return the fit of energies of elements, and what it leaves of each structure, eV/atom."""
    residuals = np.full(len(rows), np.nan)
    fitted = [k for k, row in enumerate(rows) if np.isfinite(row.energy) and not row.isolated]
    isolated = {_symbol(int(r.numbers[0])): r.energy for r in rows if r.isolated and not r.charge}
    if not fitted:
        return {"isolated_eV": isolated}, residuals
    some = [rows[k] for k in fitted]
    shift = least_squares_shift(
        [row.numbers for row in some], [row.energy * row.n_atoms for row in some]
    )
    for k in fitted:
        row = rows[k]
        residuals[k] = row.energy - sum(shift[z] for z in row.numbers.tolist()) / row.n_atoms
    counts = np.array([[int((row.numbers == z).sum()) for z in shift] for row in some])
    found = {
        "shift_eV": {_symbol(z): value for z, value in shift.items()},
        "left_rms_meV_per_atom": 1e3 * float(np.sqrt(np.nanmean(residuals**2))),
        "undetermined": len(shift) - int(np.linalg.matrix_rank(counts)),
        "isolated_eV": isolated,
    }
    return found, residuals


def _copies(rows: Mapping[str, list[_Row]]) -> dict[tuple[str, int], int]:
    """Return the number of the group of copies that each structure is in."""
    members = [(name, k) for name, some in rows.items() for k in range(len(some))]
    kinds = [row.kind for some in rows.values() for row in some]
    prints = [row.fingerprint for some in rows.values() for row in some]
    return dict(zip(members, groups_of_copies(kinds, prints), strict=True))


def _copies_within(
    name: str, rows: list[_Row], group: Mapping[tuple[str, int], int]
) -> dict[str, Any]:
    groups: dict[int, list[_Row]] = {}
    for k, row in enumerate(rows):
        groups.setdefault(group[name, k], []).append(row)
    several = [some for some in groups.values() if len(some) > 1]
    contradicting = [some for some in several if _spread(some) > _CONTRADICTION]
    examples = max(several, key=len, default=[])
    return {
        "distinct": len(groups),
        "example": [row.place for row in examples[:_LISTED]],
        "contradicting": [
            {"places": [row.place for row in some[:_LISTED]], "energy_eV_per_atom": _spread(some)}
            for some in contradicting[:_LISTED]
        ],
    }


def _spread(rows: list[_Row]) -> float:
    known = [row.energy for row in rows if np.isfinite(row.energy)]
    return max(known) - min(known) if known else 0.0


def _leakage(
    rows: Mapping[str, list[_Row]], group: Mapping[tuple[str, int], int]
) -> list[dict[str, Any]]:
    """Return, of each two sets, how many structures of the second have a copy in the first."""
    found = []
    names = list(rows)
    for first, name in enumerate(names):
        there = {group[name, k]: row.place for k, row in enumerate(rows[name])}
        for other in names[first + 1 :]:
            copied = [(k, row) for k, row in enumerate(rows[other]) if group[other, k] in there]
            if copied:
                k, row = copied[0]
                places = [there[group[other, k]], row.place]
                found.append({"sets": [name, other], "structures": len(copied), "example": places})
    return found


def _outliers(rows: list[_Row], residuals: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Return the structures furthest from the others, the worst of each kind first."""
    found = []
    known = residuals[np.isfinite(residuals)]
    if len(known):
        middle = float(np.median(known))
        width = 1.4826 * float(np.median(np.abs(known - middle)))
        far = np.nan_to_num(np.abs(residuals - middle))
        found += [
            (k, "energy less that of elements, eV/atom", residuals[k], middle)
            for k in _worst(far, _FAR * max(width, _CONTRADICTION))
        ]
    components = 3 * sum(row.n_atoms for row in rows if np.isfinite(row.force))
    if components:
        rms = float(np.sqrt(np.nansum([row.squared for row in rows]) / components))
        forces = np.nan_to_num([row.force for row in rows])
        found += [(k, "longest force, eV/Å", forces[k], rms) for k in _worst(forces, _FAR * rms)]
    return [
        {"place": rows[k].place, "what": what, "value": float(value), "typical": float(typical)}
        for k, what, value, typical in found
    ]


def _worst(values: NDArray[np.float64], limit: float) -> list[int]:
    return [int(k) for k in np.argsort(-values)[:_LISTED] if values[k] > limit]


def _distances(rows: list[_Row]) -> dict[str, dict[str, Any]]:
    """Return the shortest distance of each pair of elements, the shortest for its radii first."""
    best: dict[tuple[int, int], tuple[float, str]] = {}
    for row in rows:
        for pair, length in row.shortest.items():
            if length < best.get(pair, (np.inf, ""))[0]:
                best[pair] = length, row.place

    def of_radii(pair: tuple[int, int]) -> float:
        last = COVALENT_RADII[-1]
        radii = (COVALENT_RADII[z] if z < len(COVALENT_RADII) else last for z in pair)
        return best[pair][0] / sum(radii)

    return {
        "-".join(map(_symbol, pair)): {
            "shortest_A": best[pair][0],
            "of_covalent_radii": of_radii(pair),
            "short": of_radii(pair) < SHORTEST,
            "place": best[pair][1],
        }
        for pair in sorted(best, key=of_radii)
    }


def _symbol(number: int) -> str:
    return element_symbols(torch.tensor([number]))[0]
