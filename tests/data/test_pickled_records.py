"""Records are read as torch_geometric wrote them; a pickle that wants more runs nothing."""

import builtins
import collections
import copyreg
import io
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from atomeq.data.ase_files import DataError
from atomeq.data.pickled_records import read_count, read_record

REFUSED = "no OC20 record needs"


def dumped(value: object) -> bytes:
    return pickle.dumps(value, protocol=-1)


class Calls:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple:
        return self.reduced


def storage_bytes(tensor: torch.Tensor) -> bytes:
    """What torch pickles of a tensor's storage."""
    reduced = tensor.__reduce_ex__(2)[1][0]
    return reduced.__reduce__()[1][0]


def tensor_of(storage: bytes, offset: object, size: object, stride: object) -> Calls:
    inner = Calls(torch.storage._load_from_bytes, storage)
    hooks = collections.OrderedDict()
    return Calls(torch._utils._rebuild_tensor_v2, inner, offset, size, stride, False, hooks)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.uint8, torch.int32, torch.int64, torch.bool],
    ids=str,
)
def test_tensors_come_back(dtype: torch.dtype, protocol: int):
    tensor = (10 * torch.rand(4, 3)).to(dtype)
    data = Data(pos=tensor, turned=tensor.T, part=tensor[1:, 2], number=3, name="a", nothing=None)
    record = read_record(pickle.dumps(data, protocol=protocol))
    assert set(record) == {"pos", "turned", "part", "number", "name"}
    np.testing.assert_array_equal(record["pos"], tensor.numpy())
    np.testing.assert_array_equal(record["turned"], tensor.numpy().T)
    np.testing.assert_array_equal(record["part"], tensor.numpy()[1:, 2])
    assert record["pos"].dtype == tensor.numpy().dtype
    assert (record["number"], record["name"]) == (3, "a")


@pytest.mark.parametrize("protocol", [4, 5])
def test_numpy_comes_back(protocol: int):
    array = np.arange(12.0).reshape(3, 4)
    data = Data(energy=np.float64(-1.5), c=array, f=np.asfortranarray(array), count=np.int32(7))
    record = read_record(pickle.dumps(data, protocol=protocol))
    assert record["energy"] == -1.5
    assert record["count"] == 7
    np.testing.assert_array_equal(record["c"], array)
    np.testing.assert_array_equal(record["f"], array)


def test_tensors_that_share_a_storage_come_back():
    base = torch.arange(6.0)
    record = read_record(dumped(Data(a=base[:3], b=base[3:])))
    np.testing.assert_array_equal(record["b"], [3.0, 4.0, 5.0])


def test_records_of_torch_geometric_before_2_come_back():
    """Their Data had its fields as plain attributes, absent ones None."""
    old = Data.__new__(Data)
    pos = torch.rand(3, 3)
    vars(old).update(x=None, edge_index=None, pos=pos, y=-1.0, __num_nodes__=3)
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=4)
    pickler.dispatch_table = {Data: lambda d: (copyreg.__newobj__, (Data,), dict(vars(d)))}
    pickler.dump(old)
    record = read_record(stream.getvalue())
    assert set(record) == {"pos", "y"}
    np.testing.assert_array_equal(record["pos"], pos.numpy())


def test_counts_come_back():
    assert read_count(dumped(5)) == 5
    assert read_count(dumped(np.int64(5))) == 5
    for wrong in (-1, "5", True, 5.5, [5]):
        with pytest.raises(DataError, match="not a count"):
            read_count(dumped(wrong))


@pytest.fixture
def harmed(tmp_path: Path) -> Path:
    """A file that only code from a pickle would make."""
    return tmp_path / "harmed"


def harms(harmed: Path) -> dict[str, object]:
    command = f"open({str(harmed)!r}, 'w')"
    return {
        "eval": Calls(eval, command),
        "exec": Calls(exec, command),
        "system": Calls(os.system, f"touch {harmed}"),
        "import": Calls(__import__, "os"),
        "open": Calls(open, str(harmed), "w"),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "map": Calls(map, eval, [command]),
        "load": Calls(torch.load, str(harmed)),
        "numpy": Calls(np.load, str(harmed)),
        "in a field": Data(pos=Calls(eval, command)),
        "in hooks": Calls(collections.OrderedDict, [(1, Calls(eval, command))]),
        "as a storage": Calls(torch.storage._load_from_bytes, Calls(eval, command)),
    }


@pytest.mark.parametrize("name", list(harms(Path())))
def test_a_malicious_pickle_runs_nothing(name: str, harmed: Path, monkeypatch):
    stored = dumped(harms(harmed)[name])

    def never(*args: object) -> None:
        pytest.fail("something was called")

    for module, function in ((os, "system"), (torch, "load"), (np, "load")):
        monkeypatch.setattr(module, function, never)
    with pytest.raises(DataError):
        read_record(stored)
    with pytest.raises(DataError):
        read_count(stored)
    assert not harmed.exists()


def test_a_pickle_inside_a_storage_runs_nothing(harmed: Path):
    """torch reads storages with an unpickler of its own, which may run anything."""
    for evil in (Calls(eval, f"open({str(harmed)!r}, 'w')"), Calls(os.system, f"touch {harmed}")):
        with pytest.raises(DataError, match=REFUSED):
            read_record(dumped(Data(pos=tensor_of(dumped(evil), 0, (1,), (1,)))))
        saved = io.BytesIO()
        torch.save({"a": evil}, saved, _use_new_zipfile_serialization=False)
        with pytest.raises(DataError, match=REFUSED):
            read_record(dumped(Data(pos=tensor_of(saved.getvalue(), 0, (1,), (1,)))))
    assert not harmed.exists()


@pytest.mark.parametrize(
    "names",
    [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("os", "system"),
        ("posix", "system"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch_geometric.data.data", "os"),
        ("torch_geometric.data.data", "Data.__init__"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "fromfile"),
        ("collections", "OrderedDict.__class__"),
        ("atomeq.data.pickled_records", "read_record"),
    ],
    ids=".".join,
)
def test_a_name_that_is_not_on_the_list_is_refused(names: tuple[str, str]):
    opcodes = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(name)]) + name.encode() for name in names)
    with pytest.raises(DataError, match=REFUSED):
        read_record(opcodes + b"\x93.")
    with pytest.raises(DataError, match=REFUSED):
        read_record(f"c{names[0]}\n{names[1]}\n.".encode())


STORAGE = storage_bytes(torch.arange(6.0))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (0, (2, 3), (4, 1)),
        (0, (10**12,), (0,)),
        (0, (10**6, 10**6), (0, 0)),
        (0, (2,), (10**18,)),
        (10**18, (1,), (1,)),
        (-1, (1,), (1,)),
        (5, (2,), (-1,)),
        (0, (-1,), (1,)),
        (0, (2, 3), (3,)),
        (0, (1,) * 9, (1,) * 9),
        (0, (2.0,), (1,)),
        (0, (True,), (1,)),
        ("0", (1,), (1,)),
        (0, [1], [1]),
        (0, 1, 1),
        (0, ("1",), (1,)),
    ],
    ids=str,
)
def test_a_tensor_beyond_its_storage_is_refused(offset: object, size: object, stride: object):
    with pytest.raises(DataError, match=r"tensor|called"):
        read_record(dumped(Data(pos=tensor_of(STORAGE, offset, size, stride))))


def test_empty_tensors_and_tensors_that_fill_their_storage_come_back():
    assert read_record(dumped(Data(a=tensor_of(STORAGE, 6, (0, 3), (3, 1)))))["a"].shape == (0, 3)
    np.testing.assert_array_equal(
        read_record(dumped(Data(a=tensor_of(STORAGE, 1, (5,), (1,)))))["a"], np.arange(1.0, 6.0)
    )


@pytest.mark.parametrize("cut", [1, 8, 20, len(STORAGE) - 1])
def test_a_storage_cut_short_is_refused(cut: int):
    with pytest.raises(DataError):
        read_record(dumped(Data(pos=tensor_of(STORAGE[:cut], 0, (6,), (1,)))))


def test_a_storage_that_lies_about_its_size_is_refused():
    count = struct.pack("<q", 6)
    at = STORAGE.rindex(count + struct.pack("<f", 0.0))
    for lie in (5, 7, 2**60, -1):
        lying = STORAGE[:at] + struct.pack("<q", lie) + STORAGE[at + 8 :]
        with pytest.raises(DataError, match="storage"):
            read_record(dumped(Data(pos=tensor_of(lying, 0, (1,), (1,)))))


@pytest.mark.parametrize(
    "value",
    [
        Calls(np.dtype, "O"),
        Calls(np.dtype, [("a", "f8")]),
        Calls(np.dtype, "V1000000000"),
        np.array([object()]),
        np.array(["text"]),
        np.zeros(2, dtype=[("a", "f8")]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_arrays_of_anything_but_numbers_are_refused(value: object):
    with pytest.raises((DataError, AttributeError)):
        read_record(dumped(Data(field=value)))


def test_allowed_names_cannot_be_changed_by_a_pickle():
    """BUILD with a pair of dicts sets attributes on whatever is on the stack."""
    build = (
        b"\x80\x04\x8c\x0ctorch._utils\x8c\x12_rebuild_tensor_v2\x93(N}\x8c\x05_name\x8c\x01xstb."
    )
    record = b"\x80\x04\x8c\x19torch_geometric.data.data\x8c\x04Data\x93(N}\x8c\x01a\x8c\x01xstb."
    for stored in (build, record):
        with pytest.raises(DataError):
            read_record(stored)
    assert read_record(dumped(Data(pos=torch.ones(2))))["pos"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "stored", [b"", b"junk", b"\x80\x04.", dumped(Data(a=torch.ones(3)))[:-40]]
)
def test_damaged_records_are_refused(stored: bytes):
    with pytest.raises(DataError):
        read_record(stored)


def test_nothing_of_builtins_is_on_the_list():
    for name in vars(builtins):
        with pytest.raises(DataError):
            read_record(f"cbuiltins\n{name}\n.".encode())
