"""Structures through the door and back, and what the door refuses."""

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from pymatgen.core import DummySpecies, Lattice, Molecule, Structure

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.convert import (
    StructureError,
    from_ase,
    from_pymatgen,
    from_structures,
    validate_structure,
)
from atomeq.graph.to_structures import to_ase


def labelled_slab():
    atoms = fcc111("Pt", (2, 2, 2), vacuum=6.0)
    rng = np.random.default_rng(4)
    atoms.rattle(0.05, rng=rng)
    atoms.set_velocities(rng.normal(0, 0.1, (8, 3)))
    atoms.set_constraint(FixAtoms(mask=atoms.get_tags() == 2))
    stress = rng.normal(size=6)
    atoms.calc = SinglePointCalculator(
        atoms, energy=-3.25, forces=rng.normal(size=(8, 3)), stress=stress
    )
    atoms.info["weight"] = 2.5
    return atoms


def test_atoms_survive_the_round_trip():
    originals = [labelled_slab(), molecule("H2O"), bulk("NaCl", "rocksalt", a=5.64)]
    returned = to_ase(from_ase(originals))
    assert len(returned) == 3
    for before, after in zip(originals, returned, strict=True):
        np.testing.assert_array_equal(after.positions, before.positions)
        np.testing.assert_array_equal(after.numbers, before.numbers)
        np.testing.assert_array_equal(after.cell.array, before.cell.array)
        np.testing.assert_array_equal(after.pbc, before.pbc)
        np.testing.assert_array_equal(after.get_tags(), before.get_tags())
    slab, back = originals[0], returned[0]
    np.testing.assert_allclose(back.get_velocities(), slab.get_velocities(), rtol=1e-14)
    np.testing.assert_array_equal(back.constraints[0].index, slab.constraints[0].index)
    assert back.get_potential_energy() == slab.get_potential_energy()
    np.testing.assert_array_equal(back.get_forces(), slab.get_forces())
    np.testing.assert_array_equal(back.get_stress(), slab.get_stress())
    assert back.info["weight"] == 2.5
    assert returned[1].calc is None


def test_velocities_are_in_angstrom_per_femtosecond():
    atoms = Atoms("H", [[0, 0, 0]], velocities=[[0.03 / units.fs, 0, 0]])
    assert from_ase(atoms)["velocities"][0, 0].item() == pytest.approx(0.03, rel=1e-14)


def test_forces_are_those_before_constraints():
    slab = labelled_slab()
    np.testing.assert_array_equal(from_ase(slab).forces.numpy(), slab.calc.results["forces"])


def test_labels_of_info_and_arrays_are_found():
    atoms = bulk("Cu")
    atoms.info.update(energy=-1.0, stress=np.arange(9.0))
    atoms.arrays["forces"] = np.full((1, 3), 0.5)
    graph = from_ase(atoms, dtype=torch.float32)
    assert graph.energy.dtype == torch.float64
    assert graph.energy.tolist() == [-1.0]
    assert graph.forces.tolist() == [[0.5, 0.5, 0.5]]
    assert graph.stress.tolist() == [[[0, 1, 2], [3, 4, 5], [6, 7, 8]]]
    assert graph.stress.dtype == torch.float32


def test_voigt_stress_becomes_a_symmetric_matrix():
    atoms = bulk("Cu")
    atoms.info["stress"] = [1, 2, 3, 4, 5, 6]
    assert from_ase(atoms).stress.tolist() == [[[1, 6, 5], [6, 2, 4], [5, 4, 3]]]


def test_results_of_other_positions_are_not_labels():
    atoms = bulk("Cu", cubic=True)
    atoms.calc = EMT()
    atoms.get_potential_energy()
    assert "energy" in from_ase(atoms)
    atoms.positions[0] += 0.1
    assert "energy" not in from_ase(atoms)


def test_a_graph_does_not_follow_atoms_that_move():
    atoms = labelled_slab()
    graph = from_ase(atoms)
    before = {name: graph[name].clone() for name in graph.keys()}  # noqa: SIM118
    atoms.positions += 1.0
    atoms.cell[0] *= 2.0
    atoms.numbers[0] = 1
    atoms.pbc = False
    atoms.arrays["tags"][:] = 7
    atoms.calc.results["forces"] += 1.0
    for name, value in before.items():
        assert torch.equal(graph[name], value)


def test_pymatgen_structures_equal_their_ase_twins():
    lattice = Lattice.from_parameters(3.9, 4.2, 5.0, 80, 95, 102, pbc=(True, True, False))
    structure = Structure(
        lattice,
        ["Na+", "Cl-"],
        [[0, 0, 0], [0.5, 0.4, 0.6]],
        site_properties={"tags": [1, 2], "forces": [[0, 0, 1], [0, 0, -1]]},
        properties={"energy": -4.0},
    )
    graph = from_pymatgen([structure, Molecule("OH", [[0, 0, 0], [0, 0, 0.97]])])
    assert graph.atomic_numbers.tolist() == [11, 17, 8, 1]
    assert graph.pbc.tolist() == [[True, True, False], [False] * 3]
    assert graph["tags"].tolist() == [1, 2, 0, 0]
    assert graph.energy[0] == -4.0
    assert graph.forces[1].tolist() == [0, 0, -1]
    np.testing.assert_array_equal(graph.cell[0].numpy(), lattice.matrix)
    atoms = to_ase(graph)[0]
    np.testing.assert_allclose(atoms.positions, structure.cart_coords)


def test_kinds_may_be_mixed():
    structure = Structure(Lattice.cubic(3.0), ["Fe"], [[0, 0, 0]])
    graph = from_ase(molecule("H2O"), dtype=torch.float32)
    assert graph.pos.dtype == torch.float32
    assert from_structures(graph).pos.dtype == torch.float32
    assert from_structures(graph, dtype=torch.float64).pos.dtype == torch.float64
    mixed = from_structures([structure, graph, bulk("Cu")])
    assert mixed.natoms.tolist() == [1, 3, 1]
    assert from_structures([structure, bulk("Cu")]).natoms.tolist() == [1, 1]


@pytest.mark.parametrize("given", [["Cu.cif"], [bulk("Cu"), 7], [np.zeros(3)]])
def test_what_is_no_structure_is_refused(given):
    with pytest.raises(TypeError, match=r"item \d is a .*; structures are ase.Atoms"):
        from_structures(given)


def at(value, atom=1):
    atoms = bulk("Cu", cubic=True)
    atoms.positions[atom, 2] = value
    return atoms


def with_cell(cell, pbc=True):
    return Atoms("CuO", [[0, 0, 0], [1.8, 0, 0]], cell=cell, pbc=pbc)


BAD = {
    "empty": (Atoms(), "has no atoms"),
    "NaN": (at(np.nan), r"\(Cu4\): position of atom 1 is .*nan\] Å"),
    "infinite": (at(np.inf, 3), r"position of atom 3 is .*inf\] Å"),
    "NaN cell": (with_cell([3, np.nan, 3]), r"\(CuO\): cell is .*nan"),
    "infinite cell": (with_cell([3, np.inf, 3], False), "cell is .*inf"),
    "dummy atom": (Atoms("CuX", [[0, 0, 0], [2, 0, 0]]), "atom 1 has atomic number 0"),
    "beyond oganesson": (Atoms([1, 119], [[0, 0, 0], [2, 0, 0]]), "atom 1 has atomic number 119"),
    "no cell": (with_cell(None), r"pbc is \[True, True, True\] but the cell is \[\[0.0"),
    "zero vector": (with_cell([3, 3, 0]), "nonzero and independent"),
    "dependent vectors": (with_cell([[3, 0, 0], [0, 3, 0], [3, 3, 0]]), "full cell or set pbc"),
    "dependent in the plane": (with_cell([[3, 0, 0], [6, 0, 0], [0, 0, 0]], (1, 1, 0)), "pbc is"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_structure_is_refused_by_name(case):
    atoms, message = BAD[case]
    with pytest.raises(StructureError, match=message):
        validate_structure(atoms)
    with pytest.raises(StructureError, match=r"frame 7 of a\.xyz") as named:
        validate_structure(atoms, name="frame 7 of a.xyz")
    assert named.value.index == 0


@pytest.mark.parametrize("case", BAD)
def test_a_bad_structure_in_a_list_is_refused_with_its_index(case):
    atoms, message = BAD[case]
    with pytest.raises(StructureError, match=message) as caught:
        from_ase([bulk("Cu"), bulk("Al"), atoms, bulk("Cu")])
    assert str(caught.value).startswith("structure 2")
    assert caught.value.index == 2


@pytest.mark.parametrize("case", sorted(set(BAD) - {"empty"}))
def test_a_bad_graph_is_refused_too(case):
    atoms, message = BAD[case]
    graph = AtomGraph(
        torch.tensor(atoms.positions),
        torch.tensor(atoms.numbers),
        cell=torch.tensor(atoms.cell.array[None]),
        pbc=torch.tensor(atoms.pbc[None]),
    )
    with pytest.raises(StructureError, match=message) as caught:
        from_structures([from_ase(bulk("Cu")), graph])
    assert caught.value.index == 1


def test_an_unknown_element_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(StructureError, match=r"atom 1 is O \(Z = 8\).*known are Al, Cu"):
        validate_structure(with_cell([4, 4, 4]), known_elements=(29, 13))
    validate_structure(with_cell([4, 4, 4]), known_elements={29, 8})


def test_overlapping_atoms_are_refused_with_the_pair():
    atoms = bulk("Cu", cubic=True)
    atoms.positions[2] = atoms.positions[0] + [0, 0, 0.05]
    with pytest.raises(StructureError, match=r"atom \d and atom \d are 0.05 Å apart"):
        validate_structure(atoms)
    validate_structure(atoms, min_distance=0.04)
    validate_structure(atoms, min_distance=None)
    with pytest.raises(StructureError, match=r"less than 2\.6 Å"):
        validate_structure(bulk("Cu", cubic=True), min_distance=2.6)


def test_an_atom_that_overlaps_an_image_is_refused():
    atoms = Atoms("H2", [[0.02, 0, 0], [3.98, 0, 0]], cell=[4, 4, 4], pbc=True)
    with pytest.raises(StructureError, match=r"the image \[-?1, 0, 0\] of atom"):
        validate_structure(atoms)


@pytest.mark.parametrize(
    "atoms",
    [
        Atoms("H", [[1, 2, 3]]),
        Atoms("H", [[1, 2, 3]], cell=[9, 9, 0], pbc=(1, 1, 0)),
        Atoms("H", [[1, 2, 3]], cell=[[0, 0, -3], [3, 1, 0], [0, 3, 0]], pbc=True),
        Structure(Lattice.cubic(3.0), ["Fe"], [[0, 0, 0]]),
        from_ase([bulk("Cu"), molecule("CH4")]),
    ],
    ids=["atom", "slab without c", "left-handed", "pymatgen", "graph"],
)
def test_unusual_but_sound_structures_pass(atoms):
    validate_structure(atoms)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("energy", "low", "label 'energy' cannot be read"),
        ("energy", np.nan, "label 'energy' is NaN"),
        ("stress", [1.0, 2.0], "label 'stress' cannot be read as numbers of shape"),
    ],
)
def test_a_bad_label_is_refused(name, value, message):
    atoms = bulk("Cu")
    atoms.info[name] = value
    with pytest.raises(StructureError, match=message) as caught:
        from_ase([bulk("Al"), atoms])
    assert caught.value.index == 1


def test_an_empty_list_is_refused():
    with pytest.raises(StructureError, match="the list is empty"):
        from_ase([])


@pytest.mark.parametrize("species", [{"Cu": 0.5, "Au": 0.5}, DummySpecies("X")])
def test_a_site_that_is_not_one_element_is_refused(species):
    structure = Structure(Lattice.cubic(3.0), [species], [[0, 0, 0]])
    with pytest.raises(StructureError, match=r"structure 0: site 0 holds .*, not one element"):
        from_pymatgen(structure)
