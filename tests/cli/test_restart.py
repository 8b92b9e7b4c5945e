"""Verbs that are killed go on with --restart, to the files of a run that was not."""

import json
import os
import signal
import warnings

import ase.io
import numpy as np
import pytest

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli import main
from atomeq.dynamics.evaluator import Evaluator
from atomeq.properties.elastic_band import BatchedNEB

MD = "md cu.extxyz --potential small --timestep 0.5 --interval 3 --checkpoint-interval 5 --steps 24"
ENSEMBLES = [  # nve goes into the binary trajectory below
    "nvt",
    "nvt --thermostat langevin --temperature-end 400",
    "npt --barostat anisotropic",
    pytest.param("npt", marks=pytest.mark.slow),
]


def killed(line, monkeypatch, owner, name, n_calls):
    """Run a command in a child that is killed, as nothing can catch, at a call of a method."""
    method, count = getattr(owner, name), 0

    def deadly(*args, **kwargs):
        nonlocal count
        count += 1
        if count == n_calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork, where there are threads
        child = os.fork()
    if child == 0:
        try:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, deadly)
                main(line.split())
        finally:
            os._exit(1)  # it should have been killed; nothing of pytest may run here
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def summary(name):
    with open(f"{name}.summary.json", encoding="utf-8") as stream:
        return json.load(stream)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_a_killed_md_goes_on_bit_for_bit(ensemble, run, workdir, monkeypatch):
    words = f"{MD} --ensemble {ensemble} --out"
    assert run(f"{words} whole.extxyz") == 0
    killed(f"{words} md.extxyz", monkeypatch, Evaluator, "__call__", 16)
    assert not (workdir / "md.extxyz").exists()
    assert run(f"{words} md.extxyz --restart") == 0
    assert summary("md")["restarted_at_step"] == 10
    for suffix in (".extxyz", ".log.csv", ".report.json"):
        whole = (workdir / f"whole{suffix}").read_bytes()
        assert (workdir / f"md{suffix}").read_bytes() == whole
    assert sorted(path.name for path in workdir.glob("md*")) == [
        *("md.extxyz", "md.log.csv", "md.png", "md.report.json", "md.restart", "md.summary.json")
    ]


def test_a_killed_md_goes_on_in_a_binary_trajectory_and_may_last_longer(run, workdir, monkeypatch):
    words = f"{MD} --ensemble nve"
    assert run(f"{words} --out whole.traj") == 0
    shorter = words.replace("--steps 24", "--steps 20")
    killed(f"{shorter} --out md.traj", monkeypatch, Evaluator, "__call__", 16)
    assert run(f"{words} --out md.traj --restart --temperature 400") == 2  # another run
    assert run(f"{words} --out md.traj --restart") == 0
    whole, again = (ase.io.read(f"{name}.traj", index=":") for name in ("whole", "md"))
    assert [frame.info["step"] for frame in again] == list(range(0, 25, 3))
    for one, other in zip(whole, again, strict=True):
        assert np.array_equal(one.positions, other.positions)
        assert np.array_equal(one.get_forces(), other.get_forces())


def test_a_killed_relaxation_goes_on(run, workdir, monkeypatch, capsys):
    words = "relax cu.extxyz --potential small --cell --fmax 1e-3 --max-steps 12 --out"
    words = f"{words} {{}} --checkpoint-interval 4 --optimizer fire"
    assert run(words.format("whole.extxyz")) == 1
    killed(words.format("out.extxyz"), monkeypatch, Evaluator, "__call__", 8)
    assert (workdir / "out.relax").exists()
    calls = []
    evaluate = Evaluator.__call__
    monkeypatch.setattr(Evaluator, "__call__", lambda *a, **k: calls.append(0) or evaluate(*a, **k))
    assert run(words.format("out.extxyz") + " --restart") == 1
    assert len(calls) == 12 - 4  # steps since the checkpoint
    assert not (workdir / "out.relax").exists()
    assert (workdir / "out.extxyz").read_bytes() == (workdir / "whole.extxyz").read_bytes()
    assert summary("out")["structures"] == summary("whole")["structures"]


def test_displacements_that_are_done_are_not_done_again(run, workdir, monkeypatch):
    words = "phonons cu.extxyz --potential small --relax false --supercell 1 1 1 --mesh 5"
    assert run(f"{words} --out whole.extxyz") == 0
    n_displacements = summary("whole")["n_displacements"]
    killed(f"{words} --out ph.extxyz", monkeypatch, AtomeqCalculator, "evaluate", 3)
    computed, evaluate = [], AtomeqCalculator.evaluate

    def counted(self, structures, *args, **kwargs):
        computed.extend(structures)
        return evaluate(self, structures, *args, **kwargs)

    monkeypatch.setattr(AtomeqCalculator, "evaluate", counted)
    assert run(f"{words} --out ph.extxyz --restart") == 0
    assert len(computed) == n_displacements - 2 * 8
    assert not (workdir / "ph.forces.jsonl").exists()
    assert (workdir / "ph.extxyz").read_bytes() == (workdir / "whole.extxyz").read_bytes()
    assert summary("ph")["frequencies_THz"] == summary("whole")["frequencies_THz"]


def test_a_killed_band_goes_on_from_what_it_saved(run, workdir, monkeypatch):
    start = ase.io.read("cu.extxyz", index=0)[1:]
    end = start.copy()
    end.positions[0] += (0.4, -0.3, -0.5)
    ase.io.write("ends.extxyz", [start, end])
    words = "neb ends.extxyz --potential small --out path.extxyz --images 3 --interval 2"
    killed(f"{words} --max-steps 9", monkeypatch, BatchedNEB, "get_forces", 6)
    saved = ase.io.read("path.band.traj", index=":")
    assert run(f"{words} --max-steps 9 --restart --fmax 100") == 0  # no further step
    band = ase.io.read("path.extxyz", index=":")
    for one, other in zip(saved, band, strict=True):
        np.testing.assert_allclose(one.positions, other.positions, atol=1e-7)
    assert np.abs(band[1].positions - start.positions).max() > 0
