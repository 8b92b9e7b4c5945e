"""Item 10: ``--restart`` extends what has ended, and no output is replaced in silence."""

import json
import shutil

import ase.io
import pytest
import yaml
from ase.build import bulk

from atomeq.cli import VERBS
from atomeq.dynamics.evaluator import Evaluator

MD = "md cu.extxyz --potential small --timestep 0.5 --interval 10 --out {} --steps {}"


def counted(monkeypatch):
    calls, evaluate = [], Evaluator.__call__
    monkeypatch.setattr(Evaluator, "__call__", lambda *a, **k: calls.append(0) or evaluate(*a, **k))
    return calls


@pytest.mark.parametrize("suffix", ["extxyz", "traj"])
def test_a_finished_md_is_extended(suffix, run, workdir, monkeypatch):
    assert run(MD.format(f"whole.{suffix}", 35)) == 0
    assert run(MD.format(f"md.{suffix}", 24)) == 0
    calls = counted(monkeypatch)
    assert run(MD.format(f"md.{suffix}", 35) + " --restart") == 0
    assert len(calls) == 35 - 24
    whole, md = (ase.io.read(f"{name}.{suffix}", index=":") for name in ("whole", "md"))
    assert [atoms.info["step"] for atoms in md] == [0, 10, 20, 30, 35]
    assert all((a.positions == b.positions).all() for a, b in zip(whole, md, strict=True))
    for kind in ("log.csv", "report.json"):
        assert (workdir / f"md.{kind}").read_bytes() == (workdir / f"whole.{kind}").read_bytes()
    told = json.loads((workdir / "md.summary.json").read_text())
    assert (told["restarted_at_step"], told["steps"]) == (24, 35)


def test_a_finished_md_that_is_restarted_alike_stays(run, workdir, monkeypatch, capsys):
    assert run(MD.format("md.extxyz", 24)) == 0
    before = (workdir / "md.extxyz").read_bytes()
    calls = counted(monkeypatch)
    for steps in (24, 10):
        assert run(MD.format("md.extxyz", steps) + " --restart") == 0
        assert "nothing was left to do" in capsys.readouterr().out
    assert not calls
    assert (workdir / "md.extxyz").read_bytes() == before


def test_another_run_is_not_extended(run, workdir, capsys):
    assert run(MD.format("md.extxyz", 12)) == 0
    before = (workdir / "md.extxyz").read_bytes()
    for other in ("--seed 1", "--temperature 400", "--temperature-end 400", "--index 0"):
        assert run(f"{MD.format('md.extxyz', 20)} --restart {other}") == 2
        assert "is of another run" in capsys.readouterr().err
    assert (workdir / "md.extxyz").read_bytes() == before


def test_a_trajectory_that_was_cut_is_not_extended(run, workdir, capsys):
    assert run(MD.format("md.extxyz", 12)) == 0
    (workdir / "md.extxyz").write_text("")
    assert run(MD.format("md.extxyz", 20) + " --restart") == 2
    assert "missing or shorter" in capsys.readouterr().err


WRITERS = {
    "single-point": "single-point cu.extxyz --potential small --out out.extxyz",
    "relax": "relax cu.extxyz --potential small --out out.extxyz --max-steps 2",
    "md": "md cu.extxyz --potential small --out out.extxyz --steps 2",
    "eos": "eos cell.extxyz --potential small --out out.extxyz --relax false",
    "elastic": "elastic cell.extxyz --potential small --out out.extxyz --relax false",
    "phonons": "phonons cell.extxyz --potential small --out out.extxyz --relax false",
    "spectrum": "spectrum cu.extxyz --potential small --out out.extxyz",
    "neb": "neb ends.extxyz --potential small --out out.extxyz --images 1 --max-steps 1",
    "rollout": "rollout systems.npz --propagator small --out out.npz",
    "export": "export small --out out.pt2",
    "convert": "convert absent.pt out",
    "check": "check small --only pickling --json out.json",
    "evaluate": "evaluate small cu.extxyz --out out.json",
    "select": "select cu.extxyz --potential small --number 1 --out out.extxyz",
    "calibrate": "calibrate small --train cu.extxyz --held-out cu.extxyz --out out",
    "is2re": "is2re . --potential small --out out.json",
    "data": "data nbody out.npz --num 1 --n-bodies 2 --frames 0",
    "screen": "screen cu.extxyz --potential small --out run --export-db out.db",
}
#: These write nothing that is named; training's verbs, potentials, kappa and benchmark, which
#: resumes, have tests of their own.
OTHERS = {
    "serve",
    "doctor",
    "kappa",
    "benchmark",
    "potentials",
    "fit",
    "validate",
    "test",
    "predict",
}


@pytest.fixture
def inputs(workdir):
    """What must be there, for an absent input is told first."""
    ase.io.write("cell.extxyz", bulk("Cu", cubic=True))
    for name in ("ends.extxyz", "systems.npz", "absent.pt"):
        (workdir / name).touch()


def output(line):
    words = line.split()
    return next(word for word in words if word.split(".")[0] == "out")


@pytest.mark.parametrize("verb", WRITERS)
def test_no_output_is_replaced_in_silence(verb, inputs, run, workdir, capsys):
    assert set(WRITERS) | OTHERS == set(VERBS)
    name = output(WRITERS[verb])
    if name == "out":  # a folder
        (workdir / "out").mkdir()
        name = "out/model.yaml"
    (workdir / name).write_text("precious")
    assert run(WRITERS[verb]) == 2
    error = capsys.readouterr().err
    assert f"{name} exists already" in error
    assert "--overwrite" in error
    assert (workdir / name).read_text() == "precious"


@pytest.mark.parametrize("verb", ["single-point", "relax", "md", "data", "check"])
def test_outputs_are_replaced_on_request(verb, run, workdir, capsys):
    name = output(WRITERS[verb])
    (workdir / name).write_text("not precious")
    assert run(f"{WRITERS[verb]} --overwrite") in (0, 1)
    assert "exists already" not in capsys.readouterr().err
    assert (workdir / name).read_bytes() != b"not precious"


def test_a_summary_that_another_suffix_shares_is_not_replaced(run, workdir, capsys):
    assert run("single-point cu.extxyz --potential small --out out.extxyz") == 0
    assert run("single-point cu.extxyz --potential small --out out.traj") == 2
    assert "out.summary.json exists already" in capsys.readouterr().err


def test_a_finished_relaxation_is_not_done_again(run, workdir, capsys):
    relax = WRITERS["relax"]
    assert run(relax) == 1
    before = (workdir / "out.extxyz").read_bytes()
    assert run(f"{relax} --restart") == 2
    assert "nothing that --restart could go on from" in capsys.readouterr().err
    assert (workdir / "out.extxyz").read_bytes() == before


@pytest.mark.parametrize("left", ["restart", "relax", "forces.jsonl", "band.traj"])
def test_what_an_interrupted_run_left_is_not_removed_in_silence(left, inputs, run, workdir, capsys):
    verb = {"restart": "md", "relax": "relax", "forces.jsonl": "phonons", "band.traj": "neb"}[left]
    (workdir / f"out.{left}").touch()
    assert run(WRITERS[verb]) == 2
    assert f"out.{left} exists already; go on from it with --restart" in capsys.readouterr().err


def test_metadata_of_data_is_not_replaced_in_silence(run, workdir, capsys):
    (workdir / "data").mkdir()
    (workdir / "data" / "metadata.npz").write_text("precious")
    assert run("data metadata data") == 2
    assert "metadata.npz exists already" in capsys.readouterr().err


def test_converting_does_not_replace_a_potential(inputs, run, workdir, capsys):
    shutil.copytree(workdir / "small", workdir / "out")
    assert run(WRITERS["convert"]) == 2
    assert "out/model.yaml exists already" in capsys.readouterr().err
    assert yaml.safe_load((workdir / "out" / "model.yaml").read_text())["model"]
