"""C kernels made on the spot: compiled by the system's compiler and kept in the user's cache.

A kernel is a C source, a ``.c`` file below this folder behind a few ``#define`` lines mostly. What
its functions and structures are made of is read off the source and stands nowhere else; a pointer
of C is given as a tensor. A machine without a compiler has no C kernels, which :func:`unavailable`
says; plain torch serves there.
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomeq.ops.specification import OpSpec

REALS = {torch.float32: "float", torch.float64: "double"}  # what C calls the dtypes it knows
# No -ffast-math: NaN must come out where NaN goes in, and sums keep the order that is written.
_PLAIN = ("-std=gnu11", "-shared", "-fPIC", "-O3", "-fno-math-errno", "-fno-trapping-math")
_NATIVE = (*_PLAIN, "-march=native")
FLAGS = ((*_NATIVE, "-fopenmp"), _NATIVE, _PLAIN)  # tried in this order

_LARGEST_MAPPED = 2**25 - 2**16  # bytes; what is larger than 32 MB glibc always maps by itself
_TIMEOUT = 600  # s; a kernel takes one, a crowded machine more
_lock = threading.Lock()
_loaded: dict[str, ctypes.CDLL] = {}


class BuildError(RuntimeError):
    """No library came of a C source; the message says why and what to do."""


def refusal(spec: OpSpec) -> str | None:
    """Refuse other devices and dtypes, and machines without a C compiler."""
    if spec.device.type != "cpu":
        return "its kernels run on a CPU"
    if spec.dtype not in REALS:
        return f"its kernels know float32 and float64, not {spec.dtype}"
    return unavailable()


def unavailable() -> str | None:
    """Return why this machine builds no C kernels, or None if it does."""
    try:
        probe = load(source_of("probe.c", {"VALUE": 42}))
        return None if probe.value() == 42 else "a library built here is wrong"
    except BuildError as error:
        return str(error)


def source_of(name: str, defines: Mapping[str, str | int]) -> str:
    """Return a C file behind ``#define`` lines.

    Args:
        name: Path below this folder, ``coupling/cpu/cg.c``, say.
        defines: Macros and their values.
    """
    macros = "".join(f"#define {macro} {value}\n" for macro, value in defines.items())
    return macros + _file(name)


@cache
def c_library(name: str, dtype: torch.dtype, **macros: int) -> Any:
    """Return the library of a C file for one dtype, its REAL.

    A function of C is called with tensors for pointers: one, a list of some, or None. A structure
    is called for an instance by its name, ``library.form_t(n_paths=3, y=tensor)``.

    Args:
        name: As in :func:`source_of`.
        dtype: Of the numbers, float32 or float64.
        macros: Further ones.

    Raises:
        BuildError: As :func:`load` does.
    """
    return load(source_of(name, {"REAL": REALS[dtype], **macros}))


def load(source: str) -> ctypes.CDLL:
    """Return the library of a C source, compiling it if nobody did before.

    Args:
        source: The whole source. Its functions run without Python's global lock.

    Raises:
        BuildError: If there is no compiler, it fails, or the cache folder can not be trusted.
    """
    library = _loaded.get(source)
    if library is None:
        _keep_pages()
        with _lock:  # the second thread finds what the first has built
            library = _loaded.get(source) or _declared(_library(source), source)
            _loaded[source] = library
    return library


@cache
def _keep_pages() -> None:
    """Bring glibc to keep freed memory of some megabytes, as it does once 32 MB were freed.

    It raises its thresholds by itself to the largest mapped block that was freed, 32 MB at most,
    and twice that may lie idle at the end of the heap. Until then what is made anew at every step
    is given back and its pages come cleared, for a tenth of the time of 500 atoms. Nothing is set:
    where the environment or the program has chosen thresholds, they stay.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        library.free(library.malloc(ctypes.c_size_t(_LARGEST_MAPPED)))  # never touched: no memory


class _Threads(threading.local):
    """How many threads kernels take where torch's own operations take one; 0: as many as these."""

    n: int = 0


_threads = _Threads()


def threads_for(n: int, each: int) -> int:
    """Return how many of torch's threads share n things, of which each wants as many."""
    return max(1, min(_threads.n or torch.get_num_threads(), n // each))


@contextmanager
def torch_on_one_thread() -> Iterator[None]:
    """Run torch's operations on one thread inside the ``with`` block, kernels on all as before.

    To wake a thread that sleeps takes 60 µs, longer than torch needs for the features of some
    hundred atoms. OpenMP is told for the thread of Python alone that runs the block; where that of
    the kernels is not torch's own, nothing happens to torch.
    """
    before = torch.get_num_threads()
    if before == 1 or _threads.n or torch.compiler.is_compiling():
        yield
        return
    set_threads = load(source_of("probe.c", {"VALUE": 42})).set_threads
    _threads.n = before
    set_threads(1)
    try:
        yield
    finally:
        set_threads(before)
        _threads.n = 0


def checked_index(index: Tensor, n: int, what: str) -> Tensor:
    """Return contiguous int64 numbers, none of them beyond 0..n - 1: else C reads anything.

    Args:
        index: The numbers.
        n: How many there are of what they count.
        what: Begins the message, ``an edge ends at an atom``.

    Raises:
        IndexError: A number is beyond.
    """
    index = index.long().contiguous()
    if not load(source_of("probe.c", {"VALUE": 42})).in_range(index, index.numel(), n):
        raise IndexError(f"{what} that is not among the {n} given")
    return index


_NUMBERS = {
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "double": ctypes.c_double,
}


class _Function:
    """A function of C that takes tensors, lists and structures for pointers."""

    def __init__(self, function: Any, result: Any, parameters: list[Any]) -> None:
        self.function = function
        function.restype, function.argtypes = result, parameters

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*map(_for_c, arguments))


def _for_c(value: Any) -> Any:
    """Return what C is given for a tensor, some tensors or numbers, a structure, or anything else.

    Raises:
        ValueError: A tensor is not contiguous.
    """
    if value is None or type(value) is int:
        return value
    if isinstance(value, Tensor):
        if not value.is_contiguous():
            raise ValueError(f"a C kernel was given strides {value.stride()}; pass .contiguous()")
        return value.data_ptr()
    if isinstance(value, list | tuple):
        numbers = bool(value) and isinstance(value[0], int)
        return _array(numbers, max(1, len(value)))(*map(_for_c, value))
    return ctypes.byref(value) if isinstance(value, ctypes.Structure) else value


@cache
def _array(numbers: bool, length: int) -> Any:
    """Return a kind of array, which ctypes forgets with the last one of it."""
    return (ctypes.c_int64 if numbers else ctypes.c_void_p) * length


class _Structure(ctypes.Structure):
    """A structure of C, filled by name; whatever is not given is null or 0."""

    kinds: dict[str, Any]

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = given  # alive as long as this
        for name, value in given.items():
            made = _for_c(value)
            if isinstance(made, ctypes.Array) and self.kinds[name] is ctypes.c_void_p:
                made = ctypes.addressof(made)  # an array of structures, that of the caller
            setattr(self, name, made)


def _declared(library: ctypes.CDLL, source: str) -> ctypes.CDLL:
    """Give the functions of a library their kinds of arguments, and it its structures."""
    functions = re.findall(r"^(void|int|int64_t) (\w+)\(([^)]*)\) \{", source, re.MULTILINE)
    for result, name, parameters in functions:
        kinds = [
            ctypes.c_void_p if "*" in parameter else _NUMBERS[parameter.split()[-2]]
            for parameter in parameters.split(",")
            if parameter != "void"
        ]
        setattr(library, name, _Function(getattr(library, name), _NUMBERS.get(result), kinds))
    sizes = dict(re.findall(r"^#define (\w+) (\d+)$", source, re.MULTILINE))
    for body, name in re.findall(r"^typedef struct \{$(.*?)^\} (\w+);", source, re.M | re.S):
        kinds = _members(re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL), sizes)
        fields = {"_fields_": list(kinds.items()), "kinds": kinds}
        setattr(library, name, type(name, (_Structure,), fields))
    return library


def _members(body: str, sizes: Mapping[str, str]) -> dict[str, Any]:
    """Return the kinds of a structure's members that are numbers and pointers, or arrays of such.

    Others are for C alone, and so is a structure that has one.
    """
    kinds: dict[str, Any] = {}
    for declaration in body.split(";")[:-1]:
        word, _, names = declaration.strip().removeprefix("const ").partition(" ")
        for name in names.split(","):
            member, _, length = name.strip(" *\n]").partition("[")
            kind = ctypes.c_void_p if "*" in name else _NUMBERS.get(word)
            if kind is None:
                return {}
            if length:
                kind = kind * sum(int(sizes.get(part, part)) for part in length.split(" + "))
            kinds[member] = kind
    return kinds


def _library(source: str) -> ctypes.CDLL:
    compiler, version = _compiler(os.environ.get("CC", ""), os.environ.get("PATH", ""))
    identity = repr((source, FLAGS, version, _processor()))
    key = hashlib.sha256(identity.encode()).hexdigest()
    folder = _folder()
    for path in folder.glob(f"{key}-*.so"):
        if path.stem == f"{key}-{_digest(path)}":
            return ctypes.CDLL(str(path))
        path.unlink(missing_ok=True)  # damaged: to load it could end the process
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as scratch:
        fresh = Path(scratch) / "kernel.so"
        _compile(compiler, source, fresh)
        path = folder / f"{key}-{_digest(fresh)}.so"
        fresh.replace(path)  # at once, so that another process sees all of it or nothing
    return ctypes.CDLL(str(path))


def _compile(compiler: tuple[str, ...], source: str, path: Path) -> None:
    complaint = ""
    for flags in FLAGS:
        command = [*compiler, *flags, "-x", "c", "-", "-o", str(path), "-lm"]
        try:
            result = subprocess.run(
                command, input=source, capture_output=True, text=True, timeout=_TIMEOUT, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{shlex.join(compiler)} does not run: {error}") from error
        if result.returncode == 0:
            return
        complaint = result.stderr.strip()
    raise BuildError(
        f"{shlex.join(compiler)} can not compile a kernel; set CC to another C compiler or "
        f"ATOMEQ_BACKEND=reference. It says: {complaint[:2000]}"
    )


@cache
def _compiler(wanted: str, path: str) -> tuple[tuple[str, ...], str]:
    """Return the command of the C compiler and what it calls itself."""
    if os.name != "posix":
        raise BuildError(f"C kernels are built on POSIX systems, not on {platform.system()}")
    names = [wanted] if wanted else ["cc", "gcc", "clang"]
    for name in names:
        try:
            program, *arguments = shlex.split(name)
        except ValueError as error:  # an open quote, or nothing but spaces
            raise BuildError(f"CC={name!r} is no command ({error}); set it to gcc, say") from error
        found = shutil.which(program, path=path)
        if found is not None:
            command = (found, *arguments)
            try:
                asked = subprocess.run(
                    [*command, "--version"], capture_output=True, text=True, check=False, timeout=60
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise BuildError(f"CC={name!r} does not run: {error}") from error
            return command, f"{os.path.realpath(found)} {arguments} {asked.stdout}"
    raise BuildError(
        f"no C compiler: {', '.join(names)} not found on PATH; install gcc or clang, or set CC"
    )


@cache
def _processor() -> str:
    """Return what -march=native sees: a home folder may serve machines of several kinds."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {platform.processor()} {features}"


def _folder() -> Path:
    """Return the cache folder; only the user may write there, for what it holds is executed."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(home).expanduser().absolute() / "atomeq" / "kernels"
        for part in (*reversed(folder.parents), folder):
            if not part.exists():
                part.mkdir(mode=0o700, exist_ok=True)  # whatever the umask is
        folder = folder.parent.resolve() / folder.name
        status = folder.lstat()
        changeable = [parent for parent in folder.parents if _others_may_change(parent)]
    except (OSError, RuntimeError) as error:
        raise BuildError(f"no cache folder: {error}; set XDG_CACHE_HOME to one") from error
    if changeable:
        raise BuildError(
            f"{changeable[0]}, above the cache of kernels, may be changed by others; do: chmod "
            f"go-w {changeable[0]}, or set XDG_CACHE_HOME to a folder of yours"
        )
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise BuildError(f"{folder} is no folder of this user; remove it or set XDG_CACHE_HOME")
    if status.st_mode & 0o022:
        raise BuildError(f"{folder} may be written by others; do: chmod 700 {folder}")
    if not os.access(folder, os.W_OK):
        raise BuildError(f"{folder} can not be written; set XDG_CACHE_HOME to a folder that can")
    return folder


def _others_may_change(folder: Path) -> bool:
    """Say whether somebody else can put another folder in place of one that lies in this one."""
    status = folder.stat()
    if status.st_uid not in (0, os.getuid()):
        return True
    return bool(status.st_mode & 0o022) and not status.st_mode & stat.S_ISVTX  # sticky, like /tmp


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def _file(name: str) -> str:
    """Return a file below this folder, with those that it includes from its own."""
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    folder = name.rpartition("/")[0]
    own = re.compile(r'^#include "(.+)"$', re.MULTILINE)
    return own.sub(lambda found: _file(f"{folder}/{found[1]}"), text)
