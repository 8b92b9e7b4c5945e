import numpy as np
import pytest
import torch
from ase import Atoms
from structures import rattled_crystal, rattled_molecule

from atomeq.models.egnn import EGNN
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences


@pytest.fixture
def potential() -> Potential:
    torch.manual_seed(0)
    model = EGNN(cutoff=4.0, num_layers=2, hidden_channels=16)
    return Potential(model, AtomicReferences({1: -13.0, 6: -1026.0, 8: -2037.0, 12: -1.0}))


def test_only_what_is_asked_comes_back(potential):
    graph = potential.build_graph(rattled_molecule())
    assert set(potential(graph, ("energy",))) == {"energy"}
    assert set(potential(graph, ("forces",))) == {"forces"}
    assert set(potential(graph, ("energies", "forces"))) == {"energies", "forces"}


def test_energies_are_summed_in_float64(potential):
    assert potential.dtype == torch.float32
    results = potential(potential.build_graph(rattled_molecule()), ("energy", "energies"))
    assert results["energy"].dtype == results["energies"].dtype == torch.float64
    assert results["energy"].item() == pytest.approx(results["energies"].sum().item(), abs=1e-10)


def test_forces_stay_differentiable_in_training_only(potential):
    graph = potential.build_graph(rattled_molecule())
    assert potential.train()(graph)["forces"].requires_grad
    assert not potential.eval()(graph)["forces"].requires_grad
    with torch.no_grad():
        assert not potential.train()(graph)["forces"].requires_grad


def test_forces_are_derived_without_gradient_mode(potential):
    graph = potential.eval().build_graph(rattled_molecule())
    expected = potential(graph)["forces"]
    with torch.no_grad():
        assert torch.equal(potential(graph)["forces"], expected)


def test_input_graph_is_not_modified(potential):
    graph = potential.build_graph(rattled_crystal())
    before = graph.pos.clone(), graph.cell.clone(), sorted(graph.keys())
    potential(graph, ("energy", "forces", "stress"))
    assert torch.equal(graph.pos, before[0])
    assert torch.equal(graph.cell, before[1])
    assert sorted(graph.keys()) == before[2]
    assert not graph.pos.requires_grad


def test_unknown_element_is_named(potential):
    with pytest.raises(ValueError, match=r"atom 1 .*atomic number 29"):
        potential.build_graph(Atoms("HCu", [[0, 0, 0], [0, 0, 2]]))


def test_stress_of_a_molecule_is_refused(potential):
    graph = potential.build_graph(rattled_molecule())
    with pytest.raises(ValueError, match="cell with a volume"):
        potential(graph, ("stress",))


def test_unknown_property_is_refused(potential):
    with pytest.raises(ValueError, match="unknown property 'magmom'"):
        potential(potential.build_graph(rattled_molecule()), ("magmom",))


def test_large_offsets_of_position_do_not_cost_precision(potential):
    """Positions stay float64 until they are differences, so a float32 network sees no rounding."""
    atoms = rattled_molecule()
    far = atoms.copy()
    far.positions += 1e6
    near = potential.eval()(potential.build_graph(atoms))["forces"]
    moved = potential.eval()(potential.build_graph(far))["forces"]
    np.testing.assert_allclose(moved.numpy(), near.numpy(), atol=1e-5)
