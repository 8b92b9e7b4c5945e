"""Stages of what a GPU is to show: each ends, loses nothing of another and is not repeated."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import gpu, on_device
from benchmarks.gpu import Stage

SAY = "import pathlib, sys; pathlib.Path(sys.argv[1]).open('a').write('x'); print('said')"


def called(code: str):
    return lambda device, quick, out: ["-c", code, str(out / "calls")]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Stage]:
    found: dict[str, Stage] = {
        "slow": Stage(30, (), called("slow")),
        "broken": Stage(30, (), called("raise SystemExit(3)")),
        "lacking": Stage(30, ("no_such_package",), called(SAY)),
        "fine": Stage(30, (), called(SAY)),
    }
    start = subprocess.run

    def run(command: list[str], **options):
        if "slow" not in command:
            return start(command, **options)
        options["stdout"].write("begun\n")
        options["stdout"].flush()
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu, "STAGES", found)
    monkeypatch.setattr(gpu, "code_digest", lambda: "this code")
    return found


def run(out: Path, *words: str) -> int:
    return gpu.main(["--device", "cpu", "--quick", "--out", str(out), *words])


def test_a_stage_that_fails_or_lasts_leaves_the_others(stages, tmp_path, capsys) -> None:
    assert run(tmp_path) == 1
    said = capsys.readouterr().out
    assert "left out: there is no no_such_package here" in said
    assert "failed: not done after 30 s" in said
    rows = json.loads((tmp_path / "gpu_cpu.json").read_text())
    assert rows["slow"]["output"] == ["begun"]
    assert rows["broken"]["status"] == "failed: exit code 3"
    assert rows["fine"]["status"] == "passed"
    assert (tmp_path / "gpu_fine.log").read_text() == "said\n"


def test_what_has_passed_with_this_code_is_not_repeated(stages, tmp_path, monkeypatch) -> None:
    calls = tmp_path / "calls"
    for word in ("fine", "lacking", "fine"):
        assert run(tmp_path, "--only", word) == 0
    assert calls.read_text() == "x"
    assert run(tmp_path, "--only", "fine", "--again") == 0
    assert calls.read_text() == "xx"
    monkeypatch.setattr(gpu, "code_digest", lambda: "other code")
    assert run(tmp_path, "--only", "fine") == 0
    assert calls.read_text() == "xxx"


def test_what_no_time_is_left_for_is_said_and_begun_the_next_time(stages, tmp_path) -> None:
    assert run(tmp_path, "--only", "fine", "--seconds", "0") == 1
    assert not (tmp_path / "calls").exists()
    assert run(tmp_path, "--only", "fine") == 0


def test_every_stage_names_files_that_are_there() -> None:
    assert sum(stage.limit for stage in gpu.STAGES.values()) <= 610  # with 520 s the last are cut
    for stage in gpu.STAGES.values():
        for word in stage.command("cpu", True, Path("out")):
            if word.startswith("tests/"):
                assert (gpu.ROOT / word).is_file(), word


@pytest.mark.parametrize("what", ["models", "dynamics"])
def test_whole_models_are_timed_on_a_cpu_too(what: str, tmp_path, monkeypatch) -> None:
    def once(call, device: str, *, quick: bool) -> float:
        call()
        return 1.0

    monkeypatch.setattr(on_device, "milliseconds", once)
    out = tmp_path / "rows.json"
    assert on_device.main([what, "--device", "cpu", "--quick", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["backend"] for row in rows} == {"reference", "auto"}
    assert any(row["replayed"] for row in rows)
    assert all(row["milliseconds"] == 1.0 for row in rows)


def test_a_row_that_fails_says_why(tmp_path) -> None:
    def fails() -> None:
        raise RuntimeError("out of memory\nmore")

    potential = on_device.potential_of("cu-pbe", "cpu")
    row = on_device.measured({"atoms": 1}, on_device.REFERENCE, potential, fails, "cpu", True)
    assert row["failed"] == "RuntimeError: out of memory"
