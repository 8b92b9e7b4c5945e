"""Neighbours of a batch in motion: those of a fresh search, whatever is remembered."""

import numpy as np
import pytest
import torch
from analytic_potentials import cluster
from ase import Atom
from ase.build import bulk
from awkward import STRUCTURES, rattled
from structures import RATTLED

from atomeq.dynamics.state import prepare
from atomeq.graph import moving
from atomeq.graph.builders import RadiusGraph
from atomeq.graph.convert import StructureError, from_ase
from atomeq.graph.moving import MovingNeighbors

CUTOFF = 4.3


def assert_fresh(neighbors, graph):
    edges = neighbors(graph)
    fresh = RadiusGraph(neighbors.cutoff).connect(graph)
    assert torch.equal(edges.edge_index, fresh.edge_index)
    assert torch.equal(edges.cell_offsets, fresh.cell_offsets)


@pytest.fixture(params=["arrays", "tensors"])
def kind(request, monkeypatch):
    """What a CPU computes with, and what any other device does."""
    if request.param == "tensors":
        monkeypatch.setattr(moving, "uses_numpy", lambda device: False)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("deforming", [False, True])
def test_edges_are_those_of_a_fresh_search(deforming):
    graph = prepare([make() for make in RATTLED.values()])
    neighbors, random = MovingNeighbors(CUTOFF, 0.8), np.random.default_rng(0)
    for _ in range(12):
        assert_fresh(neighbors, graph)
        graph = graph.replace(pos=graph.pos + torch.tensor(random.normal(0, 0.03, graph.pos.shape)))
        if deforming:
            graph = graph.strained(torch.tensor(random.normal(0, 0.003, graph.cell.shape)))
    assert neighbors.n_searches < 3 * 8


@pytest.mark.usefixtures("kind")
def test_structures_that_leave_and_return_are_recognised():
    graph = prepare([make() for make in RATTLED.values()])
    neighbors = MovingNeighbors(CUTOFF, 0.8)
    for systems in ([0, 1, 2], [2, 0], [1], [0, 1, 2]):
        assert_fresh(neighbors, graph.take(torch.tensor(systems)))
    assert neighbors.n_searches == 2  # the third is a molecule


@pytest.mark.usefixtures("kind")
def test_structures_that_come_one_by_one_are_searched_once(monkeypatch):
    """Those that enter a batch are counted before; but of all that ever came few are kept."""
    monkeypatch.setattr(moving, "_KEPT", 30 * moving._OF_A_LIST)
    graph = prepare([rattled(bulk("Cu", cubic=True), seed=k) for k in range(20)])
    neighbors = MovingNeighbors(CUTOFF, 0.8)
    for single in graph.to_list():
        assert_fresh(neighbors, single)
    assert_fresh(neighbors, graph)
    assert neighbors.n_searches == 20
    for k in range(200):
        neighbors(graph.graph(0).replace(key=torch.tensor([-k])))
    assert len(neighbors._known) < 40
    assert neighbors._weight == sum(map(moving._weight, neighbors._known.values()))


@pytest.mark.usefixtures("kind")
def test_a_small_molecule_is_never_searched():
    graph = prepare([cluster(9, 1), cluster(3, 2)])
    neighbors = MovingNeighbors(CUTOFF, 0.0)
    for scale in (1.0, 1.5, 0.7, 30.0):
        assert_fresh(neighbors, graph.replace(pos=scale * graph.pos))
    assert neighbors.n_searches == 0


@pytest.mark.usefixtures("kind")
def test_a_collapsed_cell_is_refused_before_it_is_searched():
    graph = prepare([make() for make in RATTLED.values()])
    cell = graph.cell.clone()
    cell[1] *= 1e-2
    edges = MovingNeighbors(CUTOFF, 0.8)(graph.replace(cell=cell))
    assert list(edges.refused) == [1]
    assert "collapsed" in edges.refused[1]
    assert set(graph.batch[edges.edge_index[1]].tolist()) == {0, 2}


def test_some_structures_are_taken_as_a_list_would_be():
    graph = prepare([make() for make in RATTLED.values()])
    taken = graph.take(torch.tensor([2, 0]))
    singles = graph.to_list()
    expected = type(graph).concatenate([singles[2], singles[0]])
    for name, value in expected.to_dict().items():
        assert torch.equal(taken[name], value), name


@pytest.mark.parametrize("pbc", [(1, 1, 1), (1, 0, 1), (0, 0, 0)])
def test_edges_of_one_structure_are_fresh_on_a_random_walk(pbc):
    rng = np.random.default_rng(11)
    atoms = rattled(bulk("Cu", cubic=True) * (2, 2, 4))
    atoms.pbc = pbc
    neighbors, n_steps = MovingNeighbors(4.1, 0.6), 40
    for step in range(n_steps):
        atoms.positions += rng.normal(0, 0.02, atoms.positions.shape)
        if step % 15 == 14:
            atoms.wrap()
        if step == 30:
            atoms.set_cell(atoms.cell.array * 1.01, scale_atoms=True)
        assert_fresh(neighbors, from_ase(atoms))
    assert 2 < neighbors.n_searches < n_steps / 2


def test_pairs_on_the_border_are_decided_as_in_a_fresh_search():
    # A perfect crystal whose cutoff is a lattice length: every shell member sits on the border.
    atoms = bulk("Cu", a=3.6, cubic=True) * (3, 3, 3)
    neighbors = MovingNeighbors(3.6, 0.5)
    neighbors(from_ase(atoms))
    atoms.positions += [0.05, 0.11, -0.07]
    assert_fresh(neighbors, from_ase(atoms))
    assert neighbors.n_searches == 1


@pytest.mark.parametrize(
    ("change", "n_searches"),
    [
        (lambda atoms: atoms.set_cell(atoms.cell.array * 1.001, scale_atoms=True), 1),
        (lambda atoms: atoms.set_cell(atoms.cell.array * 0.8, scale_atoms=True), 2),
        (lambda atoms: atoms.set_pbc((True, True, False)), 2),
        (lambda atoms: atoms.pop(), 2),
        (lambda atoms: atoms.append(Atom("Cu", (0.9, 0.9, 0.9))), 2),
        (lambda atoms: atoms.positions.__setitem__((0, 0), 0.24), 1),
        (lambda atoms: atoms.positions.__setitem__((0, 0), 0.26), 2),
    ],
    ids=["strain", "cell", "pbc", "fewer atoms", "more atoms", "within", "half the skin"],
)
def test_a_structure_is_searched_anew_when_its_reference_does_not_hold(change, n_searches):
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    neighbors = MovingNeighbors(3.1, 0.5)
    neighbors(from_ase(atoms))
    change(atoms)
    assert_fresh(neighbors, from_ase(atoms))
    assert neighbors.n_searches == n_searches


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("name", sorted(set(STRUCTURES) - {"overlapping", "empty"}))
def test_awkward_structures_have_their_edges_and_are_left_alone(name):
    graph = from_ase(STRUCTURES[name]())
    before = graph.pos.clone(), graph.cell.clone()
    neighbors = MovingNeighbors(4.0, 0.3)
    assert_fresh(neighbors, graph)
    assert_fresh(neighbors, graph.replace(pos=graph.pos + 0.01))
    assert torch.equal(graph.pos, before[0])
    assert torch.equal(graph.cell, before[1])


def test_what_cannot_be_connected_is_refused_by_its_name():
    copper, far = bulk("Cu", cubic=True), bulk("Cu", cubic=True)
    copper.positions[3] = copper.positions[1]
    far.positions[3, 0] = 1e12
    neighbors = MovingNeighbors(3.0, 0.5)
    with pytest.raises(StructureError, match=r"structure 1 \(Cu4\): atom [13] and atom [13] are"):
        neighbors.connect(from_ase([bulk("Al"), copper]))
    with pytest.raises(StructureError, match=r"structure 1 \(Cu4\): atom 3 lies") as caught:
        neighbors.connect(from_ase([bulk("Al"), far]))
    assert caught.value.index == 1
    with pytest.raises(ValueError, match="skin must be"):
        MovingNeighbors(3.0, float("nan"))
