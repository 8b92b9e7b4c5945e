"""Reads files that are pickled modules without making one: what they name becomes a record.

A pickle calls what it names. Here only names of a list are known, and each of them is a class that
keeps what it is given and does nothing; tensors are made of the file's bytes.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomeq.potential.official_names import OfficialError

_STORAGES = {
    "BoolStorage": torch.bool,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}
_MADE_OF = "collections OrderedDict", "__builtin__ set", "builtins set"


class Inert:
    """What stands for an object of a file.

    Attributes:
        name: Of its class.
        given: Arguments it was called with.
        state: What the file says of it.
    """

    name = ""

    def __new__(cls, *given: Any, **named: Any) -> "Inert":
        """Keep the arguments."""
        made = super().__new__(cls)
        made.given, made.state = given, {}
        return made

    def __init__(self, *given: Any, **named: Any) -> None:
        """Do nothing with the arguments."""

    given: tuple[Any, ...]
    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def modules(self) -> dict[str, "Inert"]:
        """Return the modules inside."""
        return {k: m for k, m in self._part("_modules").items() if isinstance(m, Inert)}

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Yield parameters and buffers, by their names in the module's state dict."""
        for part in ("_parameters", "_buffers"):
            for name, value in self._part(part).items():
                if isinstance(value, Tensor):
                    yield prefix + name, value
        for name, module in self.modules().items():
            yield from module.tensors(f"{prefix}{name}.")

    def _part(self, name: str) -> dict[str, Any]:
        part = self.state.get(name) if isinstance(self.state, dict) else None
        return part if isinstance(part, dict) else {}


def read_module(path: Path, allowed: frozenset[str]) -> Inert:
    """Read a file of ``torch.save(module)``, building nothing of what it names.

    Args:
        path: The file.
        allowed: Names that may stand in it, as ``module name``.

    Raises:
        OfficialError: It names anything else, or is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise OfficialError(f"{path} holds {len(pickles)} pickles; a module is one")
            top = pickles[0].removesuffix("data.pkl")
            order = archive.read(f"{top}byteorder") if f"{top}byteorder" in names else b"little"
            if order != b"little":
                raise OfficialError(f"{path} has bytes in the order {order!r}, not little")
            with archive.open(pickles[0]) as stream:
                module = _Reader(stream, archive, top, allowed).load()
    except OfficialError as error:
        raise OfficialError(f"{path}: {error}") from error
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
        raise OfficialError(f"{path} is no file of a module: {error}") from error
    except (TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise OfficialError(f"{path} asks its objects to act: {error}") from error
    if not isinstance(module, Inert):
        raise OfficialError(f"{path} holds a {type(module).__name__}, not a module")
    return module


class _Reader(pickle.Unpickler):
    def __init__(
        self, stream: Any, archive: zipfile.ZipFile, top: str, allowed: frozenset[str]
    ) -> None:
        super().__init__(stream)
        self.archive, self.top, self.allowed = archive, top, allowed
        self.classes: dict[str, type] = {}
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        known = f"{module} {name}"
        if known not in self.allowed:
            raise OfficialError(f"names {module}.{name}, which is not known and not called")
        if known in _MADE_OF:
            return OrderedDict if name == "OrderedDict" else set
        made_here = {
            "torch._utils _rebuild_tensor_v2": _tensor,
            "torch._utils _rebuild_parameter": _first,
            "_codecs encode": _latin1,
        }
        if known in made_here:
            return made_here[known]
        return self.classes.setdefault(known, type(name, (Inert,), {"name": name}))

    def persistent_load(self, pid: Any, /) -> Tensor:
        """Return the numbers of a storage, (n,)."""
        kind, storage, key, _device, size = pid
        dtype = _STORAGES.get(getattr(storage, "name", ""))
        if kind != "storage" or dtype is None or not str(key).isdigit():
            raise OfficialError(f"has a storage of unknown kind, {storage}")
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.top}data/{key}"))
            values = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0).to(dtype)
            self.storages[key] = values
        values = self.storages[key]
        if values.dtype != dtype or len(values) < size:
            raise OfficialError(f"has a storage of {len(values)} numbers that says it has {size}")
        return values


def _tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    """Return a copy of the numbers that a tensor has in its storage; torch checks the bounds."""
    return torch.as_strided(storage, size, stride, offset).clone()


def _first(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise OfficialError(f"encodes bytes as {encoding!r}, not latin1")
    return text.encode("latin1")
