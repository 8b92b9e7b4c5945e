"""Builders: which edges they choose, and what they refuse."""

import copy
import pickle

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.neighborlist import neighbor_list as ase_neighbor_list

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import NearestNeighborGraph, RadiusGraph, nearest
from atomeq.graph.convert import StructureError, from_ase


def slab(seed=2):
    atoms = fcc111("Pt", (2, 2, 3), vacuum=6.0, periodic=True)
    add_adsorbate(atoms, molecule("CH3OH"), 2.1, "ontop")
    atoms.positions += np.random.default_rng(seed).normal(0, 0.04, atoms.positions.shape)
    return atoms


def rows(graph):
    return {
        (int(i), int(j), *offset)
        for (j, i), offset in zip(
            graph.edge_index.T.tolist(), graph.cell_offsets.tolist(), strict=True
        )
    }


def nearest_by_brute_force(atoms, cutoff, max_neighbors, strict):
    """OC20's rule, atom by atom."""
    i, j, offsets, d = ase_neighbor_list("ijSd", atoms, cutoff)
    kept = set()
    for atom in range(len(atoms)):
        mine = sorted(
            (d[e] ** 2, int(j[e]), *offsets[e].tolist()) for e in np.flatnonzero(i == atom)
        )
        if strict:
            mine = mine[:max_neighbors]
        elif len(mine) > max_neighbors:
            limit = mine[max_neighbors][0] + 0.01
            mine = [edge for edge in mine if edge[0] <= limit]
        kept |= {(atom, *edge[1:]) for edge in mine}
    return kept


def test_radius_graph_has_all_pairs_within_the_cutoff():
    graph = RadiusGraph(4.7)(slab())
    i, j, offsets = ase_neighbor_list("ijS", slab(), 4.7)
    wanted = {(int(a), int(b), *s) for a, b, s in zip(i, j, offsets.tolist(), strict=True)}
    assert rows(graph) == wanted
    assert graph.n_edges == len(i)


@pytest.mark.parametrize("builder", [RadiusGraph(4.7), NearestNeighborGraph(6.1, 9)], ids=repr)
def test_edges_are_sorted_by_target_source_and_offset(builder):
    graph = builder([slab(), bulk("Cu")])
    keys = np.column_stack([graph.edge_index[1], graph.edge_index[0], graph.cell_offsets])
    np.testing.assert_array_equal(keys, keys[np.lexsort(keys.T[::-1])])


def test_a_batch_has_the_edges_of_its_structures():
    structures = [slab(), molecule("H2O"), bulk("Cu"), Atoms("He")]
    builder = RadiusGraph(3.9)
    batch = builder(structures)
    joined = AtomGraph.concatenate([RadiusGraph(3.9)(atoms) for atoms in structures])
    assert torch.equal(batch.edge_index, joined.edge_index)
    assert torch.equal(batch.cell_offsets, joined.cell_offsets)
    again = builder(structures)
    assert torch.equal(batch.edge_index, again.edge_index)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("max_neighbors", [1, 5, 20])
def test_nearest_neighbors_equal_brute_force_on_a_slab(max_neighbors, strict):
    graph = NearestNeighborGraph(6.0, max_neighbors, strict=strict)(slab())
    assert rows(graph) == nearest_by_brute_force(slab(), 6.0, max_neighbors, strict)
    degrees = torch.bincount(graph.edge_index[1])
    assert (degrees == max_neighbors).all() if strict else (degrees > max_neighbors).all()


def test_non_strict_keeps_whole_shells_of_a_perfect_lattice():
    # fcc shells hold 12, 6, 24 atoms: a cap of 14 falls into the second.
    copper = bulk("Cu", a=3.6) * (2, 2, 2)
    loose = NearestNeighborGraph(6.1, 14, strict=False)(copper)
    assert torch.bincount(loose.edge_index[1]).tolist() == [18] * 8
    strict = NearestNeighborGraph(6.1, 14)(copper)
    assert torch.bincount(strict.edge_index[1]).tolist() == [14] * 8


def test_non_strict_keeps_one_more_than_the_cap_where_distances_differ():
    graph = NearestNeighborGraph(6.0, 14, strict=False)(slab())
    degrees = torch.bincount(graph.edge_index[1])
    assert degrees.min() == 15


def test_ties_are_broken_by_source_and_offset_whatever_rounding_says():
    copper = bulk("Cu", a=3.6, cubic=True) * (2, 2, 2)
    builder = NearestNeighborGraph(6.1, 15)
    here = builder(copper)
    copper.positions += [0.123456, -0.0471, 0.3101]
    there = builder(copper)
    assert torch.equal(here.edge_index, there.edge_index)
    assert torch.equal(here.cell_offsets, there.cell_offsets)


def test_atoms_with_fewer_neighbors_than_the_cap_keep_all():
    for strict in (True, False):
        graph = NearestNeighborGraph(5.0, 20, strict=strict)(molecule("CH4"))
        assert graph.n_edges == 5 * 4


@pytest.mark.parametrize("builder", [RadiusGraph(3.0), NearestNeighborGraph(3.0, 5)], ids=repr)
def test_an_isolated_atom_is_a_graph_without_edges(builder):
    graph = builder(Atoms("He", [[0, 0, 0]]))
    assert graph.edge_index.shape == (2, 0)
    assert graph.cell_offsets.shape == (0, 3)
    assert graph.edge_vectors().shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_asked_for_and_edges_fit_it(dtype):
    graph = RadiusGraph(4.0)(slab(), dtype=dtype)
    assert graph.pos.dtype == graph.cell.dtype == dtype
    assert graph.edge_vectors().norm(dim=-1).max() < 4.0 + 1e-5


def test_a_graph_keeps_its_dtype_gradient_and_labels_and_gets_new_edges():
    graph = RadiusGraph(4.0)(slab(), dtype=torch.float32).replace(energy=torch.zeros(1))
    pos = graph.pos.clone().requires_grad_()
    again = RadiusGraph(3.0)(graph.replace(pos=pos))
    assert again.pos.dtype == torch.float32
    assert again.n_edges < graph.n_edges
    assert "energy" in again
    again.edge_vectors().sum().backward()
    assert pos.grad is not None


@pytest.mark.parametrize("builder", [RadiusGraph(3.0), NearestNeighborGraph(3.0, 5)])
def test_builders_copy_and_pickle(builder):
    graph = builder(slab())
    for other in (copy.deepcopy(builder), pickle.loads(pickle.dumps(builder))):
        assert repr(other) == repr(builder)
        assert torch.equal(other(slab()).edge_index, graph.edge_index)


def test_overlapping_atoms_are_refused_by_structure_and_pair():
    atoms = bulk("Cu", cubic=True)
    atoms.positions[3] = atoms.positions[1]
    with pytest.raises(StructureError, match=r"structure 1 \(Cu4\): atom \d and atom \d") as caught:
        RadiusGraph(3.0)([bulk("Al"), atoms])
    assert caught.value.index == 1
    with pytest.raises(StructureError, match="apart"):
        NearestNeighborGraph(3.0, 2)(atoms)


def test_a_structure_that_cannot_be_searched_is_refused_by_name():
    atoms = bulk("Cu", cubic=True)
    atoms.positions[3, 0] = 1e12
    with pytest.raises(StructureError, match=r"structure 1 \(Cu4\): atom 3 lies"):
        RadiusGraph(3.0)([bulk("Al"), atoms])


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="cutoff"):
        RadiusGraph(-1.0)
    with pytest.raises(ValueError, match="cutoff"):
        NearestNeighborGraph(float("inf"), 3)
    with pytest.raises(ValueError, match="max_neighbors"):
        NearestNeighborGraph(3.0, 0)


def test_inputs_are_left_alone():
    atoms = slab()
    before = atoms.copy()
    graph = from_ase(atoms)
    fields = set(graph.keys())
    RadiusGraph(4.0)(atoms)
    RadiusGraph(4.0)(graph)
    NearestNeighborGraph(4.0, 3)(graph)
    assert atoms == before
    assert set(graph.keys()) == fields


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("max_neighbors", [1, 5, 12, 20, 60])
def test_neighbours_are_those_of_the_whole_cutoff(
    structures: list[Atoms], max_neighbors: int, strict: bool
):
    """The search begins in a smaller sphere; in perfect crystals it may end within a shell."""
    perfect = [bulk("Cu", cubic=True), bulk("Po", "sc", a=3.3).repeat(2), bulk("Si")]
    for atoms in [*structures, *perfect]:
        graph = NearestNeighborGraph(9.0, max_neighbors, strict=strict)(atoms)
        whole = RadiusGraph(9.0)(atoms)
        lengths = whole.edge_vectors().norm(dim=1).numpy()
        keep = nearest(whole.edge_index[1].numpy(), lengths, max_neighbors, strict=strict)
        assert np.array_equal(graph.edge_index.numpy(), whole.edge_index.numpy()[:, keep])
        assert np.array_equal(graph.cell_offsets.numpy(), whole.cell_offsets.numpy()[keep])
