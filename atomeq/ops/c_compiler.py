"""C kernels made on the spot: compiled by the system's compiler and kept in the user's cache.

A kernel is a C source, a ``.c`` file below this folder behind a few ``#define`` lines mostly, whose
functions take plain pointers and numbers. A machine without a compiler has no C kernels, which
:func:`unavailable` says; plain torch serves there.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from atomeq.ops.specification import OpSpec

REALS = {torch.float32: "float", torch.float64: "double"}  # what C calls the dtypes it knows
# No -ffast-math: NaN must come out where NaN goes in, and sums keep the order that is written.
_PLAIN = ("-std=gnu11", "-shared", "-fPIC", "-O3", "-fno-math-errno", "-fno-trapping-math")
_NATIVE = (*_PLAIN, "-march=native")
FLAGS = ((*_NATIVE, "-fopenmp"), _NATIVE, _PLAIN)  # tried in this order

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


def load(source: str) -> ctypes.CDLL:
    """Return the library of a C source, compiling it if nobody did before.

    Args:
        source: The whole source. Its functions run without Python's global lock.

    Raises:
        BuildError: If there is no compiler, it fails, or the cache folder can not be trusted.
    """
    library = _loaded.get(source)
    if library is None:
        with _lock:  # the second thread finds what the first has built
            library = _loaded.get(source) or _library(source)
            _loaded[source] = library
    return library


def n_threads() -> int:
    """Return how many threads a kernel may use: as many as torch does."""
    return torch.get_num_threads()


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
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
