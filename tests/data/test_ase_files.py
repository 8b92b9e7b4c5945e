"""Every format gives the same labelled structures; damaged files are named with their frame."""

import gzip
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator

from atomeq.data.ase_files import (
    DataError,
    LabelKeys,
    atomic_number,
    read_isolated_atoms,
    read_structures,
    resolve_data_path,
)

STRESS = np.array([[1.0, 0.1, 0.2], [0.1, 2.0, 0.3], [0.2, 0.3, 3.0]]) * 1e-3


def structures(n: int = 3) -> list[Atoms]:
    made = []
    for k in range(n):
        atoms = Atoms(
            "CuO", positions=[[0, 0, 0], [1.8 + 0.01 * k, 0, 0]], cell=[5, 5, 5], pbc=True
        )
        forces = np.full((2, 3), 0.1 * k)
        stress = STRESS[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
        atoms.calc = SinglePointCalculator(atoms, energy=-1.5 - k, forces=forces, stress=stress)
        made.append(atoms)
    return made


def write(path: Path) -> None:
    if path.suffix in (".db", ".aselmdb"):
        with ase.db.connect(path) as database:
            for atoms in structures():
                database.write(atoms)
    else:
        ase.io.write(path, structures())


@pytest.mark.parametrize(
    "name", ["a.extxyz", "a.xyz", "a.extxyz.gz", "a.traj", "a.db", "a.aselmdb"]
)
def test_formats_agree(tmp_path: Path, name: str):
    write(tmp_path / name)
    read = list(read_structures(tmp_path / name))
    assert len(read) == 3
    for atoms, expected in zip(read, structures(), strict=True):
        np.testing.assert_allclose(atoms.positions, expected.positions, atol=1e-8)
        assert atoms.get_potential_energy() == pytest.approx(expected.get_potential_energy())
        np.testing.assert_allclose(atoms.get_forces(), expected.get_forces(), atol=1e-8)
        np.testing.assert_allclose(atoms.get_stress(voigt=False), STRESS, atol=1e-10)


def test_labels_are_found_under_the_names_that_are_given(tmp_path: Path):
    atoms = Atoms("CuO", positions=[[0, 0, 0], [1.8, 0, 0]], cell=[5, 5, 5], pbc=True)
    atoms.info |= {"REF_energy": -2.0, "REF_stress": STRESS.flatten(), "w": 3.0}
    atoms.arrays["REF_forces"] = np.ones((2, 3))
    ase.io.write(tmp_path / "a.extxyz", atoms)
    keys = LabelKeys(energy="REF_energy", forces="REF_forces", stress="REF_stress", weight="w")
    (read,) = read_structures(tmp_path / "a.extxyz", labels=keys)
    assert read.calc.results["energy"] == -2.0
    np.testing.assert_allclose(read.calc.results["forces"], 1.0)
    np.testing.assert_allclose(read.get_stress(voigt=False), STRESS, atol=1e-10)
    assert read.info["weight"] == 3.0


def test_a_structure_without_labels_has_none(tmp_path: Path):
    ase.io.write(tmp_path / "a.extxyz", Atoms("H"))
    (read,) = read_structures(tmp_path / "a.extxyz")
    assert read.calc is None


@pytest.mark.parametrize("name", ["a.extxyz", "a.extxyz.gz"])
def test_a_file_cut_short_is_named(tmp_path: Path, name: str):
    path = tmp_path / name
    ase.io.write(path, structures(20))
    content = path.read_bytes()
    path.write_bytes(content[: int(0.7 * len(content))])
    with pytest.raises(DataError, match=f"{name}, frame .*damaged or cut short"):
        list(read_structures(path))


def test_a_frame_with_nan_is_named(tmp_path: Path):
    bad = structures(3)
    bad[1].positions[0, 0] = np.nan
    ase.io.write(tmp_path / "a.extxyz", bad)
    with pytest.raises(DataError, match=r"a\.extxyz, frame 1"):
        list(read_structures(tmp_path / "a.extxyz"))


@pytest.mark.parametrize(
    ("label", "value", "message"),
    [
        ("energy", "high", "not numbers"),
        ("energy", np.nan, "NaN"),
        ("stress", np.zeros(4), "shape"),
        ("weight", -1.0, ">= 0"),
    ],
)
def test_a_bad_label_is_named(tmp_path: Path, label: str, value: object, message: str):
    atoms = Atoms("H", info={f"my_{label}": value})
    ase.io.write(tmp_path / "a.extxyz", [Atoms("H"), atoms])
    keys = LabelKeys(**{label: f"my_{label}"})
    with pytest.raises(DataError, match=rf"a\.extxyz, frame 1: label 'my_{label}'.*{message}"):
        list(read_structures(tmp_path / "a.extxyz", labels=keys))


def test_missing_empty_and_unknown_files_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no data file"):
        list(read_structures(tmp_path / "a.extxyz"))
    (tmp_path / "b.extxyz").write_text("")
    with pytest.raises(DataError, match=r"b\.extxyz"):
        list(read_structures(tmp_path / "b.extxyz"))
    (tmp_path / "c.nonsense").write_text("nothing")
    with pytest.raises(DataError, match=r"c\.nonsense is of no format"):
        list(read_structures(tmp_path / "c.nonsense"))
    with gzip.open(tmp_path / "d.extxyz.gz", "wb"):
        pass
    with pytest.raises(DataError, match=r"d\.extxyz"):
        list(read_structures(tmp_path / "d.extxyz.gz"))


def test_an_unset_variable_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ATOMEQ_DATA", raising=False)
    with pytest.raises(DataError, match=r"ATOMEQ_DATA, which is not set.*atomeq data download"):
        resolve_data_path("${ATOMEQ_DATA}/acac/train_300K.extxyz.gz")


def test_isolated_atoms(tmp_path: Path):
    atoms = [Atoms(symbol, info={"energy": e}) for symbol, e in (("H", -13.5), ("O", -2041.0))]
    ase.io.write(tmp_path / "e0.extxyz", atoms)
    assert read_isolated_atoms(tmp_path / "e0.extxyz") == {1: -13.5, 8: -2041.0}
    ase.io.write(tmp_path / "e0.extxyz", [*atoms, atoms[0]])
    with pytest.raises(DataError, match="frame 2: H occurs twice"):
        read_isolated_atoms(tmp_path / "e0.extxyz")
    ase.io.write(tmp_path / "e0.extxyz", structures())
    with pytest.raises(DataError, match="one atom"):
        read_isolated_atoms(tmp_path / "e0.extxyz")


def test_element_symbols():
    assert atomic_number("Cu") == 29
    with pytest.raises(DataError, match="'Xx' is not an element"):
        atomic_number("Xx")


def test_the_public_sets_read(data_folder: Path):
    counts = {
        "acac/train_300K.extxyz.gz": 500,
        "acac/test_H_transfer.extxyz": 15,
        "mvl_snap/Cu.extxyz.gz": 294,
    }
    for name, count in counts.items():
        assert sum(1 for _ in read_structures(data_folder / name)) == count


def test_kinds_of_configuration_have_weights(tmp_path: Path):
    path = tmp_path / "kinds.extxyz"
    frames = [Atoms("Cu", info={"tag": tag}) for tag in ("strained", "liquid", "strained")]
    frames[0].info["weight"] = 2.0
    ase.io.write(path, frames)
    labels = LabelKeys(kind="tag", kind_weights={"strained": 5.0})
    read = list(read_structures(path, labels=labels))
    assert [atoms.info["weight"] for atoms in read] == [10.0, 1.0, 5.0]
    with pytest.raises(DataError, match=r"frame 1.*weights are >= 0"):
        list(read_structures(path, labels=LabelKeys(kind="tag", kind_weights={"liquid": -1.0})))


def test_stress_components_may_stand_in_the_order_of_another_program(tmp_path: Path):
    atoms = bulk("Cu")
    in_vasps = np.array([1.0, 2.0, 3.0, 6.0, 4.0, 5.0]) * 1e-3  # xx yy zz xy yz xz
    atoms.calc = SinglePointCalculator(atoms, energy=0.0, stress=in_vasps)
    ase.io.write(tmp_path / "a.extxyz", atoms)
    keys = LabelKeys(stress_order="xx yy zz xy yz xz")
    (read,) = read_structures(tmp_path / "a.extxyz", labels=keys)
    np.testing.assert_allclose(read.get_stress(), np.array([1, 2, 3, 4, 5, 6]) * 1e-3, atol=1e-10)
    with pytest.raises(DataError, match="in an order"):
        LabelKeys(stress_order="xx yy zz")
