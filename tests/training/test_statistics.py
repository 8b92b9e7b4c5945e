"""What is wrong with a data set is found, and named with file and frame, before training."""

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from copper_experiment import labelled_copper

from atomeq.cli import main as command
from atomeq.data.copies import RADIUS
from atomeq.graph.builders import RadiusGraph
from atomeq.training.statistics import data_statistics


def statistics(**sets: list[Atoms]) -> dict:
    build = RadiusGraph(RADIUS)
    named = {
        name: [(f"{name}, frame {k}", build(atoms)) for k, atoms in enumerate(some)]
        for name, some in sets.items()
    }
    return json.loads(json.dumps(data_statistics(named)))


def with_labels(atoms: Atoms, energy: float, forces: np.ndarray) -> Atoms:
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return atoms


def turned(atoms: Atoms) -> Atoms:
    """The same crystal rotated, mirrored, with its atoms in another order and its cell doubled."""
    energy = atoms.get_potential_energy()
    copy = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
    copy.rotate(40, (1, 2, 3), rotate_cell=True)
    copy.set_cell(-copy.cell.array)
    copy.set_positions(-copy.positions)
    copy = copy[np.random.RandomState(0).permutation(len(copy))].repeat((2, 1, 1))
    return with_labels(copy, 2 * energy, np.zeros((len(copy), 3)))


def test_ranges_are_those_of_the_labels():
    frames = labelled_copper(6)
    one = statistics(train=frames)["sets"]["train"]
    energies = [atoms.get_potential_energy() / len(atoms) for atoms in frames]
    forces = np.concatenate([atoms.get_forces() for atoms in frames])
    assert one["structures"] == 6
    assert one["atoms"] == {"min": 4, "median": 6, "max": 8, "total": 36}
    assert one["elements"] == {"Cu": 6}
    assert one["labels"] == {"energy": 6, "forces": 6, "stress": 6}
    assert one["energy_per_atom_eV"]["min"] == pytest.approx(min(energies))
    assert one["energy_per_atom_eV"]["median"] == pytest.approx(np.median(energies))
    assert one["force_rms_eV_per_A"] == pytest.approx(np.sqrt((forces**2).mean()))
    assert one["force_max_eV_per_A"] == pytest.approx(np.linalg.norm(forces, axis=1).max())
    assert one["net_forces"] == 0
    assert one["volume_per_atom_A3"]["min"] == pytest.approx(
        min(atoms.get_volume() / len(atoms) for atoms in frames)
    )


def test_copies_are_found_whatever_was_done_to_them():
    frames = labelled_copper(6)
    assert statistics(train=frames)["copies"]["train"]["distinct"] == 6
    found = statistics(train=frames[:4], test=[frames[5], turned(frames[2])])
    assert found["copies"]["train"]["distinct"] == 4
    leak = found["leakage"]
    assert [(one["sets"], one["structures"]) for one in leak] == [(["train", "test"], 1)]
    assert leak[0]["example"] == ["train, frame 2", "test, frame 1"]


def test_charge_and_multiplicity_tell_structures_apart():
    water = Atoms("OH2", [[0, 0, 0], [0, 0, 0.96], [0.93, 0, -0.24]])
    frames = [water, *(water.copy() for _ in range(4)), Atoms("H"), Atoms("H")]
    told = [{}, {"charge": 1}, {"multiplicity": 3}, {"charge": 1, "spin": 2}, {"multiplicity": 1}]
    for atoms, info, energy in zip(frames, [*told, {}, {"charge": 1}], range(7), strict=True):
        atoms.info.update(info, energy=float(energy))
    found = statistics(train=frames[:2], test=frames[1:])
    assert found["copies"]["train"] == {"distinct": 2, "example": [], "contradicting": []}
    assert found["leakage"][0]["structures"] == 3  # a doublet is the lowest of the cation
    (pair,) = found["copies"]["test"]["contradicting"]
    assert pair["places"] == ["test, frame 0", "test, frame 2"]
    assert found["sets"]["test"]["electrons"] == {
        "charge 1": 3,
        "multiplicity 3": 1,
        "neutral": 2,
    }
    assert found["references"]["isolated_eV"] == {"H": 5.0}  # not that of the proton


def test_copies_with_other_labels_contradict():
    frames = labelled_copper(3)
    other = turned(frames[1])
    other.calc.results["energy"] += 0.5
    (found,) = statistics(train=[*frames, other])["copies"]["train"]["contradicting"]
    assert found["places"] == ["train, frame 1", "train, frame 3"]
    assert found["energy_eV_per_atom"] == pytest.approx(0.5 / len(other))


def test_outliers_and_net_forces_are_named():
    frames = labelled_copper(20)
    frames[3].calc.results["energy"] += 100.0
    forces = frames[7].get_forces()
    forces[0] = [200.0, 0.0, 0.0]
    frames[7].calc.results["forces"] = forces
    found = statistics(train=frames)
    places = {(far["place"], far["what"].partition(",")[0]) for far in found["outliers"]}
    assert places == {
        ("train, frame 3", "energy less that of elements"),
        ("train, frame 7", "longest force"),
    }
    assert found["sets"]["train"]["net_forces"] == 1


def test_the_energies_of_elements_are_fitted_and_their_freedom_is_told():
    water = Atoms("OH2", [[0, 0, 0], [0, 0, 0.96], [0.93, 0, -0.24]])
    oxygen = Atoms("O2", [[0, 0, 0], [0, 0, 1.2]])
    hydrogen = Atoms("H", info={"energy": -0.5})
    frames = [
        with_labels(water.copy(), -21.0, np.zeros((3, 3))),
        with_labels(oxygen, -38.0, np.zeros((2, 3))),
        hydrogen,
    ]
    references = statistics(train=frames)["references"]
    assert references["shift_eV"] == pytest.approx({"H": -1.0, "O": -19.0})
    assert references["isolated_eV"] == {"H": -0.5}
    assert references["undetermined"] == 0
    assert statistics(train=frames[:1])["references"]["undetermined"] == 1


def test_short_distances_come_first():
    short = Atoms("Cu2", [[0, 0, 0], [0, 0, 1.1]])
    found = statistics(train=[Atoms("OH", [[0, 0, 0], [0, 0, 0.97]]), short])["distances"]
    assert list(found) == ["Cu-Cu", "H-O"]
    assert found["Cu-Cu"]["short"]
    assert not found["H-O"]["short"]
    assert found["Cu-Cu"]["shortest_A"] == pytest.approx(1.1)
    assert found["Cu-Cu"]["place"] == "train, frame 1"


def test_the_command_reads_files_names_and_configurations(
    tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    frames = labelled_copper(8)
    folder = tmp_path / "cu"
    folder.mkdir()
    ase.io.write(folder / "train.extxyz", [*frames, turned(frames[0])])
    ase.io.write(folder / "test.extxyz", frames[:2])
    (folder / "LICENSE").write_text("of somebody")
    monkeypatch.setenv("ATOMEQ_DATA", str(tmp_path))
    command(["data", "stats", "cu"])
    printed = capsys.readouterr().out
    assert "copies: 1 structures of train repeat others (train.extxyz, frame 0" in printed
    assert "leak: 3 structures of train are copies of some in test" in printed

    node = {
        "class_path": "atomeq.data.datamodule.AtomisticDataModule",
        "init_args": {"train": "${ATOMEQ_DATA}/cu/train.extxyz", "split": {"val": 3, "seed": 1}},
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(node))
    (tmp_path / "experiment.yaml").write_text("data: data.yaml\n")
    command(["data", "stats", str(tmp_path / "experiment.yaml"), "--json"])
    sets = json.loads(capsys.readouterr().out)["sets"]
    assert {name: one["structures"] for name, one in sets.items()} == {"train": 6, "val": 3}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["no-such-set"], "there is no file or folder no-such-set"),
        (["{folder}"], "holds no files of structures"),
        (["{folder}", "--labels", "enegy=E"], "labels are given as"),
    ],
)
def test_wrong_words_are_one_line(tmp_path: Path, capsys, words: list[str], found: str):
    with pytest.raises(SystemExit) as stop:
        command(["data", "stats", *[word.format(folder=tmp_path) for word in words]])
    assert stop.value.code == 2
    assert found in capsys.readouterr().err


def test_leaks_of_a_published_division_are_found(data_folder: Path, capsys):
    files = [str(data_folder / "mlearn" / f"Ge_{part}.extxyz.gz") for part in ("train", "test")]
    command(["data", "stats", *files, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["copies"]["Ge_train"]["distinct"] == 188
    assert [one["sets"] for one in found["leakage"]] == [["Ge_train", "Ge_test"]]
