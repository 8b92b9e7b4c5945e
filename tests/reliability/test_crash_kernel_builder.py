"""What hinders the builder of C kernels is one line that names it, never a crash or a trust."""

from pathlib import Path

import pytest

from atomeq.ops import c_compiler as builder
from atomeq.ops.c_compiler import unavailable


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own, and a process that has loaded nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared" / "mine"))
    monkeypatch.setattr(builder, "_loaded", {})


@pytest.mark.parametrize("command", ['"', "'gcc", "   ", "/dev/null/cc '"])
def test_a_compiler_that_is_no_command_is_a_reason(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", command)
    reason = str(unavailable())
    assert f"CC={command!r} is no command" in reason
    assert "\n" not in reason


def test_a_compiler_that_does_not_run_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "cc"
    broken.write_bytes(b"\0 no program")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert f"CC={str(broken)!r} does not run" in str(unavailable())


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_a_cache_below_a_folder_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    assert unavailable() is None or "no C compiler" in str(unavailable())
    builder._loaded.clear()
    shared = tmp_path / "shared"
    shared.chmod(mode)
    assert f"{shared}, above the cache of kernels, may be changed by others" in str(unavailable())
    shared.chmod(mode | 0o1000)  # sticky, like /tmp: nobody renames what is another's
    assert unavailable() is None or "no C compiler" in str(unavailable())


def test_a_link_is_judged_by_where_it_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "open"
    (shared / "mine").mkdir(parents=True)
    shared.chmod(0o777)
    (tmp_path / "link").symlink_to(shared / "mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "link"))
    assert str(shared) in str(unavailable())
