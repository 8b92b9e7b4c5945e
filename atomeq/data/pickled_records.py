"""Reads the pickled records of OC20's LMDBs without executing anything that is in them.

Those records are pickles of torch_geometric's ``Data``. Here every name that such a pickle may use
stands for a builder of our own that makes plain NumPy arrays, dictionaries and numbers; any other
name is refused before it is looked up, so neither torch nor any foreign function is ever called.
"""

import io
import math
import pickle
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from atomeq.data.ase_files import DataError

_SCALAR_TYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"]
_STORAGE_TYPES = {
    "ByteStorage": "u1",
    "CharStorage": "i1",
    "ShortStorage": "i2",
    "IntStorage": "i4",
    "LongStorage": "i8",
    "HalfStorage": "f2",
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "BoolStorage": "b1",
}
# torch.save's legacy stream: magic number and protocol version, each a pickle.
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_MAX_DIMENSIONS = 8


class RefusedPickle(pickle.UnpicklingError):
    """A pickle that asks for a name, or has a shape, which no OC20 record has."""


def read_record(stored: bytes) -> dict[str, Any]:
    """Return the fields of one pickled ``Data``, of torch_geometric before or after 2.0.

    Args:
        stored: The value of an LMDB.

    Returns:
        NumPy arrays, numbers and strings by field name; what was None is left out.

    Raises:
        DataError: It is no such pickle, damaged, or names anything else. Nothing in it has run.
    """
    record = _read(stored)
    if not isinstance(record, _Record):
        raise DataError(f"is a pickled {type(record).__name__}, not a record of OC20")
    fields = record.fields()
    wrong = [k for k, v in fields.items() if not isinstance(v, np.ndarray | int | float | str)]
    if wrong:
        raise DataError(f"field {wrong[0]!r} is a {type(fields[wrong[0]]).__name__}, not numbers")
    return fields


def read_count(stored: bytes) -> int:
    """Return a pickled count, such as the value of the key ``length``.

    Raises:
        DataError: It is not a count.
    """
    count = _read(stored)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise DataError(f"is {count!r}, not a count")
    return count


def _read(stored: bytes) -> Any:
    try:
        return _RecordUnpickler(io.BytesIO(stored)).load()
    except RefusedPickle as error:
        raise DataError(str(error)) from error
    except Exception as error:  # damaged pickles raise anything, from EOFError to KeyError
        raise DataError(f"is damaged ({type(error).__name__}: {error})") from error


class _Record:
    """Stands for torch_geometric's Data and its storage: it keeps the state it is given."""

    __slots__ = ("state",)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise RefusedPickle(f"the state of a record is a {type(state).__name__}, not a dict")
        self.state: dict[str, Any] = state

    def fields(self) -> dict[str, Any]:
        """Return the fields, wherever the version of torch_geometric kept them."""
        fields = self.state
        store = fields.get("_store")
        if isinstance(store, _Record):  # since 2.0; before, fields were plain attributes
            fields = store.state.get("_mapping", {})
        if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
            raise RefusedPickle("the fields of a record are not named")
        return {
            key: value.array if isinstance(value, _Array) else value
            for key, value in fields.items()
            if value is not None and not key.startswith("_")
        }


class _Builder:
    """Stands for a function that pickles call. It cannot be given a state, so it stays as it is."""

    __slots__ = ("_build", "_name")

    def __init__(self, name: str, build: Callable[..., Any]) -> None:
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_build", build)

    def __call__(self, *args: Any) -> Any:
        try:
            return self._build(*args)
        except RefusedPickle:
            raise
        except (TypeError, ValueError, OverflowError, MemoryError) as error:
            raise RefusedPickle(f"{self._name} is called as it never should be: {error}") from error

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise RefusedPickle(f"the pickle tries to change {self._name}")

    def __setstate__(self, state: Any) -> NoReturn:
        raise RefusedPickle(f"the pickle tries to change {self._name}")


class _Storage:
    """The numbers of one or several tensors, flat."""

    __slots__ = ("values",)

    def __init__(self, values: NDArray) -> None:
        self.values = values


def _build_tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, *rest: Any
) -> NDArray:
    if not isinstance(storage, _Storage) or len(rest) > 1:
        raise RefusedPickle("a tensor is made of something that is not a storage")
    if not (_are_counts(size) and _are_counts(stride) and _are_counts((offset,))):
        raise RefusedPickle(f"a tensor has size {size!r}, stride {stride!r} and offset {offset!r}")
    if len(size) != len(stride):
        raise RefusedPickle(f"a tensor has size {size} and stride {stride}")
    values = storage.values
    n_values = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # An expanded tensor (stride 0) of any size would fit a storage of one number; none is in OC20.
    if n_values > len(values) or (n_values and last >= len(values)):
        raise RefusedPickle(
            f"a tensor of size {size}, stride {stride} and offset {offset} does not fit its "
            f"storage of {len(values)} numbers"
        )
    if n_values == 0:
        return np.empty(size, values.dtype)
    itemsize = values.dtype.itemsize
    view = np.ndarray(
        size, values.dtype, values, offset * itemsize, tuple(step * itemsize for step in stride)
    )
    return np.ascontiguousarray(view).reshape(size)


def _are_counts(numbers: Any) -> bool:
    """Whether it is a short tuple of numbers >= 0 and of no other type."""
    return (
        isinstance(numbers, tuple)
        and len(numbers) <= _MAX_DIMENSIONS
        and all(type(number) is int and number >= 0 for number in numbers)
    )


def _build_storage(stored: Any) -> _Storage:
    """Read one storage from torch.save's legacy stream, which is how torch pickles tensors."""
    if not isinstance(stored, bytes):
        raise RefusedPickle("a storage is not made of bytes")
    stream = io.BytesIO(stored)
    magic, protocol, _, (type_name, key, count), keys = (
        _StorageUnpickler(stream).load() for _ in range(5)
    )
    if (magic, protocol) != (_MAGIC_NUMBER, _PROTOCOL_VERSION) or keys != [key]:
        raise RefusedPickle("a storage is not one that torch saved")
    dtype = np.dtype("<" + _STORAGE_TYPES[type_name])
    start = stream.tell() + 8
    if stored[start - 8 : start] != count.to_bytes(8, "little"):
        raise RefusedPickle("a storage does not hold the number of values it says")
    if len(stored) - start != count * dtype.itemsize:
        raise RefusedPickle(f"a storage of {count} {type_name} has {len(stored) - start} bytes")
    return _Storage(np.frombuffer(stored, dtype, count, start))


class _DType:
    """Stands for numpy.dtype: one of the plain numbers, and its byte order."""

    __slots__ = ("dtype",)

    def __init__(self, name: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(name, str) or name.lstrip("<>|=") not in _SCALAR_TYPES:
            raise RefusedPickle(f"an array has dtype {name!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise RefusedPickle("a dtype has an unknown state")
        if state[1] in "<>":
            self.dtype = self.dtype.newbyteorder(state[1])


def _build_scalar(dtype: Any, stored: Any) -> int | float:
    if not isinstance(dtype, _DType) or not isinstance(stored, bytes):
        raise RefusedPickle("a scalar is not made of a dtype and bytes")
    if len(stored) != dtype.dtype.itemsize:
        raise RefusedPickle(f"a scalar of {dtype.dtype} has {len(stored)} bytes")
    return np.frombuffer(stored, dtype.dtype)[0].item()


class _Array:
    """Stands for an array of NumPy between its making and its state."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: NDArray = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise RefusedPickle("an array has an unknown state")
        _, shape, dtype, fortran, stored = state
        self.array = _build_array(stored, dtype, shape, "F" if fortran else "C")


def _build_array(stored: Any, dtype: Any, shape: Any, order: Any) -> NDArray:
    if not isinstance(dtype, _DType) or not isinstance(stored, bytes | bytearray):
        raise RefusedPickle("an array is not made of a dtype and bytes")
    if not _are_counts(shape) or order not in ("C", "F"):
        raise RefusedPickle(f"an array has shape {shape!r} and order {order!r}")
    if math.prod(shape) * dtype.dtype.itemsize != len(stored):
        raise RefusedPickle(f"an array of shape {shape} has {len(stored)} bytes")
    return np.frombuffer(bytes(stored), dtype.dtype).reshape(shape, order=order)


def _build_empty_array(kind: Any, shape: Any, typecode: Any) -> _Array:
    return _Array()


def _build_no_hooks(*args: Any) -> dict[str, Any]:
    if args:
        raise RefusedPickle("a tensor has hooks")
    return {}


def _builders() -> dict[tuple[str, str], Any]:
    record_parts = {
        "torch_geometric.data.data": ("Data", "DataEdgeAttr", "DataTensorAttr"),
        "torch_geometric.data.storage": ("GlobalStorage",),
    }
    table: dict[tuple[str, str], Any] = {
        (module, name): _Record for module, names in record_parts.items() for name in names
    }
    functions: dict[tuple[str, str], Callable[..., Any]] = {
        ("torch._utils", "_rebuild_tensor_v2"): _build_tensor,
        ("torch.storage", "_load_from_bytes"): _build_storage,
        ("collections", "OrderedDict"): _build_no_hooks,
        ("numpy", "dtype"): _DType,
        ("numpy", "ndarray"): _build_no_hooks,
    }
    for core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
        functions[f"{core}.multiarray", "scalar"] = _build_scalar
        functions[f"{core}.multiarray", "_reconstruct"] = _build_empty_array
        functions[f"{core}.numeric", "_frombuffer"] = _build_array
    table.update({key: _Builder(".".join(key), function) for key, function in functions.items()})
    return table


_BUILDERS = _builders()
_STORAGES = {("torch", name): name for name in _STORAGE_TYPES}


def _find(table: dict[tuple[str, str], Any], module: str, name: str) -> Any:
    try:
        return table[module, name]
    except KeyError:
        raise RefusedPickle(
            f"asks for {module}.{name}, which no OC20 record needs: it may be made to run code, "
            "and was not read"
        ) from None


class _RecordUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _find(_BUILDERS, module, name)


class _StorageUnpickler(pickle.Unpickler):
    """For the headers inside a storage: it knows the types of storages, as strings, and no more."""

    def find_class(self, module: str, name: str) -> Any:
        return _find(_STORAGES, module, name)

    def persistent_load(self, pid: Any) -> tuple[str, str, int]:
        kind, type_name, key, _, count, *view = pid
        if kind != "storage" or type_name not in _STORAGE_TYPES or view not in ([], [None]):
            raise RefusedPickle("a storage is of an unknown kind")
        if not isinstance(key, str) or type(count) is not int or count < 0:
            raise RefusedPickle("a storage has an unknown size")
        return type_name, key, count
