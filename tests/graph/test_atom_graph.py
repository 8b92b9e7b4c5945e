"""AtomGraph: batching by us and by PyG, selection, strain, casts."""

import pickle

import pytest
import torch
from ase.build import bulk, fcc111, molecule
from torch.utils.data import DataLoader as TorchLoader
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import RadiusGraph
from atomeq.graph.pyg import from_pyg, to_pyg

# float64 rounding of a few additions of numbers of order 10.
ROUNDING = 1e-13


def structures():
    slab = fcc111("Pt", (2, 2, 3), vacuum=6.0)
    slab.rattle(0.05, seed=1)
    return [bulk("Cu", cubic=True), molecule("H2O"), slab, molecule("CH4")]


def single_graphs():
    builder = RadiusGraph(cutoff=3.3)
    graphs = [builder(atoms) for atoms in structures()]
    generator = torch.Generator().manual_seed(3)
    return [
        graph.replace(
            energy=torch.randn(1, generator=generator, dtype=torch.float64),
            forces=torch.randn(graph.n_atoms, 3, generator=generator, dtype=torch.float64),
            # PyG takes the fields of the first graph for all; only concatenate fills in.
            tags=None,
        )
        for graph in graphs
    ]


def with_hyperedges(graph, pairs):
    index = torch.tensor(pairs).T
    return graph.replace(
        hyperedge_index=index, num_hyperedges=torch.tensor([int(index[1].max()) + 1])
    )


def assert_equal(one, other):
    assert set(one.keys()) == set(other.keys())
    for name in one.keys():  # noqa: SIM118
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def by_pyg(graphs):
    """Graphs as PyG joins them."""
    return from_pyg(Batch.from_data_list([to_pyg(graph) for graph in graphs]))


def test_a_single_structure_is_a_batch_of_one():
    graph = AtomGraph(torch.zeros(2, 3), torch.tensor([1, 8]))
    assert (graph.n_atoms, graph.n_graphs, graph.n_edges) == (2, 1, 0)
    assert graph.natoms.tolist() == [2]
    assert graph.batch.tolist() == [0, 0]
    assert graph.cell.shape == (1, 3, 3)
    assert not graph.pbc.any()


def test_natoms_and_batch_follow_from_each_other():
    pos, numbers = torch.zeros(3, 3), torch.ones(3, dtype=torch.int64)
    by_counts = AtomGraph(pos, numbers, natoms=torch.tensor([1, 2]))
    by_batch = AtomGraph(pos, numbers, batch=torch.tensor([0, 1, 1]))
    assert_equal(by_counts, by_batch)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cell": torch.zeros(3, 3)}, "cell has shape"),
        ({"pbc": torch.zeros(3, dtype=torch.bool)}, "pbc has shape"),
        ({"natoms": torch.tensor([3])}, "natoms"),
        ({"atomic_numbers": torch.tensor([1])}, "atomic_numbers has shape"),
        ({"atomic_numbers": None}, "needs atomic_numbers"),
    ],
)
def test_shapes_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AtomGraph(**{"pos": torch.zeros(2, 3), "atomic_numbers": torch.tensor([1, 1]), **fields})


def test_edge_vectors_without_edges_say_how_to_get_them():
    with pytest.raises(ValueError, match="RadiusGraph"):
        AtomGraph(torch.zeros(1, 3), torch.tensor([1])).edge_vectors()


def test_edge_vectors_of_a_batch_are_those_of_its_structures():
    singles = single_graphs()
    batch = AtomGraph.concatenate(singles)
    vectors = torch.cat([graph.edge_vectors() for graph in singles])
    torch.testing.assert_close(batch.edge_vectors(), vectors, rtol=0, atol=0)
    assert batch.edge_vectors().norm(dim=-1).max() < 3.3


def test_concatenate_and_pyg_give_the_same():
    singles = single_graphs()
    ours = AtomGraph.concatenate(singles)
    assert_equal(ours, by_pyg(singles))
    (loaded,) = DataLoader([to_pyg(graph) for graph in singles], batch_size=len(singles))
    assert_equal(ours, from_pyg(loaded))
    assert loaded.num_graphs == len(singles)


def test_loaders_of_pytorch_join_graphs():
    singles = single_graphs()
    loader = TorchLoader(singles, batch_size=4, collate_fn=AtomGraph.concatenate, num_workers=1)
    (loaded,) = loader
    assert_equal(loaded, AtomGraph.concatenate(singles))


def test_pyg_batches_graphs_of_many_structures():
    singles = single_graphs()
    parts = [AtomGraph.concatenate(singles[:2]), AtomGraph.concatenate(singles[2:])]
    theirs = Batch.from_data_list([to_pyg(part) for part in parts])
    assert_equal(AtomGraph.concatenate(singles), from_pyg(theirs))
    for part, back in zip(parts, theirs.to_data_list(), strict=True):
        assert_equal(part, from_pyg(back))


def test_a_field_hides_no_method():
    graph = single_graphs()[0]
    with pytest.raises(ValueError, match="volume"):
        graph.replace(volume=torch.ones(1))
    assert "pos=[4, 3]" in repr(graph)


def test_selection_undoes_concatenation():
    singles = single_graphs()
    batch = AtomGraph.concatenate(singles)
    for k, (single, back) in enumerate(zip(singles, batch.to_list(), strict=True)):
        assert_equal(single, back)
        assert_equal(single, batch.graph(k))
    assert_equal(singles[-1], batch.graph(-1))
    with pytest.raises(IndexError, match="structure 4 of a graph with 4"):
        batch.graph(4)


def test_selection_works_on_unsorted_edges():
    batch = AtomGraph.concatenate(single_graphs())
    order = torch.randperm(batch.n_edges, generator=torch.Generator().manual_seed(0))
    shuffled = batch.replace(
        edge_index=batch.edge_index[:, order], cell_offsets=batch.cell_offsets[order]
    )
    for single, back in zip(batch.to_list(), shuffled.to_list(), strict=True):
        torch.testing.assert_close(
            single.edge_vectors().norm(dim=-1).sort().values,
            back.edge_vectors().norm(dim=-1).sort().values,
        )


def test_hyperedges_are_shifted_by_atoms_and_hyperedges():
    singles = single_graphs()[1:3]
    singles = [
        with_hyperedges(singles[0], [(0, 0), (1, 0), (0, 1), (2, 1), (1, 2)]),
        with_hyperedges(singles[1], [(5, 0), (11, 0)]),
    ]
    batch = AtomGraph.concatenate(singles)
    assert batch.hyperedge_index[:, -2:].tolist() == [[8, 14], [3, 3]]
    assert batch.num_hyperedges.tolist() == [3, 1]
    assert_equal(batch, by_pyg(singles))
    for single, back in zip(singles, batch.to_list(), strict=True):
        assert_equal(single, back)


def test_graphs_without_hyperedges_join_those_with():
    plain, other = single_graphs()[1:3]
    batch = AtomGraph.concatenate([plain, with_hyperedges(other, [(5, 0), (11, 0)])])
    assert batch.num_hyperedges.tolist() == [0, 1]
    assert batch.hyperedge_index.tolist() == [[8, 14], [0, 0]]


def test_missing_labels_are_nan_and_missing_tags_zero():
    labelled, plain = single_graphs()[:2]
    plain = plain.replace(energy=None, forces=None)
    tagged = labelled.replace(tags=torch.full((4,), 2), weight=torch.full((1,), 3.0))
    batch = AtomGraph.concatenate([plain, tagged])
    assert batch.energy.isnan().tolist() == [True, False]
    assert batch.forces.isnan().all(dim=1).tolist() == [True] * 3 + [False] * 4
    assert batch.tags.tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert batch.weight.tolist() == [1.0, 3.0]


def test_other_fields_follow_their_length():
    singles = [
        graph.replace(
            charges=torch.rand(graph.n_atoms),
            dipole=torch.rand(1, 3),
            edge_weights=torch.rand(graph.n_edges, 2),
        )
        for graph in single_graphs()
    ]
    batch = AtomGraph.concatenate(singles)
    for single, back in zip(singles, batch.to_list(), strict=True):
        assert_equal(single, back)
    with pytest.raises(ValueError, match="'odd'"):
        batch.replace(odd=torch.zeros(5)).to_list()


def test_a_field_without_neutral_value_must_be_in_all_graphs():
    one, other = single_graphs()[:2]
    with pytest.raises(ValueError, match="graph 1 has no 'charges'"):
        AtomGraph.concatenate([one.replace(charges=torch.zeros(4)), other])
    with pytest.raises(ValueError, match="empty list"):
        AtomGraph.concatenate([])


def test_structures_without_atoms_keep_their_place():
    empty = AtomGraph(torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
    water = AtomGraph(torch.rand(3, 3, dtype=torch.float64), torch.tensor([8, 1, 1]))
    batch = AtomGraph.concatenate([water, empty, water])
    assert batch.natoms.tolist() == [3, 0, 3]
    assert batch.batch.tolist() == [0, 0, 0, 2, 2, 2]
    assert_equal(batch, by_pyg([water, empty, water]))


def test_strain_deforms_positions_and_cell_by_its_symmetric_part():
    batch = AtomGraph.concatenate(single_graphs())
    strain = 0.01 * torch.randn(
        4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    strained = batch.strained(strain)
    for k, (before, after) in enumerate(zip(batch.to_list(), strained.to_list(), strict=True)):
        deformation = torch.eye(3, dtype=torch.float64) + (strain[k] + strain[k].T) / 2
        torch.testing.assert_close(after.pos, before.pos @ deformation)
        torch.testing.assert_close(after.cell[0], before.cell[0] @ deformation)
        torch.testing.assert_close(after.edge_vectors(), before.edge_vectors() @ deformation)


def test_strain_is_differentiable_twice_in_positions_and_strain():
    graph = AtomGraph.concatenate(single_graphs()[1:3])

    def stretched(pos, strain):
        vectors = graph.replace(pos=pos).strained(strain).edge_vectors()
        return vectors.square().sum(dim=-1).sqrt().sum()

    pos = graph.pos.clone().requires_grad_()
    strain = torch.zeros(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stretched, (pos, strain))
    assert torch.autograd.gradgradcheck(stretched, (pos, strain))


def test_the_strain_derivative_of_the_volume_is_the_volume_times_identity():
    graph = single_graphs()[0]
    strain = torch.zeros(1, 3, 3, dtype=torch.float64, requires_grad=True)
    graph.strained(strain).volume().sum().backward()
    torch.testing.assert_close(
        strain.grad, graph.volume()[:, None, None] * torch.eye(3, dtype=torch.float64)
    )


def test_a_molecule_has_no_volume():
    assert single_graphs()[1].volume().tolist() == [0.0]


def test_casts_touch_floats_only_and_energy_stays_exact():
    graph = single_graphs()[0]
    cast = graph.to(torch.float32)
    assert cast.pos.dtype == cast.cell.dtype == cast.forces.dtype == torch.float32
    assert cast.energy.dtype == torch.float64
    assert cast.edge_index.dtype == cast.cell_offsets.dtype == torch.int64
    assert cast.pbc.dtype == torch.bool
    assert graph.pos.dtype == torch.float64
    moved = graph.to("meta", dtype=torch.float32)
    assert moved.pos.device.type == "meta"
    assert moved.pos.dtype == torch.float32
    assert graph.pos.device.type == "cpu"
    assert graph.to("meta", "pos").cell.device.type == "cpu"


def test_nothing_changes_its_input():
    singles = single_graphs()
    before = [pickle.loads(pickle.dumps(graph)) for graph in singles]
    batch = AtomGraph.concatenate(singles)
    batch.strained(torch.ones(4, 3, 3, dtype=torch.float64))
    batch.to(torch.float32)
    batch.replace(pos=None)
    for single in batch.to_list():
        single.replace(energy=None)
    by_pyg(singles)
    for graph, old in zip(singles, before, strict=True):
        assert_equal(graph, old)


def test_a_graph_survives_pickling():
    for graph in single_graphs():
        assert_equal(pickle.loads(pickle.dumps(graph)), graph)
        assert_equal(from_pyg(pickle.loads(pickle.dumps(to_pyg(graph)))), graph)


def test_edge_vectors_trace_as_one_graph():
    graph = AtomGraph.concatenate(single_graphs())

    def lengths(graph):
        return graph.strained(torch.zeros(4, 3, 3, dtype=torch.float64)).edge_vectors().norm(dim=-1)

    traced = torch.compile(lengths, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(graph), lengths(graph), rtol=0, atol=ROUNDING)
