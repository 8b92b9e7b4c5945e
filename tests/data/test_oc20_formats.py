"""Samples of every format, written by the field's reference tools, hold what truth.json says."""

import json
from pathlib import Path

import numpy as np
import pytest

from atomeq.data.ase_files import DataError
from atomeq.data.oc20 import open_frames

FLOAT32 = 1e-6
TEXT = 1e-8
FORMATS = {
    "s2ef_raw": TEXT,
    "s2ef_uncompressed": TEXT,
    "s2ef_lmdb_train_ref": FLOAT32,
    "s2ef_lmdb_train_total": FLOAT32,
    "s2ef_lmdb_train_edges": FLOAT32,
    "s2ef_lmdb_test": FLOAT32,
    "is2re_lmdb_train": FLOAT32,
    "aselmdb_train": 0.0,
}


@pytest.fixture(scope="module")
def truth(formats_folder: Path) -> list[dict]:
    return json.loads((formats_folder / "truth.json").read_text())


@pytest.mark.parametrize("name", FORMATS)
def test_structures_are_true(name: str, formats_folder: Path, truth: list[dict]):
    frames = open_frames(formats_folder / name)
    assert len(frames) == len(truth)
    for frame, true in zip(frames, truth, strict=True):
        np.testing.assert_array_equal(frame.numbers, true["numbers"])
        np.testing.assert_array_equal(frame.tags, true["tags"])
        np.testing.assert_array_equal(frame.fixed, np.array(true["fixed"], dtype=bool))
        np.testing.assert_allclose(frame.cell, true["cell"], rtol=0, atol=FORMATS[name])
        # The reference writer of LMDBs wraps atoms into the cell.
        shift = (frame.positions - true["positions"]) @ np.linalg.inv(true["cell"])
        np.testing.assert_allclose(shift, np.round(shift), rtol=0, atol=FORMATS[name])
        if "lmdb" not in name or name.startswith("aselmdb"):
            np.testing.assert_array_equal(np.round(shift), 0)
        assert frame.sid == int(true["sid"].removeprefix("random"))
        assert frame.fid == (None if name.startswith("is2re") else true["fid"])


@pytest.mark.parametrize("name", FORMATS)
def test_labels_are_true(name: str, formats_folder: Path, truth: list[dict]):
    for frame, true in zip(open_frames(formats_folder / name), truth, strict=True):
        if name == "s2ef_lmdb_test":
            assert frame.target() is None
            assert frame.forces is None
        elif name == "is2re_lmdb_train":
            assert frame.target() == true["y_relaxed"]
            assert frame.initial_energy == pytest.approx(true["energy_ref"], abs=1e-12)
            np.testing.assert_allclose(
                frame.relaxed_positions, true["pos_relaxed"], rtol=0, atol=FLOAT32
            )
        else:
            # The hardest pair pushes with 294 eV/Å, of which float32 has five decimals.
            np.testing.assert_allclose(
                frame.forces, true["forces"], rtol=1e-7 if FORMATS[name] else 0, atol=FORMATS[name]
            )


@pytest.mark.parametrize("name", ["s2ef_raw", "s2ef_uncompressed", "aselmdb_train"])
def test_files_with_a_reference_give_both_energies(
    name: str, formats_folder: Path, truth: list[dict]
):
    for frame, true in zip(open_frames(formats_folder / name), truth, strict=True):
        assert frame.target("total") == true["energy_total"]
        assert frame.target("referenced") == pytest.approx(true["energy_ref"], abs=TEXT)
        assert frame.target() == frame.target("referenced")


def test_lmdbs_give_the_energy_they_were_written_with(formats_folder: Path, truth: list[dict]):
    for name, key in (("train_ref", "energy_ref"), ("train_total", "energy_total")):
        frames = open_frames(formats_folder / f"s2ef_lmdb_{name}")
        for frame, true in zip(frames, truth, strict=True):
            assert frame.target() == pytest.approx(true[key], abs=TEXT)
            with pytest.raises(DataError):
                frame.target("referenced")
