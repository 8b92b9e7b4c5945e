"""Structures come out of HDF5 and Zarr as they went in, in every process, and train alike."""

import json
import pickle
from importlib.util import find_spec
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
from atomeq.data.datamodule import AtomisticDataModule
from atomeq.data.stored_files import StoredDataset, StoredStructures, write_stored
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import RadiusGraph

BUILD = RadiusGraph(3.5)
needs_zarr = pytest.mark.skipif(find_spec("zarr") is None, reason="Zarr is the extra atomeq[zarr]")
both = pytest.mark.parametrize("name", ["set.h5", pytest.param("set.zarr", marks=needs_zarr)])


def stored(tmp_path: Path, frames: list[Atoms], name: str) -> Path:
    ase.io.write(tmp_path / "set.extxyz", frames)
    write_stored(tmp_path / name, read_structures(tmp_path / "set.extxyz"))
    return tmp_path / name


@both
def test_what_is_read_is_what_was_written(tmp_path: Path, monkeypatch, name: str):
    monkeypatch.setattr("atomeq.data.stored_files._AT_ONCE", 4)  # fields come and go by parts
    monkeypatch.setattr("atomeq.data.stored_files._CHUNK", 2)
    monkeypatch.setattr("atomeq.data.zarr_files._SHARD", 2)
    frames = labelled_copper(10)
    frames[2].calc.results.pop("stress")
    frames[3].calc = None
    water = Atoms("OH2", [[0, 0, 0], [0, 0, 0.96], [0.93, 0, -0.24]], tags=[1, 2, 3])
    water.info["energy"] = -3.5
    frames.append(water)
    path = stored(tmp_path, frames, name)
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


@both
def test_batches_are_those_of_the_set_in_memory(tmp_path: Path, name: str):
    frames = labelled_copper(9)
    path = stored(tmp_path, frames, name)
    structures = list(read_structures(tmp_path / "set.extxyz"))
    memory = GraphDataset([BUILD(atoms) for atoms in structures])
    disk = StoredDataset(StoredStructures([path, path]).subset([8, 3, 9, 17]), BUILD)
    chosen = [8, 3, 0, 8]
    assert disk.n_atoms.tolist() == [memory[k].n_atoms for k in chosen]
    assert disk.labels == memory.labels == {"energy", "forces", "stress"}
    assert disk.elements == memory.elements == [29]
    batch, expected = disk.__getitems__([2, 0, 1]), memory.__getitems__([0, 8, 3])
    for field in ("pos", "edge_index", "cell_offsets", "energy", "forces", "stress", "weight"):
        torch.testing.assert_close(batch[field], expected[field], rtol=0, atol=1e-15)
    assert batch["dataset_index"].tolist() == [2, 0, 1]
    assert disk.place(2) == f"{path}, frame 0"
    assert disk.place(3) == f"{path}, frame 8"
    with pytest.raises(DataError, match="max_atoms instead of"):
        _ = disk.n_edges


@both
def test_every_process_opens_the_file_for_itself(tmp_path: Path, name: str):
    disk = StoredDataset(StoredStructures([stored(tmp_path, labelled_copper(6), name)]), BUILD)
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
    command(["data", "convert", str(copper_file), str(tmp_path / "cu.h5")])
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
        write_stored(tmp_path / "set.npz", iter(labelled_copper(1)))
    with pytest.raises(DataError, match="no structures to write"):
        write_stored(tmp_path / "empty.h5", iter([]))
    assert not (tmp_path / "empty.h5").exists()


@needs_zarr
def test_a_store_of_other_things_than_numbers_is_refused(tmp_path: Path):
    path = stored(tmp_path, labelled_copper(3), "set.zarr")
    file = path / "pos" / "zarr.json"
    good = json.loads(file.read_text())
    plain = good["codecs"][0]["configuration"]

    def refused(match: str, **other: object) -> None:
        file.write_text(json.dumps({**good, **other}))
        with pytest.raises(DataError, match=match):
            StoredStructures([path])

    refused("pos is stored as fixed_length_utf32;", data_type="fixed_length_utf32")
    refused("stored as .*name.*numpy.datetime64", data_type={"name": "numpy.datetime64"})
    refused("stored as pickle;", codecs=[{"name": "pickle"}])
    inner = {**plain, "codecs": [*plain["codecs"], {"name": "numcodecs.pickle"}]}
    sharded = [{**good["codecs"][0], "configuration": inner}]
    refused("stored as numcodecs.pickle;", codecs=sharded)
    index = [{**good["codecs"][0], "configuration": {**plain, "index_codecs": [{"name": "own"}]}}]
    refused("stored as own;", codecs=index)
    refused("something transformed", storage_transformers=[{"name": "any"}])
    refused("is no Zarr array of format 3", zarr_format=2)
    refused("is no Zarr array of format 3", node_type="group")
    refused("is no Zarr array of format 3", codecs="pickle")
    file.write_text(json.dumps(good))
    assert len(StoredStructures([path])) == 3
    root = json.loads((path / "zarr.json").read_text())  # what it says of arrays is not believed
    hidden = {**good, "data_type": "fixed_length_utf32"}
    told = {"kind": "inline", "must_understand": False, "metadata": {"pos": hidden}}
    (path / "zarr.json").write_text(json.dumps({**root, "consolidated_metadata": told}))
    assert StoredStructures([path])[0].pos.dtype == torch.float64
    (path / "pos" / "c" / "0" / "0").unlink()  # which Zarr reads as zeros
    with pytest.raises(DataError, match="has 0 of its 1 chunks"):
        StoredStructures([path])


@needs_zarr
def test_stores_of_other_layouts_are_refused_and_only_stores_are_replaced(tmp_path: Path):
    zarr = pytest.importorskip("zarr")
    zarr.open_group(tmp_path / "other.zarr", mode="w", zarr_format=3)
    with pytest.raises(DataError, match="is Zarr of another layout"):
        StoredStructures([tmp_path / "other.zarr"])
    zarr.open_group(tmp_path / "old.zarr", mode="w", zarr_format=2)
    with pytest.raises(DataError, match="is no Zarr group of format 3"):
        StoredStructures([tmp_path / "old.zarr"])
    with pytest.raises(DataError, match="exists and is no Zarr store"):
        write_stored(tmp_path / "old.zarr", iter(labelled_copper(1)))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_stored(tmp_path / "nowhere" / "set.zarr", iter(labelled_copper(1)))
    with pytest.raises(DataError, match="no structures to write"):
        write_stored(tmp_path / "other.zarr", iter([]))
    write_stored(tmp_path / "other.zarr", iter(labelled_copper(2)))
    assert len(StoredStructures([tmp_path / "other.zarr"])) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.zarr", "other.zarr"]


@needs_zarr
@pytest.mark.usefixtures("copper_file")
def test_zarr_is_converted_counted_and_streamed(
    tmp_path: Path,
    copper_file: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
):
    path = tmp_path / "cu.zarr"
    command(["data", "convert", str(copper_file), str(path)])
    with pytest.raises(SystemExit):
        command(["data", "convert", str(copper_file), str(path)])
    assert "--overwrite" in capsys.readouterr().err
    command(["data", "convert", str(copper_file), str(path), "--overwrite"])
    capsys.readouterr()
    for source in (path, tmp_path):  # a set, and a folder of sets
        command(["data", "stats", str(source), "--json"])
        assert json.loads(capsys.readouterr().out)["sets"]["cu"]["structures"] == 24
    train = AtomisticDataModule(train=str(path)).structures()["train"]
    assert isinstance(train, StoredStructures)


def test_the_suffix_says_the_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ase.io.write(tmp_path / "set.extxyz", labelled_copper(1))
    for target, told in (("set.zarr", "hdf5"), ("set.h5", "lmdb"), ("folder", "zarr")):
        words = [str(tmp_path / "set.extxyz"), str(tmp_path / target), "--format", told]
        with pytest.raises(SystemExit):
            command(["data", "convert", *words])
        assert f"{target} as {told}: of suffixes .h5 is hdf5" in capsys.readouterr().err
        assert not (tmp_path / target).exists()


def test_scalars_and_weights_come_along(tmp_path: Path):
    frames = labelled_copper(2)
    frames[0].info.update(gap=1.5, weight=3.0)
    ase.io.write(tmp_path / "set.extxyz", frames)
    write_stored(
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
    write_stored(tmp_path / "some.h5", read_structures(tmp_path / "some.extxyz"))
    found = AtomGraph.concatenate(list(StoredStructures([tmp_path / "some.h5"])))
    assert found["forces_weight"].tolist() == [1.0, 3.0, 1.0]
