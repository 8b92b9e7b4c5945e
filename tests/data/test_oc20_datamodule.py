"""OC20 frames in batches: the graphs are those of the frames, whatever the batch and the worker."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oc20 import slab_frames

from atomeq.data.ase_files import DataError
from atomeq.data.batching import BudgetBatchSampler
from atomeq.data.oc20 import open_frames
from atomeq.data.oc20_datamodule import FrameDataset, OC20DataModule, graph_of_frames
from atomeq.data.oc20_write import write_lmdb, write_metadata
from atomeq.graph.builders import NearestNeighborGraph, RadiusGraph

N_FRAMES = 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "lmdb"
    folder.mkdir()
    write_lmdb(folder / "data.0000.lmdb", slab_frames(N_FRAMES), "referenced")
    return folder


@pytest.fixture
def dataset(folder: Path) -> FrameDataset:
    return FrameDataset(open_frames(folder), NearestNeighborGraph(6.0, 8), name="slabs")


def test_a_batch_holds_the_graphs_of_its_frames(dataset: FrameDataset):
    batch = dataset.__getitems__([3, 0])
    assert batch.n_graphs == 2
    for graph, k in zip(batch.to_list(), (3, 0), strict=True):
        frame, alone = slab_frames()[k], dataset[k]
        for name in ("pos", "edge_index", "cell_offsets", "forces", "energy", "tags", "fixed"):
            assert torch.equal(graph[name], alone[name]), name
        assert graph.atomic_numbers.tolist() == frame.numbers.tolist()
        assert float(graph.energy) == frame.target("referenced")
        assert graph["fixed"].tolist() == frame.fixed.tolist()
        assert graph.pos.dtype == torch.float64
        assert int(torch.bincount(graph.edge_index[1]).max()) == 8


def test_sizes_and_elements_are_read_or_told(dataset: FrameDataset, folder: Path):
    expected = [frame.n_atoms for frame in slab_frames(N_FRAMES)]
    assert dataset.n_atoms.tolist() == expected
    assert dataset.elements == [1, 6, 8, 29, 47, 78]
    assert dataset.labels == {"energy", "forces"}
    assert [graph.n_atoms for graph in dataset.sample()] == expected
    with pytest.raises(DataError, match="max_atoms instead"):
        BudgetBatchSampler(dataset, max_edges=1000)
    sampler = BudgetBatchSampler(dataset, max_atoms=29, max_structures=8)
    assert list(sampler) == [[0, 1], [2], [3, 4]]


def test_frames_without_labels_have_none():
    frames = slab_frames(2)
    bare = [
        type(frame)(frame.numbers, frame.positions, frame.cell, frame.tags, frame.fixed)
        for frame in frames
    ]
    assert "energy" not in graph_of_frames(bare, labels=set())
    mixed = graph_of_frames([frames[0], bare[1]])
    assert torch.isfinite(mixed.energy).tolist() == [True, False]
    assert torch.isnan(mixed.forces[frames[0].n_atoms :]).all()


def attached(data: OC20DataModule) -> OC20DataModule:
    """A data module whose trainer has a model with a cutoff of 5 Å."""
    model = SimpleNamespace(graph_builder=lambda: RadiusGraph(5.0))
    task = SimpleNamespace(potential=SimpleNamespace(model=model))
    data.trainer = SimpleNamespace(  # pyright: ignore
        lightning_module=task, current_epoch=0, global_rank=0, world_size=1
    )
    return data


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_frame_comes_once_in_an_epoch(num_workers: int, folder: Path):
    write_metadata(folder)
    data = attached(
        OC20DataModule(str(folder), val=str(folder), max_structures=2, num_workers=num_workers)
    )
    data.setup("fit")
    energies = torch.cat([batch.energy for batch in data.train_dataloader()])
    expected = [frame.target("referenced") for frame in slab_frames(N_FRAMES)]
    assert sorted(energies.tolist()) == sorted(expected)
    val = torch.cat([batch.energy for batch in data.val_dataloader()])
    assert val.tolist() == expected


def test_sets_are_joined_in_their_order(folder: Path):
    data = attached(OC20DataModule(predict=[str(folder), str(folder)]))
    data.setup("predict")
    assert data.predict_set is not None
    assert len(data.predict_set) == 2 * N_FRAMES
    assert torch.equal(data.predict_set[7].pos, data.predict_set[2].pos)
    assert len(list(data.predict_set.frames)) == 2 * N_FRAMES


def test_metadata_of_other_data_is_refused(folder: Path):
    np.savez(folder / "metadata.npz", natoms=np.ones(7, dtype=np.int32))
    with pytest.raises(DataError, match="7 frames"):
        attached(OC20DataModule(str(folder))).setup("fit")
    (folder / "metadata.npz").write_bytes(b"nothing")
    with pytest.raises(DataError, match="damaged"):
        attached(OC20DataModule(str(folder))).setup("fit")


@pytest.mark.parametrize(
    ("stage", "needed"), [("fit", "train"), ("test", "test"), ("predict", "predict")]
)
def test_missing_data_are_named(stage: str, needed: str):
    with pytest.raises(DataError, match=f"data.{needed}"):
        attached(OC20DataModule()).setup(stage)
