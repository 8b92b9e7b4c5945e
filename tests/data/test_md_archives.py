"""Frames of MD17, rMD17 and MD22 as published, their units, and the divisions of rMD17."""

from pathlib import Path

import numpy as np
import pytest

from atomeq.data.ase_files import DataError, read_structures
from atomeq.data.molecule_files import reader_of
from atomeq.data.splits import Split, split_indices
from atomeq.units import KCAL_PER_MOL

N_FRAMES = 4


def arrays() -> list[np.ndarray]:
    rng = np.random.RandomState(0)
    pos = np.array([[0, 0, 0], [0, 0, 1.0], [0, 1.0, 0]]) + rng.normal(0, 0.01, (N_FRAMES, 3, 3))
    numbers = np.array([8, 1, 1], dtype=np.uint8)
    return [numbers, pos, rng.normal(-47000, 1, N_FRAMES), rng.normal(size=(N_FRAMES, 3, 3))]


def written(path: Path, names: str, **more: object) -> Path:
    np.savez(path, **dict(zip(names.split(), arrays(), strict=True)), **more)
    return path


def read(path: Path) -> list:
    return list(read_structures(path, reader=reader_of(path)))


@pytest.mark.parametrize("names", ["z R E F", "nuclear_charges coords energies forces"])
def test_frames_have_energies_and_forces_in_our_units(tmp_path: Path, names: str):
    found = read(written(tmp_path / "frames.npz", names))
    numbers, pos, energies, forces = arrays()
    assert len(found) == N_FRAMES
    for k, atoms in enumerate(found):
        assert (atoms.numbers == numbers).all()
        assert not atoms.pbc.any()
        np.testing.assert_array_equal(atoms.positions, pos[k])
        assert atoms.get_potential_energy() == pytest.approx(energies[k] * KCAL_PER_MOL)
        np.testing.assert_allclose(atoms.get_forces(), forces[k] * KCAL_PER_MOL)


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        ("z R E G", {}, "neither z, R, E, F"),
        ("z R E F", {"e_unit": "Hartree"}, "e_unit Hartree"),
        ("z R F E", {}, "not of the same frames"),
    ],
)
def test_what_is_no_such_archive_is_refused(tmp_path: Path, names, more, message):
    with pytest.raises(DataError, match=message):
        read(written(tmp_path / "frames.npz", names, **more))


def test_nothing_pickled_is_read(tmp_path: Path):
    path = tmp_path / "frames.npz"
    numbers, pos, energies, _ = arrays()
    np.savez(path, z=numbers, R=pos, E=energies, F=np.array([{"a": 1}] * N_FRAMES, dtype=object))
    with pytest.raises(DataError, match="allow_pickle"):
        read(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="damaged"):
        read(path)


def test_a_division_of_rmd17_is_taken_as_published(tmp_path: Path):
    (tmp_path / "index_train_03.csv").write_text("\n".join(map(str, [9, 3, 7, 1, 5])) + "\n")
    (tmp_path / "index_test_03.csv").write_text("0\n2\n")
    split = Split(file=str(tmp_path / "index_train_03.csv"), val=2, seed=1)
    parts = split_indices(10, split)
    assert parts["test"] == [0, 2]
    assert sorted(parts["train"] + parts["val"]) == [1, 3, 5, 7, 9]
    assert len(parts["val"]) == 2
    with pytest.raises(DataError, match="names structure 9"):
        split_indices(9, split)
    (tmp_path / "other.csv").write_text("1\n")
    with pytest.raises(DataError, match="index_train_01"):
        split_indices(10, Split(file=str(tmp_path / "other.csv")))


def test_so_many_train_and_the_rest_is_left_out():
    parts = split_indices(100, Split(val=10, test=20, train=30, seed=0))
    whole = split_indices(100, Split(val=10, test=20, seed=0))
    assert len(parts["train"]) == 30
    assert set(parts["train"]) < set(whole["train"])
    assert (parts["val"], parts["test"]) == (whole["val"], whole["test"])
    with pytest.raises(DataError, match="too few"):
        split_indices(50, Split(val=10, test=20, train=30))
    with pytest.raises(ValueError, match="1 or more"):
        Split(train=0)
