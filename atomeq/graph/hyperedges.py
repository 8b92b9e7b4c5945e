"""Hyperedges of molecules: bonds, conjugated systems, rings and functional groups.

They join two or more atoms each and feed hypergraph networks. RDKit finds them, in a molecule given
as such, as SMILES, or perceived from coordinates (:mod:`atomeq.graph.perception`); it is imported
when it is needed and comes with the extra ``chemistry``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from atomeq.graph.perception import import_chem, molecule_from_coordinates

if TYPE_CHECKING:
    from ase import Atoms

    from atomeq.graph.atom_graph import AtomGraph

Molecule: TypeAlias = Any  # rdkit.Chem.Mol; RDKit is optional

#: Kinds of hyperedges. The first five are bonds, by the order in which OGB numbers them; the sixth
#: is the published one of conjugated systems; the last two are ours.
HYPEREDGE_TYPES = (
    "single",
    "double",
    "triple",
    "aromatic",
    "other",
    "conjugated",
    "ring",
    "functional group",
)
CONJUGATED, RING, FUNCTIONAL_GROUP = 5, 6, 7

#: Where an Atoms object keeps its hyperedges: ``atoms.info[INFO_KEY]``.
INFO_KEY = "hyperedges"

_N_DEGREES, _N_CHARGES, _N_HYDROGENS, _N_RADICALS = 11, 11, 9, 5
_OTHER_ELEMENT, _OTHER_HYBRIDISATION = 118, 5


@dataclass(frozen=True)
class Hyperedges:
    """The hyperedges of one structure.

    Attributes:
        members: Atoms of each hyperedge.
        types: Kind of each hyperedge, an index into :data:`HYPEREDGE_TYPES`.

    Raises:
        ValueError: The lengths differ, a hyperedge has no members, or a kind does not exist.
    """

    members: tuple[tuple[int, ...], ...]
    types: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.members) != len(self.types):
            raise ValueError(f"{len(self.members)} hyperedges, but {len(self.types)} types")
        if not all(self.members):
            raise ValueError(f"hyperedge {self.members.index(())} has no members")
        for kind in self.types:
            if not 0 <= kind < len(HYPEREDGE_TYPES):
                raise ValueError(f"hyperedge type {kind} is not in 0..{len(HYPEREDGE_TYPES) - 1}")

    @classmethod
    def from_lists(cls, members: Iterable[Iterable[int]], types: Iterable[int]) -> "Hyperedges":
        """Return hyperedges of any nested sequences of integers.

        Args:
            members: Atoms of each hyperedge.
            types: Kind of each hyperedge.
        """
        return cls(
            tuple(tuple(int(atom) for atom in edge) for edge in members),
            tuple(int(kind) for kind in types),
        )

    @classmethod
    def from_info(cls, given: Any) -> "Hyperedges":
        """Return what stands in ``atoms.info[INFO_KEY]``.

        Raises:
            ValueError: It is not ``{"members": [[0, 1], ...], "types": [0, ...]}``.
        """
        try:
            return cls.from_lists(given["members"], given["types"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"info[{INFO_KEY!r}] is unusable: {error}") from error

    def to_info(self) -> dict[str, list[Any]]:
        """Return what stands for them in ``atoms.info[INFO_KEY]``; files of ASE keep it."""
        return {"members": [list(edge) for edge in self.members], "types": list(self.types)}

    @classmethod
    def of_graph(cls, graph: "AtomGraph") -> "Hyperedges":
        """Return those of an AtomGraph of one structure."""
        atoms, edges = graph.hyperedge_index.tolist()
        members: list[list[int]] = [[] for _ in range(int(graph.num_hyperedges))]
        for atom, edge in zip(atoms, edges, strict=True):
            members[edge].append(atom)
        return cls.from_lists(members, graph.hyperedge_type.tolist())

    def of_type(self, kind: int) -> list[tuple[int, ...]]:
        """Return the members of all hyperedges of a kind."""
        return [m for m, t in zip(self.members, self.types, strict=True) if t == kind]

    def fields(self, *, n_atoms: int) -> dict[str, Tensor]:
        """Return the fields of an AtomGraph of one structure.

        Args:
            n_atoms: Of the structure.

        Returns:
            ``hyperedge_index`` (2, n_incidences) of (atom, hyperedge), ``hyperedge_type``
            (n_hyperedges,) and ``num_hyperedges`` (1,).

        Raises:
            ValueError: A member is not an atom of the structure.
        """
        atoms = [atom for edge in self.members for atom in edge]
        if atoms and not 0 <= min(atoms) <= max(atoms) < n_atoms:
            raise ValueError(
                f"hyperedges name atom {max(atoms)}, but there are {n_atoms} atoms; they belong "
                "to another structure: make them anew with fix_topology()"
            )
        edges = [k for k, edge in enumerate(self.members) for _ in edge]
        return {
            "hyperedge_index": torch.tensor([atoms, edges], dtype=torch.int64).view(2, -1),
            "hyperedge_type": torch.tensor(self.types, dtype=torch.int64),
            "num_hyperedges": torch.tensor([len(self.members)], dtype=torch.int64),
        }


NO_HYPEREDGES = Hyperedges((), ())


def hyperedges_of(molecule: Molecule, *, as_published: bool = False) -> Hyperedges:
    """Return the hyperedges of an RDKit molecule: bonds first, in their order.

    As published there are only bonds and conjugated systems, of the molecule as it is given. The
    published 3D data sets were read with ``sanitize=False``; RDKit then knows neither aromaticity
    nor conjugation, and not one conjugated hyperedge was in them. Our default refuses such a
    molecule, and adds rings and functional groups.

    Args:
        molecule: ``rdkit.Chem.Mol``.
        as_published: Bonds and conjugated systems only, and nothing is refused.

    Raises:
        ValueError: The molecule was not sanitised.
    """
    if not as_published and molecule.NeedsUpdatePropertyCache():
        raise ValueError(
            "the molecule was not sanitised, so RDKit knows no conjugation in it; read it with "
            "sanitize=True or call rdkit.Chem.SanitizeMol(molecule)"
        )
    groups = [
        ((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()), _bond_type(bond))
        for bond in molecule.GetBonds()
    ]
    if not groups:
        return NO_HYPEREDGES
    groups += [(members, CONJUGATED) for members in _conjugated_systems(molecule)]
    if not as_published:
        rings = molecule.GetRingInfo().AtomRings()
        groups += [(tuple(sorted(ring)), RING) for ring in rings]
        groups += [(members, FUNCTIONAL_GROUP) for members in _functional_groups(molecule)]
    return Hyperedges.from_lists(*zip(*groups, strict=True))


def perceive_hyperedges(
    atomic_numbers: Sequence[int], positions: Any, *, charge: int = 0, name: str | None = None
) -> Hyperedges:
    """Perceive the hyperedges of molecules from coordinates alone.

    Bonds are pairs closer than 1.3 times the sum of their covalent radii; bond orders fill the
    valences. The result jumps as a bond breaks: whatever moves atoms perceives once, at the start,
    and keeps the result (:mod:`atomeq.graph.topology`).

    Args:
        atomic_numbers: (n_atoms,).
        positions: (n_atoms, 3), Å.
        charge: Total charge, e.
        name: Of the structure, for messages.

    Returns:
        Bonds, rings and functional groups.

    Raises:
        ValueError: Valences of the structure make no sense, or an element has no fixed valence.
        ImportError: RDKit is not installed.
    """
    return hyperedges_of(
        molecule_from_coordinates(atomic_numbers, positions, charge=charge, name=name)
    )


def fix_topology(atoms: "Atoms", *, charge: int = 0) -> Hyperedges:
    """Perceive the hyperedges of a molecule and keep them in ``atoms.info``.

    From then on builders, calculators and dynamics take them from there, however the atoms move,
    and files keep them. Call it again to rebuild them.

    Args:
        atoms: Not periodic.
        charge: Total charge, e.

    Returns:
        What was perceived.

    Raises:
        ValueError: The structure is periodic, or its valences make no sense.
    """
    if any(atoms.pbc):
        raise ValueError(PERIODIC)
    found = perceive_hyperedges(atoms.numbers.tolist(), atoms.positions, charge=charge)
    atoms.info[INFO_KEY] = found.to_info()
    return found


PERIODIC = (
    "hyperedges of a periodic structure cannot be perceived; give them in "
    f'atoms.info["{INFO_KEY}"] as {{"members": [[0, 1], ...], "types": [0, ...]}}'
)


def published_hypergraph(molecule: Molecule) -> dict[str, list[Any]]:
    """Return the arrays that the published code makes of a molecule.

    Args:
        molecule: ``rdkit.Chem.Mol``, with or without explicit hydrogen.

    Returns:
        ``x``: OGB's nine integers of each atom; ``edge_index0`` and ``edge_index1``: atom and
        hyperedge of each incidence; ``edge_attr``: kind of each hyperedge, in a list of its own;
        ``e_order``: its number of members.
    """
    found = hyperedges_of(molecule, as_published=True)
    return {
        "x": [atom_features(atom) for atom in molecule.GetAtoms()],
        "edge_index0": [atom for edge in found.members for atom in edge],
        "edge_index1": [k for k, edge in enumerate(found.members) for _ in edge],
        "edge_attr": [[kind] for kind in found.types],
        "e_order": [len(edge) for edge in found.members],
    }


def atom_features(atom: Any) -> list[int]:
    """Return OGB's nine integers of an RDKit atom.

    Element, chirality, neighbours, charge + 5, hydrogen on it, radical electrons, hybridisation,
    aromatic, in a ring; of each the index in a list whose last entry stands for anything else.
    """
    hybridisation = ("SP", "SP2", "SP3", "SP3D", "SP3D2")
    chirality = ("CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW", "CHI_OTHER")
    number = atom.GetAtomicNum()
    return [
        number - 1 if 1 <= number <= _OTHER_ELEMENT else _OTHER_ELEMENT,
        _place(str(atom.GetChiralTag()), chirality),
        _bounded(atom.GetTotalDegree(), _N_DEGREES),
        _bounded(atom.GetFormalCharge() + 5, _N_CHARGES),
        _bounded(atom.GetTotalNumHs(), _N_HYDROGENS),
        _bounded(atom.GetNumRadicalElectrons(), _N_RADICALS),
        _place(str(atom.GetHybridization()), hybridisation),
        int(atom.GetIsAromatic()),
        int(atom.IsInRing()),
    ]


def ring_features(molecule: Molecule) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Return atoms, ascending, and (size, aromatic, has a heteroatom, saturated) of each ring."""
    found = []
    for ring in molecule.GetRingInfo().AtomRings():
        atoms = [molecule.GetAtomWithIdx(index) for index in sorted(ring)]
        aromatic = all(atom.GetIsAromatic() for atom in atoms)
        hetero = any(atom.GetAtomicNum() not in (1, 6) for atom in atoms)
        saturated = all(str(atom.GetHybridization()) == "SP3" for atom in atoms)
        features = (float(len(ring)), float(aromatic), float(hetero), float(saturated))
        found.append((tuple(sorted(ring)), features))
    return found


def _bond_type(bond: Any) -> int:
    return _place(str(bond.GetBondType()), ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC"))


def _conjugated_systems(molecule: Molecule) -> list[tuple[int, ...]]:
    resonance = import_chem("rdkit.Chem.rdchem").ResonanceMolSupplier(molecule)
    n_systems = resonance.GetNumConjGrps()
    systems: list[list[int]] = [[] for _ in range(n_systems)]
    for atom in range(molecule.GetNumAtoms()):
        # RDKit says -1, or 2**32 - 1, where there is none.
        if 0 <= (system := resonance.GetAtomConjGrpIdx(atom)) < n_systems:
            systems[system].append(atom)
    return [tuple(system) for system in systems if system]


def _functional_groups(molecule: Molecule) -> list[tuple[int, ...]]:
    """Return functional groups with the atoms bonded to them, by the rules of Ertl.

    J. Cheminform. 9, 36 (2017): heteroatoms, carbon with a multiple bond outside aromatic rings,
    and acetal carbon are marked; marked atoms that are bonded form a group. Aromatic atoms stay
    alone, lest a ring swallow its substituents.
    """
    marked = {atom.GetIdx() for atom in molecule.GetAtoms() if _is_functional(atom)}
    groups, seen = [], set()
    for first in sorted(marked):
        if first in seen:
            continue
        group, waiting = set(), [first]
        while waiting:
            atom = molecule.GetAtomWithIdx(waiting.pop())
            group.add(atom.GetIdx())
            if atom.GetIsAromatic():
                continue
            near = [n for n in atom.GetNeighbors() if not n.GetIsAromatic()]
            waiting += [n.GetIdx() for n in near if n.GetIdx() in marked - group]
        seen |= group
        around = {
            n.GetIdx() for member in group for n in molecule.GetAtomWithIdx(member).GetNeighbors()
        }
        groups.append(tuple(sorted(group | around)))
    return groups


def _is_functional(atom: Any) -> bool:
    if atom.GetAtomicNum() != 6:
        return atom.GetAtomicNum() != 1
    if any(str(bond.GetBondType()) in ("DOUBLE", "TRIPLE") for bond in atom.GetBonds()):
        return True
    hetero = [n for n in atom.GetNeighbors() if n.GetAtomicNum() in (7, 8, 16)]
    return not atom.GetIsAromatic() and len(hetero) >= 2


def _place(name: str, names: Sequence[str]) -> int:
    return names.index(name) if name in names else len(names)


def _bounded(value: int, n_values: int) -> int:
    return value if 0 <= value < n_values else n_values
