"""Neighbours of a batch in motion: those of a fresh search, whatever is remembered."""

import numpy as np
import pytest
import torch
from analytic_potentials import cluster
from structures import RATTLED

from atomeq.dynamics.state import prepare
from atomeq.graph.builders import RadiusGraph
from atomeq.graph.moving import MovingNeighbors

CUTOFF = 4.3


def assert_fresh(neighbors, graph):
    edges = neighbors(graph)
    fresh = RadiusGraph(CUTOFF)(graph)
    assert torch.equal(edges.edge_index, fresh.edge_index)
    assert torch.equal(edges.cell_offsets, fresh.cell_offsets)


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


def test_structures_that_leave_and_return_are_recognised():
    graph = prepare([make() for make in RATTLED.values()])
    neighbors = MovingNeighbors(CUTOFF, 0.8)
    for systems in ([0, 1, 2], [2, 0], [1], [0, 1, 2]):
        assert_fresh(neighbors, graph.take(torch.tensor(systems)))
    assert neighbors.n_searches == 2  # the third is a molecule


def test_a_small_molecule_is_never_searched():
    graph = prepare([cluster(9, 1), cluster(3, 2)])
    neighbors = MovingNeighbors(CUTOFF, 0.0)
    for scale in (1.0, 1.5, 0.7, 30.0):
        assert_fresh(neighbors, graph.replace(pos=scale * graph.pos))
    assert neighbors.n_searches == 0


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
