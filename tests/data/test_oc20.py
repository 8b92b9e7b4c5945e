"""OC20 frames: written and read in every format, in any order, in any process; damage is named."""

import json
import lzma
import os
import pickle
import re
import zlib
from pathlib import Path

import ase.db
import lmdb
import numpy as np
import pytest
import torch
from oc20 import slab_frames

from atomeq.data.ase_files import DataError
from atomeq.data.oc20 import PickledLmdb, open_frames
from atomeq.data.oc20_frame import OC20Frame
from atomeq.data.oc20_write import (
    FileFormat,
    _write_aselmdb,
    convert,
    metadata_file,
    write_metadata,
)

FLOAT32 = 1e-5  # Å and eV/Å: an LMDB holds positions below 32 Å and forces in float32
TEXT = 1e-8  # raw files hold eight decimals
ARRAYS = ("numbers", "positions", "cell", "tags", "fixed", "forces", "relaxed_positions")
NUMBERS = ("sid", "fid", "relaxed_energy", "initial_energy")


@pytest.fixture
def s2ef(tmp_path: Path) -> Path:
    """Five frames as ASE-LMDB, the format that loses nothing."""
    return written(tmp_path / "s2ef", slab_frames())


def written(folder: Path, frames: list[OC20Frame]) -> Path:
    folder.mkdir()
    _write_aselmdb(folder / "data.0000.aselmdb", frames)
    return folder


def assert_same(read: OC20Frame, frame: OC20Frame, tolerance: float) -> None:
    for name in ARRAYS:
        expected, value = getattr(frame, name), getattr(read, name)
        if expected is None:
            assert value is None
        else:
            np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance, err_msg=name)
            assert value.dtype == expected.dtype
    for name in NUMBERS:
        assert getattr(read, name) == getattr(frame, name), name


@pytest.mark.parametrize(
    ("file_format", "tolerance"), [("lmdb", FLOAT32), ("aselmdb", 0.0), ("raw", 2 * TEXT)]
)
def test_s2ef_comes_back_in_every_format(
    file_format: FileFormat, tolerance: float, s2ef: Path, tmp_path: Path
):
    assert convert(s2ef, tmp_path / "out", file_format=file_format, frames_per_file=2) == 5
    frames = open_frames(tmp_path / "out")
    assert len(frames) == 5
    for read, frame in zip(frames, slab_frames(), strict=True):
        assert_same(read, frame, tolerance)
        assert read.target() == pytest.approx(frame.target("referenced"), abs=1e-12)
        if file_format != "lmdb":
            assert read.target("total") == frame.energy
    with np.load(metadata_file(tmp_path / "out")) as metadata:
        assert metadata["natoms"].tolist() == [frame.n_atoms for frame in slab_frames()]
        assert metadata["elements"].tolist() == [1, 6, 8, 29, 47, 78]


@pytest.mark.parametrize("file_format", ["lmdb", "aselmdb"])
def test_is2re_comes_back(file_format: FileFormat, tmp_path: Path):
    initial = slab_frames(3, is2re=True)
    source = written(tmp_path / "source", initial)
    convert(source, tmp_path / "out", file_format=file_format)
    for read, frame in zip(open_frames(tmp_path / "out"), initial, strict=True):
        assert_same(read, frame, FLOAT32)
        assert read.target() == frame.relaxed_energy


def test_an_lmdb_gets_the_energy_that_is_asked_for(s2ef: Path, tmp_path: Path):
    convert(s2ef, tmp_path / "total", file_format="lmdb", energy="total")
    convert(s2ef, tmp_path / "referenced", file_format="lmdb", energy="referenced")
    frame = slab_frames()[3]
    assert open_frames(tmp_path / "total")[3].target() == frame.energy
    assert open_frames(tmp_path / "referenced")[3].target() == frame.target("referenced")
    with pytest.raises(DataError, match="energy='stored'"):
        open_frames(tmp_path / "total")[3].target("referenced")


def test_frames_come_in_any_order(s2ef: Path, tmp_path: Path):
    for file_format in ("lmdb", "aselmdb", "raw"):
        folder = tmp_path / file_format
        convert(s2ef, folder, file_format=file_format, frames_per_file=2)
        frames = open_frames(folder)
        assert [frames[k].sid for k in (4, 0, 3, 3, -1, 1)] == [1004, 1000, 1003, 1003, 1004, 1001]
        with pytest.raises(IndexError):
            frames[5]


def test_ase_reads_what_is_written(s2ef: Path):
    with ase.db.connect(s2ef / "data.0000.aselmdb", readonly=True) as database:
        rows = list(database.select())
    assert len(rows) == 5
    frame = slab_frames()[2]
    atoms = rows[2].toatoms()
    assert atoms.get_potential_energy() == frame.energy
    np.testing.assert_array_equal(atoms.constraints[0].index, np.flatnonzero(frame.fixed))
    assert rows[2].data["sid"] == "random1002"


def test_rows_deleted_by_ase_are_left_out(s2ef: Path):
    with ase.db.connect(s2ef / "data.0000.aselmdb") as database:
        database.delete([2, 4])
    assert [frame.sid for frame in open_frames(s2ef)] == [1000, 1002, 1004]


def test_frames_are_read_in_forked_and_pickled_copies(s2ef: Path, tmp_path: Path):
    """A worker opens the file for itself, whatever its parent has open."""
    convert(s2ef, tmp_path / "lmdb", file_format="lmdb")
    for folder in (s2ef, tmp_path / "lmdb"):
        frames = open_frames(folder)
        again = open_frames(folder)  # as a validation set may be
        assert frames[0].sid == again[0].sid == pickle.loads(pickle.dumps(frames))[0].sid
        loader = torch.utils.data.DataLoader(
            Sids(frames), batch_size=None, num_workers=2, multiprocessing_context="fork"
        )
        assert list(loader) == [1000, 1001, 1002, 1003, 1004]
        assert frames[4].sid == 1004


class Sids(torch.utils.data.Dataset):
    def __init__(self, frames: object) -> None:
        self.frames = frames
        self.parent = os.getpid()

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> int:
        assert os.getpid() != self.parent
        assert self.frames[index].sid == self.frames[index].sid
        return self.frames[index].sid


def test_an_environment_is_not_shared_over_a_fork(s2ef: Path):
    frames = open_frames(s2ef)
    file = frames._lmdbs[0]
    inherited = file.environment()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if file.environment() is not inherited and frames[1].sid == 1001 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert file.environment() is inherited


def test_older_names_of_labels_are_known(tmp_path: Path):
    from torch_geometric.data import Data

    record = Data(
        pos=torch.rand(2, 3),
        cell=torch.eye(3)[None],
        atomic_numbers=torch.tensor([29.0, 8.0]),
        natoms=2,
        y=-1.5,
        force=torch.ones(2, 3),
        sid=torch.LongTensor([7]),
    )
    path = put(tmp_path / "old.lmdb", {"0": pickle.dumps(record)})
    (frame,) = open_frames(path)
    assert (frame.energy, frame.sid, frame.numbers.tolist()) == (-1.5, 7, [29, 8])
    assert frame.forces is not None
    assert not frame.fixed.any()


def put(path: Path, values: dict[str, bytes]) -> Path:
    environment = lmdb.open(str(path), subdir=False, lock=False, map_size=2**24)
    with environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode(), value)
    environment.close()
    return path


BAD_RECORDS = {
    "no positions": ({"atomic_numbers": np.ones(2)}, "no field 'pos'"),
    "NaN": ({"pos": np.full((2, 3), np.nan)}, "NaN"),
    "too many forces": ({"forces": np.zeros((3, 3))}, r"forces has shape \(3, 3\)"),
    "text": ({"energy": "low"}, "'energy' is not numbers"),
    "two energies": ({"energy": np.zeros(2)}, "not one number"),
    "no system": ({"sid": "???"}, "not the name of a system"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_refused_by_file_and_frame(name: str, tmp_path: Path):
    from torch_geometric.data import Data

    changes, message = BAD_RECORDS[name]
    fields = {"pos": np.zeros((2, 3)), "cell": np.eye(3), "atomic_numbers": np.ones(2)}
    if name == "no positions":
        fields = {}
    stored = pickle.dumps(Data(**{**fields, **changes}))
    path = put(tmp_path / "bad.lmdb", {"0": stored, "length": pickle.dumps(1)})
    with pytest.raises(DataError, match=f"bad.lmdb, frame 0: .*{message}"):
        open_frames(path)[0]


def test_a_missing_record_is_refused(tmp_path: Path):
    path = put(tmp_path / "bad.lmdb", {"length": pickle.dumps(3)})
    with pytest.raises(DataError, match="frame 2: is missing"):
        PickledLmdb([path])[2]


def test_a_row_that_swells_is_refused(tmp_path: Path):
    """A hundred kilobytes of zeros, compressed, are a hundred megabytes of memory."""
    bomb = zlib.compress(b'{"numbers": "' + b"0" * 2**27 + b'"}')
    path = put(tmp_path / "bomb.aselmdb", {"1": bomb, "nextid": zlib.compress(b"2")})
    with pytest.raises(DataError, match="decompresses to more"):
        open_frames(path)[0]


@pytest.mark.parametrize(
    "row",
    [
        b"no json",
        b"[]",
        b'{"numbers": {"__ndarray__": [[2], "object", [1, 1]]}, "positions": []}',
        b'{"numbers": {"__ndarray__": [[99], "int64", [1]]}, "positions": []}',
        json.dumps(
            {
                "numbers": [1],
                "positions": [[0, 0, 0]],
                "constraints": [{"name": "FixAtoms", "kwargs": {"indices": [5]}}],
            }
        ).encode(),
    ],
)
def test_a_bad_row_is_refused(row: bytes, tmp_path: Path):
    values = {"1": zlib.compress(row), "nextid": zlib.compress(b"2")}
    with pytest.raises(DataError, match=r"bad.aselmdb, frame 0"):
        open_frames(put(tmp_path / "bad.aselmdb", values))[0]


def test_files_that_are_no_lmdb_are_refused(tmp_path: Path):
    (tmp_path / "text.lmdb").write_text("no database" * 1000)
    with pytest.raises(DataError, match="not an LMDB"):
        open_frames(tmp_path / "text.lmdb")
    with pytest.raises(DataError, match="no file or folder"):
        open_frames(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no OC20 data"):
        open_frames(tmp_path / "empty")


def test_damaged_raw_files_are_refused(s2ef: Path, tmp_path: Path):
    raw = tmp_path / "raw"
    convert(s2ef, raw, file_format="raw")
    whole = (raw / "0.extxyz.xz").read_bytes()
    text = lzma.decompress(whole)
    cases = {
        "cut short": whole[: len(whole) // 2],
        "ends within frame": lzma.compress(text[:-40]),
        "not extended XYZ": lzma.compress(b"hello\n" + text),
        "4 frames": lzma.compress(text[: text.rindex(b"\n14\n") + 1]),
        "cannot be read": lzma.compress(re.sub(rb"(\nCu +)\S+", rb"\1here", text, count=1)),
    }
    for message, damaged in cases.items():
        (raw / "0.extxyz.xz").write_bytes(damaged)
        with pytest.raises(DataError, match=f"0.extxyz.xz.*{message}"):
            open_frames(raw)[0]
    (raw / "0.extxyz.xz").write_bytes(whole)
    (raw / "0.txt.xz").write_bytes(lzma.compress(b"random1,frame2\nwhat\n"))
    with pytest.raises(DataError, match="'what'"):
        open_frames(raw)
    (raw / "0.txt.xz").unlink()
    with pytest.raises(DataError, match="beside it"):
        open_frames(raw)


def test_conversion_refuses_what_it_cannot_do(s2ef: Path, tmp_path: Path):
    with pytest.raises(DataError, match="not empty"):
        convert(s2ef, s2ef, file_format="lmdb")
    convert(s2ef, tmp_path / "lmdb", file_format="lmdb")
    with pytest.raises(DataError, match="reference_energy"):
        convert(tmp_path / "lmdb", tmp_path / "raw", file_format="raw")


def test_metadata_is_what_conversion_writes(s2ef: Path, tmp_path: Path):
    convert(s2ef, tmp_path / "lmdb", file_format="lmdb")
    with np.load(tmp_path / "lmdb" / "metadata.npz") as converted:
        kept = {name: converted[name] for name in converted.files}
    with np.load(write_metadata(tmp_path / "lmdb")) as metadata:
        for name, expected in kept.items():
            np.testing.assert_array_equal(metadata[name], expected)


def test_frames_become_atoms_with_their_labels():
    frame = slab_frames()[1]
    atoms = frame.to_atoms()
    assert atoms.get_potential_energy() == frame.energy
    np.testing.assert_array_equal(atoms.get_forces(apply_constraint=False), frame.forces)
    np.testing.assert_array_equal(atoms.get_tags(), frame.tags)
    assert atoms.info["sid"] == 1001
