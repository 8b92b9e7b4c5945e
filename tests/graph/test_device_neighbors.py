"""The search of whole batches on a device, CUDA or the CPU: the pairs of the search of one."""

import numpy as np
import pytest
import torch
from ase.build import bulk
from awkward import CUTOFFS, STRUCTURES

from atomeq.dynamics.state import prepare
from atomeq.graph import device_neighbors, moving
from atomeq.graph.device_neighbors import search_pairs, searches_on
from atomeq.graph.moving import MovingNeighbors
from atomeq.graph.neighbors import enclosed, neighbor_list

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def arrays(atoms):
    return atoms.positions, atoms.cell.array, np.asarray(atoms.pbc)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_pairs_of_a_batch_are_those_of_each_structure(cutoff, device):
    batch = {name: atoms for name, make in STRUCTURES.items() if len(atoms := make())}
    boxes = [enclosed(*arrays(atoms), cutoff) for atoms in batch.values()]
    found = search_pairs(boxes, cutoff, torch.device(device))
    for (name, atoms), (edge_index, cell_offsets) in zip(batch.items(), found, strict=True):
        wanted = neighbor_list(*arrays(atoms), cutoff)
        np.testing.assert_array_equal(edge_index.cpu(), wanted.edge_index, err_msg=name)
        np.testing.assert_array_equal(cell_offsets.cpu(), wanted.cell_offsets, err_msg=name)


def test_a_crowd_in_a_corner_of_the_cell_finds_room():
    atoms = bulk("Cu", cubic=True).repeat(3)
    atoms.set_cell(40 * np.eye(3))
    edge_index, _ = search_pairs([enclosed(*arrays(atoms), 6.0)], 6.0, CPU)[0]
    assert edge_index.shape[1] == neighbor_list(*arrays(atoms), 6.0).edge_index.shape[1]


def test_atoms_out_of_reach_have_no_pairs():
    atoms = bulk("Cu", a=9.0)
    edge_index, cell_offsets = search_pairs([enclosed(*arrays(atoms), 2.0)], 2.0, CPU)[0]
    assert (edge_index.shape, cell_offsets.shape) == ((2, 0), (0, 3))


def test_moving_neighbors_search_on_the_device(monkeypatch):
    graph = prepare([bulk("Cu", cubic=True).repeat(2), bulk("Al"), bulk("NaCl", "rocksalt", a=5.6)])
    expected = MovingNeighbors(4.3, 0.8)(graph)
    asked = []
    monkeypatch.setattr(moving, "searches_on", lambda device: True)
    monkeypatch.setattr(moving, "search_pairs", lambda *a: asked.append(a) or search_pairs(*a))
    edges = MovingNeighbors(4.3, 0.8)(graph)
    assert len(asked) == 1  # three structures at once
    assert torch.equal(edges.edge_index, expected.edge_index)
    assert torch.equal(edges.cell_offsets, expected.cell_offsets)


def test_a_cpu_is_searched_by_vesin():
    assert not searches_on(CPU)


def test_without_the_package_cuda_says_how_to_get_it(monkeypatch, caplog):
    monkeypatch.setattr(device_neighbors.importlib.util, "find_spec", lambda name: None)
    searches_on.cache_clear()
    assert not searches_on(torch.device("cuda"))
    assert "atomeq[cuda]" in caplog.text
    searches_on.cache_clear()
