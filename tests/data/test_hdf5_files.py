"""Structures come out of HDF5 as they went in, few at a time, in every process, and train alike."""

import pickle
from pathlib import Path

import ase.io
import h5py
import numpy as np
import pytest
import torch
from ase import Atoms
from copper_experiment import copper_file, experiment, labelled_copper  # noqa: F401
from torch.utils.data import DataLoader

from atomeq.cli import main as command
from atomeq.data.ase_files import DataError, LabelKeys, read_structures
from atomeq.data.batching import GraphDataset
from atomeq.data.hdf5_files import StoredDataset, StoredStructures, write_hdf5
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import RadiusGraph

BUILD = RadiusGraph(3.5)


def stored(tmp_path: Path, frames: list[Atoms], name: str = "set.h5") -> Path:
    ase.io.write(tmp_path / "set.extxyz", frames)
    write_hdf5(tmp_path / name, read_structures(tmp_path / "set.extxyz"))
    return tmp_path / name


def test_what_is_read_is_what_was_written(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("atomeq.data.hdf5_files._AT_ONCE", 4)  # fields appear after the first part
    frames = labelled_copper(10)
    frames[2].calc.results.pop("stress")
    frames[3].calc = None
    water = Atoms("OH2", [[0, 0, 0], [0, 0, 0.96], [0.93, 0, -0.24]], tags=[1, 2, 3])
    water.info["energy"] = -3.5
    frames.append(water)
    path = stored(tmp_path, frames)
    expected = list(read_structures(tmp_path / "set.extxyz"))
    again = list(read_structures(path, reader=_reader(path)))
    assert len(again) == len(expected)
    for one, other in zip(again, expected, strict=True):
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.cell.array, other.cell.array)
        np.testing.assert_array_equal(one.numbers, other.numbers)
        np.testing.assert_array_equal(one.pbc, other.pbc)
        results = {} if other.calc is None else other.calc.results
        found = {} if one.calc is None else one.calc.results
        assert set(found) - {"free_energy"} == set(results) - {"free_energy"}
        for key in set(results) & {"energy", "forces", "stress"}:
            np.testing.assert_allclose(found[key], results[key], rtol=1e-15, atol=1e-15)
    assert again[-1].get_tags().tolist() == [1, 2, 3]
    assert again[0].get_tags().tolist() == [0] * len(again[0])


def _reader(path: Path):
    from atomeq.data.molecule_files import reader_of

    reader = reader_of(path)
    assert reader is not None
    return reader


def test_batches_are_those_of_the_set_in_memory(tmp_path: Path):
    frames = labelled_copper(9)
    path = stored(tmp_path, frames)
    structures = list(read_structures(tmp_path / "set.extxyz"))
    memory = GraphDataset([BUILD(atoms) for atoms in structures])
    disk = StoredDataset(StoredStructures([path, path]).subset([8, 3, 9, 17]), BUILD)
    chosen = [8, 3, 0, 8]
    assert disk.n_atoms.tolist() == [memory[k].n_atoms for k in chosen]
    assert disk.labels == memory.labels == {"energy", "forces", "stress"}
    assert disk.elements == memory.elements == [29]
    batch, expected = disk.__getitems__([2, 0, 1]), memory.__getitems__([0, 8, 3])
    for name in ("pos", "edge_index", "cell_offsets", "energy", "forces", "stress", "weight"):
        torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=1e-15)
    assert batch["dataset_index"].tolist() == [2, 0, 1]
    assert disk.place(2) == f"{path}, frame 0"
    assert disk.place(3) == f"{path}, frame 8"
    with pytest.raises(DataError, match="max_atoms instead of"):
        _ = disk.n_edges


def test_every_process_opens_the_file_for_itself(tmp_path: Path):
    disk = StoredDataset(StoredStructures([stored(tmp_path, labelled_copper(6))]), BUILD)
    expected = disk.__getitems__([4, 1]).energy
    again = pickle.loads(pickle.dumps(disk))
    torch.testing.assert_close(again.__getitems__([4, 1]).energy, expected)
    loader = DataLoader(
        disk, batch_sampler=[[4, 1]] * 4, num_workers=2, collate_fn=lambda batch: batch
    )
    for batch in loader:  # of forked workers, after the parent has read from the file
        torch.testing.assert_close(batch.energy, expected)


@pytest.mark.usefixtures("copper_file")
def test_a_fit_from_disk_ends_as_one_from_memory(
    tmp_path: Path,
    experiment: Path,  # noqa: F811
    copper_file: Path,  # noqa: F811
):
    command(["data", "convert", str(copper_file), str(tmp_path / "cu.h5"), "--format", "hdf5"])
    last = []
    for name, more in (("memory", []), ("disk", [f"--data.train={tmp_path / 'cu.h5'}"])):
        root = f"--trainer.default_root_dir={tmp_path / name}"
        command(["fit", "-c", str(experiment), "--trainer.max_epochs=1", root, *more])
        path = tmp_path / name / "checkpoints" / "last.ckpt"
        last.append(torch.load(path, weights_only=True)["state_dict"])
    memory, disk = last
    for name, tensor in memory.items():
        torch.testing.assert_close(disk[name], tensor, rtol=1e-6, atol=1e-7)


def test_files_that_are_none_of_ours_are_refused(tmp_path: Path):
    (tmp_path / "text.h5").write_text("no HDF5")
    with pytest.raises(DataError, match="is no HDF5 file"):
        StoredStructures([tmp_path / "text.h5"])
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["energy"] = np.zeros(3)
    with pytest.raises(DataError, match="of another layout"):
        StoredStructures([tmp_path / "other.h5"])
    with pytest.raises(DataError, match="give it a suffix"):
        write_hdf5(tmp_path / "set.npz", iter(labelled_copper(1)))
    with pytest.raises(DataError, match="no structures to write"):
        write_hdf5(tmp_path / "empty.h5", iter([]))
    assert not (tmp_path / "empty.h5").exists()


def test_scalars_and_weights_come_along(tmp_path: Path):
    frames = labelled_copper(2)
    frames[0].info.update(gap=1.5, weight=3.0)
    ase.io.write(tmp_path / "set.extxyz", frames)
    write_hdf5(
        tmp_path / "set.h5",
        read_structures(tmp_path / "set.extxyz", labels=LabelKeys(scalar="gap")),
    )
    graph = StoredDataset(StoredStructures([tmp_path / "set.h5"]), BUILD).__getitems__([0, 1])
    assert graph.scalar[0] == 1.5
    assert torch.isnan(graph.scalar[1])
    assert graph.weight.tolist() == [3.0, 1.0]


def test_weights_of_labels_are_kept(tmp_path: Path):
    frames = labelled_copper(3)
    frames[1].info["forces_weight"] = 3.0
    ase.io.write(tmp_path / "some.extxyz", frames)
    write_hdf5(tmp_path / "some.h5", read_structures(tmp_path / "some.extxyz"))
    found = AtomGraph.concatenate(list(StoredStructures([tmp_path / "some.h5"])))
    assert found["forces_weight"].tolist() == [1.0, 3.0, 1.0]
