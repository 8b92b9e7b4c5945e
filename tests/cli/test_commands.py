import json
import shutil
import subprocess
import sys
import textwrap

import pytest

from atomeq.cli import VERBS
from atomeq.cli.terminal import Meter


def test_help_names_every_verb(run, capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in text


@pytest.mark.parametrize("verb", ["single-point", "relax", "md", "check", "doctor"])
def test_help_of_a_verb_has_an_example(run, capsys, verb):
    assert run(f"{verb} --help") == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert f"  atomeq {verb}" in text


def test_every_verb_that_computes_structures_can_leave_charges_out(run, workdir, capsys):
    """The others compute none, are asked in a configuration, or move bare particles."""
    others = {"rollout", "convert", "potentials", "export", "doctor", "data"}
    for verb in VERBS.keys() - others - {"fit", "validate", "test", "predict"}:
        assert run(f"{verb} --help") == 0
        assert "--ignore" in capsys.readouterr().out, verb
    assert run("screen cu.extxyz --potential small --out out --ignore charge,spni") == 2
    assert "charge, spin or both with a comma, not 'spni'" in capsys.readouterr().err


def test_help_loads_nothing_heavy():
    code = """
        import sys
        from atomeq.cli import main
        main(["--help"])
        assert not {"torch", "ase", "lightning"} & set(sys.modules), sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True)


def test_simulation_verbs_do_not_load_lightning():
    code = "import sys, atomeq.cli.simulate; assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_verbs_go_to_the_training_module(run, monkeypatch):
    seen = []

    class Module:
        main = staticmethod(seen.append)

    monkeypatch.setattr("importlib.import_module", lambda name: Module)
    for verb in ("fit", "validate", "test", "predict"):
        assert run(f"{verb} -c x.yaml") == 0
    assert seen == [[verb, "-c", "x.yaml"] for verb in ("fit", "validate", "test", "predict")]


def test_version(run, capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("atomeq ")


def test_check_prints_a_line_per_law(run, workdir, capsys):
    laws = "rotation,pickling,NaN refused"
    assert run_words(["check", "small", "--only", laws, "--json", "laws.json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("holds  rotation")
    assert "eV" in lines[0]
    assert lines[-1] == "all laws hold"
    document = json.loads((workdir / "laws.json").read_text())
    assert [law["name"] for law in document["laws"]] == laws.split(",")
    assert all(law["passed"] for law in document["laws"])


def test_check_runs_the_long_law_and_shows_its_progress(run, workdir, capsys):
    words = ["check", "small", "--only", "NVE drift", "--picoseconds", "0.008"]
    run_words([*words, "--structure", "cu.extxyz"])
    captured = capsys.readouterr()
    assert "16 atoms, 0.008 ps" in captured.out
    assert "NVE drift: 4/4 steps" in captured.err


def test_check_moves_the_example_that_lies_beside_a_potential(run, workdir, capsys):
    shutil.copyfile("cu.extxyz", "small/example.extxyz")
    run_words(["check", "small", "--only", "NVE drift", "--picoseconds", "0.008"])
    assert "16 atoms, 0.008 ps" in capsys.readouterr().out


def test_check_finds_the_faults_of_a_foreign_calculator(run, workdir, capsys):
    (workdir / "mine.py").write_text("from ase.calculators.emt import EMT\n")
    words = ["check", "mine:EMT", "--elements", "Cu,Al", "--only"]
    assert run_words([*words, "shared by 8 threads,NaN refused,empty structure refused"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["BROKEN"] * 3
    assert lines[-1] == "0 of 3 laws hold"


def test_doctor_tells_what_is_there(run, monkeypatch, tmp_path, capsys):
    (tmp_path / "mvl_snap").mkdir()
    monkeypatch.setenv("ATOMEQ_DATA", str(tmp_path))
    assert run("doctor") == 0
    text = capsys.readouterr().out
    for word in ("torch", "idle threads", "cuda", "mvl_snap", "potentials", "reference"):
        assert word in text


def run_words(words: list[str]) -> int:
    from atomeq.cli import main

    try:
        main(words)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def test_meter_reports_on_a_terminal_too():
    from io import StringIO

    from rich.console import Console

    stream = StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    meter = Meter("work", 3, unit="steps", console=console)
    with meter.running():
        for _ in range(3):
            meter.advance(note="fine")
    text = stream.getvalue()
    assert "3/3" in text
    assert "steps/s fine" in text
