import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from atomeq.graph.builders import RadiusGraph
from atomeq.graph.rewiring import oriented_copies, without_tag_0


def test_without_tag_0_is_the_graph_of_the_other_atoms(slab):
    builder = RadiusGraph(4.0)
    smaller, kept = without_tag_0(builder([slab, slab]))
    expected = builder([slab[slab.get_tags() != 0]] * 2)
    assert kept.tolist() == [*(slab.get_tags() != 0)] * 2
    for name in ("pos", "atomic_numbers", "natoms", "batch", "edge_index", "cell_offsets", "tags"):
        torch.testing.assert_close(smaller[name], expected[name], rtol=0, atol=0)


def test_without_tag_0_needs_tags(copper):
    with pytest.raises(ValueError, match="needs tags"):
        without_tag_0(RadiusGraph(3.0)(copper).replace(tags=None))


def test_without_tag_0_refuses_to_empty_a_structure(slab, copper):
    copper.set_tags(0)
    with pytest.raises(ValueError, match="structure 1 has only atoms with tag 0"):
        without_tag_0(RadiusGraph(3.0)([slab, copper]))


def test_oriented_copies_are_the_graphs_of_turned_structures(slab, molecules):
    builder = RadiusGraph(4.0)
    structures = [slab, molecules[0]]
    turns = Rotation.random(6, rng=np.random.default_rng(0)).as_matrix().reshape(3, 2, 3, 3)
    copies = oriented_copies(builder(structures), torch.tensor(turns))
    turned = []
    for copy in turns:
        for atoms, matrix in zip(structures, copy, strict=True):
            other = atoms.copy()
            other.set_cell(atoms.cell.array @ matrix)
            other.positions = atoms.positions @ matrix
            turned.append(other)
    expected = builder(turned)
    for name in ("pos", "cell", "edge_index", "cell_offsets", "batch", "natoms", "atomic_numbers"):
        torch.testing.assert_close(copies[name], expected[name], rtol=0, atol=1e-12)


def test_oriented_copies_repeat_hyperedges(molecules):
    graph = RadiusGraph(3.0)(molecules[:2]).replace(
        hyperedge_index=torch.tensor([[0, 1, 9, 10], [0, 0, 1, 1]]),
        num_hyperedges=torch.tensor([1, 1]),
        energy=torch.zeros(2),
    )
    copies = oriented_copies(graph, torch.eye(3, dtype=torch.float64).expand(2, 2, 3, 3))
    n = graph.n_atoms
    assert copies.hyperedge_index.tolist() == [
        [0, 1, 9, 10, n, n + 1, n + 9, n + 10],
        [0, 0, 1, 1, 2, 2, 3, 3],
    ]
    assert copies.num_hyperedges.tolist() == [1, 1, 1, 1]
    assert "energy" not in copies
