"""The builder of C kernels: what it keeps, what it mends, what it refuses."""

import ctypes
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from atomeq.ops import c_compiler as builder
from atomeq.ops.c_compiler import (
    BuildError,
    load,
    source_of,
    threads_for,
    torch_on_one_thread,
    unavailable,
)
from atomeq.ops.dispatch import refusal
from atomeq.ops.edge.operations import escn_conv
from atomeq.ops.edge.wigner import edge_wigner
from atomeq.ops.segment.operations import segment_sum
from atomeq.ops.specification import OpSpec

SOURCE = "int number(void) { return %d; }"
pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no C kernels: {unavailable()}")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a process that has loaded nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(builder, "_loaded", {})
    return tmp_path / "atomeq" / "kernels"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "_loaded", {})


def compilers_calls(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    calls: list[Path] = []
    compile_ = builder._compile

    def counted(compiler: tuple[str, ...], source: str, path: Path) -> None:
        calls.append(path)
        compile_(compiler, source, path)

    monkeypatch.setattr(builder, "_compile", counted)
    return calls


def test_a_library_is_compiled_once_and_found_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = compilers_calls(monkeypatch)
    assert load(SOURCE % 7).number() == 7
    forget(monkeypatch)
    assert load(SOURCE % 7).number() == 7
    assert len(calls) == 1
    assert load(SOURCE % 8).number() == 8
    assert len(calls) == 2
    assert len(list(folder.iterdir())) == 2


def test_a_damaged_library_is_built_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(SOURCE % 9)
    (path,) = folder.glob("*.so")
    os.replace(path, folder / "whole")
    path.write_bytes((folder / "whole").read_bytes()[:1000])
    forget(monkeypatch)
    assert load(SOURCE % 9).number() == 9
    assert path.read_bytes() == (folder / "whole").read_bytes()


def test_two_processes_may_build_at_once(folder: Path) -> None:
    program = f"from atomeq.ops.c_compiler import load\nprint(load({SOURCE % 10!r}).number())"
    jobs = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [job.communicate()[0].strip() for job in jobs] == ["10", "10"]
    assert all(path.suffix == ".so" for path in folder.iterdir())


def test_two_threads_share_one_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = compilers_calls(monkeypatch)
    libraries: list[ctypes.CDLL] = []
    threads = [
        threading.Thread(target=lambda: libraries.append(load(SOURCE % 11))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert all(library is libraries[0] for library in libraries)


def test_no_compiler_is_a_reason_and_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    assert "no C compiler" in str(unavailable())
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no-such-compiler not found" in str(unavailable())
    for op in (escn_conv, edge_wigner, segment_sum):  # nothing is served by halves
        spec = OpSpec(op.__name__, 1, 1, 16, 1, torch.float32, torch.device("cpu"))
        assert "no-such-compiler not found" in str(refusal("cpu", spec))


def test_a_source_that_is_no_c_is_refused_with_the_compilers_words(folder: Path) -> None:
    with pytest.raises(BuildError, match="error"):
        load("this is no C")
    assert list(folder.iterdir()) == []


def test_a_folder_that_others_may_write_is_refused(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert "may be written by others" in str(unavailable())
    folder.rmdir()
    folder.symlink_to("/tmp")
    assert "no folder of this user" in str(unavailable())
    folder.unlink()
    folder.write_text("a file")
    assert "no folder of this user" in str(unavailable())


def test_macros_come_before_the_source() -> None:
    text = source_of("probe.c", {"VALUE": 3, "REAL": "float"})
    assert text.startswith("#define VALUE 3\n#define REAL float\n")
    assert load(text).value() == 3


def test_kernels_keep_the_threads_that_torch_does_without() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch_on_one_thread(), torch_on_one_thread():
            within, of_kernels = torch.get_num_threads(), threads_for(100, 1)
            with ThreadPoolExecutor(1) as pool:
                elsewhere = pool.submit(lambda: (torch.get_num_threads(), threads_for(100, 1)))
        after = torch.get_num_threads(), threads_for(100, 1)
    finally:
        torch.set_num_threads(before)
    assert of_kernels == 3
    assert within == 1 or not (Path(torch.__file__).parent / "lib/libgomp.so.1").exists()
    assert elsewhere.result() == (3, 3)
    assert after == (3, 3)
