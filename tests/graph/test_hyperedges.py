"""Hyperedges: what is found in molecules, perceived from coordinates, kept and refused."""

import sys

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import HyperGraph
from atomeq.graph.convert import StructureError
from atomeq.graph.hyperedges import (
    CONJUGATED,
    FUNCTIONAL_GROUP,
    INFO_KEY,
    RING,
    Hyperedges,
    fix_topology,
    hyperedges_of,
    perceive_hyperedges,
)
from atomeq.graph.perception import molecule_from_coordinates

Chem = pytest.importorskip("rdkit.Chem", reason="RDKit is of the extra chemistry")
AllChem = pytest.importorskip("rdkit.Chem.AllChem", reason="RDKit is of the extra chemistry")


def embedded(smiles: str) -> "tuple[Chem.Mol, Atoms]":
    """A molecule with explicit hydrogen, and its atoms in space."""
    with_hydrogen = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(with_hydrogen, randomSeed=1)
    AllChem.UFFOptimizeMolecule(with_hydrogen)
    numbers = [atom.GetAtomicNum() for atom in with_hydrogen.GetAtoms()]
    return with_hydrogen, Atoms(numbers, with_hydrogen.GetConformer().GetPositions())


def as_sets(hyperedges: Hyperedges) -> set[tuple[int, frozenset[int]]]:
    pairs = zip(hyperedges.types, hyperedges.members, strict=True)
    return {(kind, frozenset(members)) for kind, members in pairs}


SMILES = [
    "c1ccccc1",
    "C=CC=C",
    "CC(=O)NC",
    "OCC",
    "c1ccc2ccccc2c1",
    "N#CC=C",
    "O=C=O",
    "c1ccsc1-c1cccs1",
    "C[N+](=O)[O-]",
    "CS(=O)(=O)C",
    "CS(C)=O",
    "CP(=O)(O)O",
    "CN=[N+]=[N-]",
    "C[N+]#[C-]",
    "c1ccncc1",
    "c1cc[nH]c1",
    "C1CC12CC2",
    "CC#CC=C=C",
    "c1ccc([N+](=O)[O-])cc1",
    "[O-][n+]1ccccc1",
    "OC(=O)c1ccccc1O",
    "ClC(F)Br",
    "SCCS",
]


@pytest.mark.parametrize("smiles", SMILES)
def test_coordinates_give_the_hyperedges_of_the_molecule(smiles: str):
    known, atoms = embedded(smiles)
    perceived = perceive_hyperedges(atoms.numbers, atoms.positions)
    assert as_sets(perceived) == as_sets(hyperedges_of(known))


@pytest.mark.parametrize(("smiles", "charge"), [("CC(=O)[O-]", -1), ("C[NH3+]", 1), ("[OH-]", -1)])
def test_ions_are_perceived(smiles: str, charge: int):
    _, atoms = embedded(smiles)
    perceived = molecule_from_coordinates(atoms.numbers, atoms.positions, charge=charge)
    assert Chem.GetFormalCharge(perceived) == charge
    assert not any(atom.GetNumRadicalElectrons() for atom in perceived.GetAtoms())


def test_kinds_of_an_amide():
    found = hyperedges_of(Chem.MolFromSmiles("CC(=O)NC"))
    assert found.of_type(CONJUGATED) == [(1, 2, 3)]
    assert found.of_type(FUNCTIONAL_GROUP) == [(0, 1, 2, 3, 4)]
    assert found.of_type(RING) == []


def test_two_groups_of_a_ring_stay_apart():
    found = hyperedges_of(Chem.MolFromSmiles("Oc1ccccc1C#N"))
    assert len(found.of_type(RING)) == 1
    assert len(found.of_type(FUNCTIONAL_GROUP)) == 2


@pytest.mark.parametrize("smiles", ["c1ccccc1", "C=CC=O", "C[N+](=O)[O-]"])
def test_unsanitised_molecules_have_no_conjugation(smiles: str):
    """As the published 3D data sets were read; our default refuses such a molecule."""
    block = Chem.MolToMolBlock(Chem.MolFromSmiles(smiles))
    raw = Chem.MolFromMolBlock(block, sanitize=False)
    assert hyperedges_of(raw, as_published=True).of_type(CONJUGATED) == []
    with pytest.raises(ValueError, match="SanitizeMol"):
        hyperedges_of(raw)
    Chem.SanitizeMol(raw)
    assert len(hyperedges_of(raw).of_type(CONJUGATED)) == 1


def test_perception_follows_rotation_and_permutation():
    _, atoms = embedded("CC(=O)Nc1ccccc1")
    before = as_sets(perceive_hyperedges(atoms.numbers, atoms.positions))
    order = np.random.default_rng(0).permutation(len(atoms))
    atoms.rotate(37, (1, 2, 3))
    after = perceive_hyperedges(atoms.numbers[order], atoms.positions[order])
    back = {(kind, frozenset(int(order[i]) for i in members)) for kind, members in as_sets(after)}
    assert back == before


def test_builder_prefers_what_is_given():
    atoms = molecule("H2O")
    assert HyperGraph(3.0)(atoms).num_hyperedges.tolist() == [3]  # two bonds, one group
    assert HyperGraph(3.0, perceive=False)(atoms).num_hyperedges.tolist() == [0]
    atoms.info[INFO_KEY] = {"members": [[0, 1]], "types": [0]}
    graph = HyperGraph(3.0)(atoms)
    assert graph.hyperedge_index.tolist() == [[0, 1], [0, 0]]
    assert torch.equal(HyperGraph(3.0)(graph).hyperedge_index, graph.hyperedge_index)


def test_graphs_with_hyperedges_join_and_part():
    structures = [molecule(name) for name in ("C6H6", "H", "H2O")]
    builder = HyperGraph(3.0)
    together = builder(structures)
    parts = together.to_list()
    for part, atoms in zip(parts, structures, strict=True):
        alone = builder(atoms)
        for name in ("hyperedge_index", "hyperedge_type", "num_hyperedges", "edge_index"):
            assert torch.equal(part[name], alone[name])
    again = AtomGraph.concatenate(parts)
    assert torch.equal(again.hyperedge_index, together.hyperedge_index)
    assert int(together.hyperedge_index[1].max()) < int(together.num_hyperedges.sum())


def test_topology_is_kept_until_it_is_rebuilt():
    atoms = molecule("H2O")
    kept = fix_topology(atoms)
    atoms.positions[1] += 5.0
    assert HyperGraph(3.0)(atoms).num_hyperedges.tolist() == [len(kept.members)]
    assert len(fix_topology(atoms).members) < len(kept.members)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"members": [[0, 9]], "types": [0]}, "atom 9"),
        ({"members": [[0, 1]], "types": [99]}, "type 99"),
        ({"members": [[0, 1]]}, "types"),
        ({"members": [[]], "types": [0]}, "no members"),
    ],
)
def test_unusable_hyperedges_are_refused(info: dict, message: str):
    atoms = molecule("H2O")
    atoms.info[INFO_KEY] = info
    with pytest.raises(StructureError, match=message):
        HyperGraph(3.0)(atoms)


def test_periodic_and_metallic_structures_are_refused():
    with pytest.raises(StructureError, match="periodic"):
        HyperGraph(3.0)(bulk("Si"))
    with pytest.raises(ValueError, match="periodic"):
        fix_topology(bulk("Si"))
    with pytest.raises(StructureError, match="no fixed valence"):
        HyperGraph(3.0)(Atoms("Fe"))


def test_without_rdkit_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "rdkit"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(ImportError, match=r"atomeq\[chemistry\]"):
        perceive_hyperedges([8], np.zeros((1, 3)))
