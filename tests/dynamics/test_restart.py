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

from atomeq.dynamics.integrators import Langevin, NoseHoover, VelocityVerlet
from atomeq.dynamics.run import relax, simulate
from atomeq.dynamics.trajectory import CHECKPOINT_FILE

OPTIONS = {"n_steps": 20, "seed": 3, "interval": 4, "checkpoint_interval": 6, "max_edges": 400}
INTEGRATORS = {
    "nve": VelocityVerlet(2.0),
    "langevin": Langevin(2.0),
    "chain": NoseHoover(2.0),
}


def stream():
    atoms = cluster(6, 1)
    atoms.set_constraint(FixAtoms([0]))
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


def test_a_run_that_has_ended_is_not_done_again(tmp_path, caplog):
    n_whole = len(list(run("nve", tmp_path)))
    frames = [path.read_bytes() for path in sorted(tmp_path.glob("*.extxyz"))]
    assert list(run("nve", tmp_path, restart=True)) == []
    assert "has ended" in caplog.text
    more = [*stream(), cluster(4, 9)]
    nve = INTEGRATORS["nve"]
    added = simulate(more, of(Pairs()), nve, folder=tmp_path, restart=True, **OPTIONS)
    assert [(o.index, o.status) for o in added] == [(n_whole, "completed")]
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.extxyz"))][:-1] == frames


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
        last, ours = frames[-1], outcomes[index].atoms
        np.testing.assert_array_equal(last.positions, ours.positions)
        np.testing.assert_allclose(last.get_velocities(), ours.get_velocities(), rtol=1e-6)
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
