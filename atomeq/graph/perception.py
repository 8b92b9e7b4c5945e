"""Molecules from coordinates: which atoms are bonded, and by bonds of which order.

RDKit's own search goes through combinations of valences, which become many; here bond orders are
found by maximum matchings, and RDKit sanitises the result.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atomeq.graph.neighbors import neighbor_list

_BOND_FACTOR = 1.3  # of the sum of covalent radii
_LONGEST_BOND = 3.5  # Å; no pair of main-group elements is bonded beyond
_MAX_VALENCE = {15: (3, 5), 16: (2, 4, 6), 34: (2, 4, 6)}


def import_chem(module: str = "rdkit.Chem") -> Any:
    """Import a module of RDKit.

    Raises:
        ImportError: RDKit is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            "hyperedges of molecules need RDKit; install it with `pip install atomeq[chemistry]`"
        ) from error


@dataclass
class _Valences:
    """Bond orders as they are filled in; ``free`` counts valences each atom has left."""

    free: NDArray[np.int64]
    orders: dict[tuple[int, int], int]
    neighbors: dict[int, list[int]]
    numbers: list[int]
    charges: dict[int, int] = field(default_factory=dict)

    def raise_order(self, i: int, j: int) -> None:
        self.orders[min(i, j), max(i, j)] += 1


def molecule_from_coordinates(
    atomic_numbers: Sequence[int], positions: Any, *, charge: int = 0, name: str | None = None
) -> Any:
    """Return a sanitised RDKit molecule of atoms in space, all hydrogen explicit.

    Atoms closer than 1.3 times the sum of their covalent radii are bonded. Valences that bonds
    leave free are paired along bonds, as many as possible and the shortest first; what a neutral
    form cannot pair becomes a pair of charges (nitro groups, azides, isocyanides) or an ion.

    Args:
        atomic_numbers: (n_atoms,).
        positions: (n_atoms, 3), Å.
        charge: Total charge, e.
        name: Of the structure, for messages.

    Raises:
        ValueError: An element has no fixed valence, or the valences make no sense.
        ImportError: RDKit is not installed.
    """
    chem = import_chem()
    table = chem.GetPeriodicTable()
    numbers = [int(z) for z in atomic_numbers]
    label = f"{name}: " if name else ""
    for z in set(numbers):
        if table.GetDefaultValence(z) < 0:
            raise ValueError(
                f"{label}bonds of {table.GetElementSymbol(z)} cannot be perceived, it has no fixed "
                'valence; give the hyperedges in atoms.info["hyperedges"]'
            )
    radii = np.array([table.GetRcovalent(z) for z in numbers])
    defaults = [table.GetDefaultValence(z) for z in numbers]
    room = [
        _MAX_VALENCE.get(z, (v + (z in (7, 8)),))[-1]
        for z, v in zip(numbers, defaults, strict=True)
    ]
    bonds = _bonded(np.asarray(positions, dtype=np.float64).reshape(-1, 3), radii, room)
    valences = _start(numbers, list(bonds), defaults)
    _pair(valences, bonds)
    if _expand_octets(valences):
        _pair(valences, bonds)
    _separate_charges(valences, bonds)
    _ionise(valences, charge)
    return _assemble(chem, valences, label)


def _bonded(
    positions: NDArray[np.float64], radii: NDArray[np.float64], room: list[int]
) -> dict[tuple[int, int], float]:
    """Return bonded pairs i < j and their length relative to the sum of radii, the shortest first.

    An atom takes no more bonds than it has room for: across strained rings atoms are close too.
    """
    edges = neighbor_list(positions, np.zeros((3, 3)), np.zeros(3, dtype=bool), _LONGEST_BOND)
    j, i = edges.edge_index
    lengths = np.linalg.norm(positions[j] - positions[i], axis=1)
    # Rounded, so that mirror images and turned copies pair their electrons alike.
    relative = np.round(lengths / (radii[i] + radii[j]), 6)
    close = np.flatnonzero((i < j) & (relative < _BOND_FACTOR))
    left, bonds = list(room), {}
    for k in close[np.argsort(relative[close], kind="stable")]:
        first, second = int(i[k]), int(j[k])
        if left[first] and left[second]:
            left[first] -= 1
            left[second] -= 1
            bonds[first, second] = float(relative[k])
    return dict(sorted(bonds.items()))


def _start(numbers: list[int], bonds: list[tuple[int, int]], defaults: list[int]) -> _Valences:
    neighbors: dict[int, list[int]] = {i: [] for i in range(len(numbers))}
    for i, j in bonds:
        neighbors[i].append(j)
        neighbors[j].append(i)
    free, charges = [], {}
    for i, (z, valence) in enumerate(zip(numbers, defaults, strict=True)):
        degree = len(neighbors[i])
        if z in (7, 8) and degree == valence + 1:  # ammonium, oxonium
            charges[i] = 1
            valence += 1
        valence = next((v for v in _MAX_VALENCE.get(z, ()) if v >= degree), valence)
        free.append(max(valence - degree, 0))
    orders = dict.fromkeys(bonds, 1)
    return _Valences(np.array(free, dtype=np.int64), orders, neighbors, numbers, charges)


def _pair(valences: _Valences, bonds: dict[tuple[int, int], float]) -> None:
    import networkx  # only potentials of hypergraphs wait for it

    while True:
        graph = networkx.Graph()
        for (i, j), relative in bonds.items():
            if valences.free[i] and valences.free[j]:
                graph.add_edge(i, j, weight=_BOND_FACTOR + 1 - relative)
        if not graph:
            return
        for i, j in networkx.max_weight_matching(graph, maxcardinality=True):
            valences.raise_order(i, j)
            valences.free[[i, j]] -= 1


def _expand_octets(valences: _Valences) -> bool:
    """Give P, S and Se their higher valences where two neighbours have a free one, as in SO₂."""
    expanded = False
    for i, z in enumerate(valences.numbers):
        asking = int(sum(valences.free[j] for j in valences.neighbors[i]))
        if z in _MAX_VALENCE and asking >= 2 and not valences.free[i]:
            degree = len(valences.neighbors[i])
            room = _MAX_VALENCE[z][-1] - max(degree, _MAX_VALENCE[z][0])
            valences.free[i] = min(asking, room) // 2 * 2
            expanded |= bool(valences.free[i])
    return expanded


def _separate_charges(valences: _Valences, bonds: dict[tuple[int, int], float]) -> None:
    """Let a saturated nitrogen between two free valences bond to one and leave the other −."""
    for i, z in enumerate(valences.numbers):
        near = [j for j in valences.neighbors[i] if valences.free[j]]
        if z != 7 or valences.free[i] or i in valences.charges or not near:
            continue
        if sum(int(valences.free[j]) for j in near) < 2:
            continue
        # Oxygen takes the charge rather than carbon, a double bond precedes a triple one, and the
        # longer bond is left for the charge.
        near.sort(key=lambda j: _reluctance(valences, bonds, i, j))
        valences.raise_order(i, near[0])
        valences.free[near[0]] -= 1
        valences.charges[i] = 1
        negative = next(j for j in reversed(near) if valences.free[j])
        valences.free[negative] -= 1
        valences.charges[negative] = -1


def _reluctance(
    valences: _Valences, bonds: dict[tuple[int, int], float], i: int, j: int
) -> tuple[bool, int, float]:
    pair = min(i, j), max(i, j)
    return valences.numbers[j] == 8, valences.orders[pair], bonds[pair]


def _ionise(valences: _Valences, charge: int) -> None:
    """Fill free valences of O, S, N and C by electrons until the total charge is right."""
    for z in (8, 16, 7, 6):
        for i, number in enumerate(valences.numbers):
            if sum(valences.charges.values()) <= charge:
                return
            if number == z and valences.free[i]:
                valences.free[i] -= 1
                valences.charges[i] = valences.charges.get(i, 0) - 1


def _assemble(chem: Any, valences: _Valences, label: str) -> Any:
    molecule = chem.RWMol()
    for i, z in enumerate(valences.numbers):
        atom = chem.Atom(z)
        atom.SetNoImplicit(True)
        atom.SetFormalCharge(valences.charges.get(i, 0))
        atom.SetNumRadicalElectrons(int(valences.free[i]))
        molecule.AddAtom(atom)
    kinds = chem.BondType
    for (i, j), order in valences.orders.items():
        molecule.AddBond(i, j, kinds.values.get(order, kinds.UNSPECIFIED))
    try:
        chem.SanitizeMol(molecule)
    except ValueError as error:  # RDKit's own errors are ValueErrors
        raise ValueError(
            f"{label}the bonds between these coordinates make no molecule ({error}); relax the "
            'structure, or give the hyperedges in atoms.info["hyperedges"]'
        ) from error
    return molecule.GetMol()
