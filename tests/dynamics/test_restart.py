"""Runs that are killed go on bit for bit, in trajectories that ASE reads."""

import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from analytic_potentials import Pairs, cluster, crystal, of
from ase.constraints import FixAtoms
from ase.io import read

from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.integrators import Bussi, Langevin, NoseHoover, Ramp, VelocityVerlet
from atomeq.dynamics.run import relax, simulate
from atomeq.dynamics.trajectory import CHECKPOINT_FILE

OPTIONS = {"n_steps": 20, "seed": 3, "interval": 4, "checkpoint_interval": 6, "max_edges": 400}
INTEGRATORS = {
    "nve": VelocityVerlet(2.0),
    "langevin": Langevin(2.0),
    "chain": NoseHoover(2.0),
    "bussi": Bussi(2.0, Ramp(300.0, 500.0, 12)),
}


def stream():
    atoms = cluster(6, 1)
    atoms.set_constraint(FixAtoms([0]))
    atoms.set_masses([62.9, *[None] * 5])  # an isotope
    return [atoms, crystal(seed=1), cluster(5, 2), crystal(seed=2), cluster(8, 3)]


def run(name: str, folder: Path, *, restart: bool = False):
    return simulate(
        stream(), of(Pairs()), INTEGRATORS[name], folder=folder, restart=restart, **OPTIONS
    )


def kill_after(n_steps: int, name: str, folder: Path) -> int:
    """Run in a child that kills itself, as nothing can catch, in the middle; return its status."""
    count = 0

    def observe(state, indices):
        nonlocal count
        count += 1
        if count == n_steps:
            os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork, where there are threads
        child = os.fork()
    if child == 0:
        try:
            motion = INTEGRATORS[name]
            list(simulate(stream(), of(Pairs()), motion, folder=folder, observe=observe, **OPTIONS))
        finally:
            os._exit(1)  # it should have been killed; nothing of pytest may run here
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_same(whole: dict, resumed: dict, folder: Path) -> None:
    """Check the outcomes after a restart, and all the frames, against those of the whole run."""
    assert resumed
    for index, outcome in resumed.items():
        for field in ("pos", "velocities", "energy"):
            assert torch.equal(outcome.graph[field], whole[index].graph[field])
    for k in range(5):
        frames = [folder / name / f"{k:06d}.extxyz" for name in ("broken", "whole")]
        assert frames[0].read_bytes() == frames[1].read_bytes()


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    whole = {outcome.index: outcome for outcome in run("langevin", tmp_path / "whole")}
    broken = tmp_path / "broken"
    assert kill_after(27, "langevin", broken) == -signal.SIGKILL
    assert (broken / CHECKPOINT_FILE).exists()
    resumed = {outcome.index: outcome for outcome in run("langevin", broken, restart=True)}
    check_same(whole, resumed, tmp_path)


@pytest.mark.parametrize("name", INTEGRATORS)
def test_an_abandoned_run_goes_on_bit_for_bit(name, tmp_path):
    whole = {outcome.index: outcome for outcome in run(name, tmp_path / "whole")}
    first = run(name, tmp_path / "broken")
    next(first)
    first.close()
    resumed = {o.index: o for o in run(name, tmp_path / "broken", restart=True)}
    check_same(whole, resumed, tmp_path)


class Counted(Evaluator):
    """Counts how often it is asked."""

    n_calls = 0

    def __call__(self, graph, **options):
        self.n_calls += 1
        return super().__call__(graph, **options)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.extxyz")}


def test_a_run_that_has_ended_is_not_done_again(tmp_path):
    whole = {o.index: o for o in run("nve", tmp_path)}
    frames, evaluate = files(tmp_path), Counted(of(Pairs()))
    options = {**OPTIONS, "folder": tmp_path, "restart": True}
    again = {o.index: o for o in simulate(stream(), evaluate, INTEGRATORS["nve"], **options)}
    assert again.keys() == whole.keys()
    assert all(torch.equal(o.graph.pos, whole[k].graph.pos) for k, o in again.items())
    assert (evaluate.n_calls, files(tmp_path)) == (0, frames)
    more = [*stream(), cluster(4, 9), "no file"]
    added = list(simulate(more, evaluate, INTEGRATORS["nve"], **options))[5:]
    assert [(o.index, o.status) for o in added] == [(6, "refused"), (5, "completed")]
    assert evaluate.n_calls == 21
    assert frames.items() < files(tmp_path).items()


@pytest.mark.parametrize("name", INTEGRATORS)
def test_a_run_that_has_ended_is_extended_bit_for_bit(name, tmp_path):
    """Its last frame, which is off the interval, is none of the longer run's."""
    of_pairs, motion = of(Pairs()), INTEGRATORS[name]
    shorter = {**OPTIONS, "n_steps": 14, "folder": tmp_path / "broken"}
    list(simulate(stream(), of_pairs, motion, **shorter))
    assert [f.info["step"] for f in read(tmp_path / "broken/000001.extxyz", ":")] == [
        0,
        4,
        8,
        12,
        14,
    ]
    whole = {o.index: o for o in run(name, tmp_path / "whole")}
    longer = {o.index: o for o in run(name, tmp_path / "broken", restart=True)}
    assert longer.keys() == whole.keys()
    check_same(whole, longer, tmp_path)


def test_a_relaxation_that_did_not_converge_goes_on(tmp_path):
    options = {"fmax": 1e-3, "folder": tmp_path}
    short = list(relax(stream(), of(Pairs()), max_steps=5, **options))
    assert {o.status for o in short} == {"not_converged"}
    evaluate = Counted(of(Pairs()))
    again = {o.index: o for o in relax(stream(), evaluate, restart=True, **options)}
    whole = {o.index: o for o in relax(stream(), of(Pairs()), fmax=1e-3)}
    assert evaluate.n_calls == max(o.n_steps for o in whole.values()) - 5
    assert {k: (o.status, o.n_steps) for k, o in again.items()} == {
        k: ("converged", o.n_steps) for k, o in whole.items()
    }


def test_frames_that_are_gone_are_not_made_up(tmp_path):
    list(run("nve", tmp_path))
    (tmp_path / "000002.extxyz").write_text("")
    with pytest.raises(ValueError, match="missing or shorter than when"):
        list(run("nve", tmp_path, restart=True))


def test_an_abandoned_relaxation_goes_on(tmp_path):
    options = {"fmax": 1e-3, "max_edges": 300, "checkpoint_interval": 7}
    whole = {o.index: o for o in relax(stream(), of(Pairs()), **options)}
    first = relax(stream(), of(Pairs()), folder=tmp_path, **options)
    found = {outcome.index: outcome for outcome in (next(first), next(first))}
    first.close()
    again = relax(stream(), of(Pairs()), folder=tmp_path, restart=True, **options)
    found |= {outcome.index: outcome for outcome in again}
    assert found.keys() == whole.keys()
    for index, outcome in found.items():
        assert outcome.n_steps == whole[index].n_steps
        assert torch.equal(outcome.graph.pos, whole[index].graph.pos)


def test_ase_reads_the_trajectory(tmp_path):
    outcomes = {outcome.index: outcome for outcome in run("nve", tmp_path)}
    for index in (0, 1):
        frames = read(tmp_path / f"{index:06d}.extxyz", index=":")
        assert [frame.info["step"] for frame in frames] == list(range(0, 21, 4))
        assert [frame.info["time_fs"] for frame in frames] == list(range(0, 41, 8))
        last, ours = frames[-1], outcomes[index].atoms
        np.testing.assert_array_equal(last.positions, ours.positions)
        np.testing.assert_allclose(last.get_velocities(), ours.get_velocities(), rtol=1e-6)
        np.testing.assert_array_equal(last.get_masses(), ours.get_masses())
        np.testing.assert_array_equal(last.cell.array, ours.cell.array)
        np.testing.assert_array_equal(last.pbc, ours.pbc)
        assert last.get_potential_energy() == ours.get_potential_energy()
        np.testing.assert_allclose(last.get_forces(), ours.get_forces())
        assert len(last.constraints) == len(ours.constraints)


def test_a_folder_of_another_run_is_refused(tmp_path):
    unfinished = run("nve", tmp_path)
    next(unfinished)
    unfinished.close()
    with pytest.raises(ValueError, match="not empty"):
        run("nve", tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        run("chain", tmp_path, restart=True)
