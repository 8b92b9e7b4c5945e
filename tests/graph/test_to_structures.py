"""Structures that go out to pymatgen and come back."""

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import fcc111, molecule
from ase.constraints import FixAtoms
from pymatgen.core import Molecule, Structure
from small_potential import small_potential

from atomeq.dynamics.run import relax
from atomeq.graph.convert import from_ase, from_pymatgen
from atomeq.graph.to_structures import to_ase, to_pymatgen


def slab() -> Atoms:
    atoms = fcc111("Cu", (2, 2, 2), a=3.7, vacuum=5.0)
    atoms.rattle(0.05, seed=0)
    atoms.set_constraint(FixAtoms([0, 1]))
    return atoms


def test_a_relaxed_structure_goes_out_with_its_results_and_comes_back():
    (outcome,) = relax([slab()], small_potential(), max_steps=3)
    assert outcome.graph is not None
    (structure,) = to_pymatgen(outcome.graph)
    assert isinstance(structure, Structure)
    assert structure.lattice.pbc == (True, True, False)
    assert structure.properties["energy"] == outcome.energy
    back = from_pymatgen(structure)
    for name in ("atomic_numbers", "pbc", "tags", "fixed"):
        assert torch.equal(back[name], outcome.graph[name]), name
    for name in ("pos", "cell", "energy", "forces"):
        torch.testing.assert_close(back[name], outcome.graph[name].cpu(), rtol=0, atol=1e-12)
    assert structure.site_properties["selective_dynamics"][:3] == [[False] * 3] * 2 + [[True] * 3]


def test_velocities_and_stress_have_the_units_they_say():
    atoms = Atoms("Cu", cell=3 * [2.5], pbc=True)
    atoms.set_velocities([[0.02 / units.fs, 0, 0]])
    graph = from_ase(atoms)
    stress = torch.tensor([[[3.0, 0.1, 0.2], [0.1, 2.0, 0.3], [0.2, 0.3, 1.0]]])
    (structure,) = to_pymatgen(graph.replace(stress=stress.double()))
    np.testing.assert_allclose(structure.site_properties["velocities"], [[0.02, 0, 0]])
    np.testing.assert_allclose(structure.properties["stress"], stress[0])
    torch.testing.assert_close(from_pymatgen(structure)["stress"], stress.double())


def test_what_is_not_periodic_is_a_molecule():
    found, crystal = to_pymatgen([molecule("H2O"), slab()])
    assert isinstance(found, Molecule)
    assert isinstance(crystal, Structure)
    assert found.composition.reduced_formula == "H2O"
    assert "energy" not in found.properties


def test_a_slab_without_a_third_vector_keeps_its_distances():
    atoms = slab()
    atoms.cell[2] = 0
    (structure,) = to_pymatgen(atoms)
    thickness = np.ptp(atoms.positions[:, 2])
    assert structure.lattice.c == pytest.approx(thickness + 20.0)
    (back,) = to_ase(from_pymatgen(structure))
    np.testing.assert_allclose(
        back.get_all_distances(mic=True), atoms.get_all_distances(mic=True), atol=1e-10
    )
