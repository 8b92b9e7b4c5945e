"""Errors of rollouts: learned propagators step after step, beside what needs no training.

``benchmark.py rollout`` trains EGNN and SEGNO on charged systems
for a short time (``--epochs`` of the experiments' 500), rolls them out over ten long steps of 1,000
simulation steps each, and compares with the simulator. results/rollout.json gets the table. Called
again it goes on where it was stopped.

Charged systems are chaotic: ``simulator, start off by 0.001`` is what is left to predict. The mean
over systems belongs to the few in which charges meet; the median tells of the others.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from atomeq.cli.structures import versions
from atomeq.propagation.checkpoint import load_propagator
from atomeq.propagation.long_step import LongStep, Particles
from atomeq.propagation.nbody import LARGEST_FORCE, NBodyRecipe, Trajectories, run_charged, simulate
from benchmarks.record import RESULTS, ROOT, commit, fit, write

FILE = RESULTS / "rollout.json"
START, STRIDE = 30, 10  # frames: where rollouts begin, and a long step
SHOWN = (1, 2, 5, 10)  # long steps
NUDGE = 1e-3
# The published form asks for no velocities, on which a second step stands; so SEGNO is trained with
# and without.
TRAINED: dict[str, tuple[str, list[str]]] = {
    "SEGNO": ("segno", ["--model.velocity_weight=1.0"]),
    "EGNN, velocities by the trapezoidal rule": ("egnn", []),
    "SEGNO, trained on positions alone": ("segno", []),
}


def main(argv: list[str] | None = None) -> int:
    """Train, roll out, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=80, help="of each training")
    parser.add_argument("--systems", type=int, default=1000, help="to roll out")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE")
    parser.add_argument("fit", nargs="*", help="further options of atomeq fit, after --")
    options = parser.parse_args(argv)
    true = simulated(options.systems)
    rows = {name: errors(predict(true), true) for name, predict in UNTRAINED.items()}
    training: dict[str, Any] = {}
    for name, (experiment, words) in TRAINED.items():
        folder, training[name] = trained(name, experiment, words, options)
        rows[name] = errors(rolled_out(load_propagator(folder), true), true)
    show(rows, training)
    document = {
        "command": "python scripts/benchmark.py rollout",
        "what": f"{options.systems} charged systems of 5 bodies that no training has seen; error "
        "of positions after 1 to 10 long steps of 1,000 simulation steps (1.0 units of time)",
        "unit": "squared error of a coordinate, length²: mean over systems, and their median",
        "commit": commit(),
        "versions": versions(),
        "training": training,
        "errors": rows,
    }
    write(options.out, document)
    return 0


def simulated(n_systems: int) -> Trajectories:
    """Return true trajectories, start and ten long steps, of a seed that no data set has."""
    frames = tuple(START + STRIDE * k for k in range(SHOWN[-1] + 1))
    recipe = NBodyRecipe(
        "charged", num_train=n_systems, num_val=0, num_test=0, seed=1, frames=frames
    )
    return simulate(recipe)["train"]


def at(true: Trajectories, index: int) -> tuple[Tensor, Tensor]:
    """Return positions and velocities of one frame, each (n_systems, 1, n_bodies, 3)."""
    return true.pos[:, index : index + 1], true.velocities[:, index : index + 1]


def errors(pos: Tensor, true: Trajectories) -> dict[str, dict[str, float]]:
    """Return errors of positions (n_systems, 10, n_bodies, 3) after the steps that are shown.

    A system that flew apart to infinity is in the median and in ``lost``, not in the mean.
    """
    squared = (pos - true.pos[:, 1:]).square().mean(dim=(2, 3))  # (n_systems, 10)
    squared = squared.nan_to_num(nan=math.inf, posinf=math.inf)
    rows = {}
    for step in SHOWN:
        now = squared[:, step - 1]
        kept = now[torch.isfinite(now)]
        lost = len(now) - len(kept)
        rows[str(step)] = {"mean": float(kept.mean()), "median": float(now.median()), "lost": lost}
    return rows


def rolled_out(step: LongStep, true: Trajectories) -> Tensor:
    """Return a propagator's positions after each long step, also of systems that fly apart."""
    pos, velocities = (tensor[:, 0] for tensor in at(true, 0))
    particles, frames = Particles(pos, velocities, true.charges), []
    with torch.no_grad():
        for _ in range(SHOWN[-1]):
            particles = step(particles)
            frames.append(particles.pos)
    return torch.stack(frames, dim=1)


def straight(true: Trajectories) -> Tensor:
    """Return positions of bodies that keep their velocities."""
    pos, velocities = at(true, 0)
    return pos + torch.arange(1.0, SHOWN[-1] + 1)[:, None, None] * velocities


def leapfrog(n_substeps: int) -> Callable[[Trajectories], Tensor]:
    """Return the integrator of the true forces in so many steps for each long one."""

    def integrate(true: Trajectories) -> Tensor:
        pos, velocities = (tensor[:, 0] for tensor in at(true, 0))
        dt, frames = 1.0 / n_substeps, []
        force = coulomb(pos, true.charges)
        for step in range(SHOWN[-1] * n_substeps):
            velocities = velocities + dt / 2 * force
            pos = pos + dt * velocities
            force = coulomb(pos, true.charges)
            velocities = velocities + dt / 2 * force
            if (step + 1) % n_substeps == 0:
                frames.append(pos)
        return torch.stack(frames, dim=1)

    return integrate


def coulomb(pos: Tensor, charges: Tensor) -> Tensor:
    """Return the simulator's forces, (n_systems, n_bodies, 3), bounded as it bounds them."""
    difference = pos[:, :, None] - pos[:, None]  # (n_systems, i, j, 3)
    product = charges[:, :, None] * charges[:, None]
    distance = difference.norm(dim=-1) + torch.eye(pos.shape[1], dtype=pos.dtype)
    forces = (product / distance**3)[..., None] * difference
    return forces.sum(dim=2).clamp(-LARGEST_FORCE, LARGEST_FORCE)


def nudged(true: Trajectories) -> Tensor:
    """Return the simulator's own positions from a start that is a little off."""
    pos, velocities = (tensor[:, 0].numpy() for tensor in at(true, 0))
    off = NUDGE * np.random.default_rng(0).normal(size=pos.shape)
    frames = tuple(STRIDE * k - 1 for k in range(1, SHOWN[-1] + 1))  # frame k is step 100 (k + 1)
    return torch.from_numpy(run_charged(true.charges.numpy(), pos + off, velocities, frames)[0])


UNTRAINED: dict[str, Callable[[Trajectories], Tensor]] = {
    "straight line": straight,
    "leapfrog, 1 step of the true forces": leapfrog(1),
    "leapfrog, 8 steps of the true forces": leapfrog(8),
    f"simulator, start off by {NUDGE:g}": nudged,
}


def trained(
    name: str, experiment: str, words: list[str], options: argparse.Namespace
) -> tuple[Path, dict[str, Any]]:
    """Train a propagator to the end; return its folder and what it cost."""
    run = options.runs / f"rollout_{experiment}{len(words)}_{options.epochs}"
    config = ROOT / "configs" / "experiment" / f"nbody_{experiment}.yaml"
    own = [f"--data.folder={options.runs / 'nbody-data'}", f"--trainer.max_epochs={options.epochs}"]
    fit(run, ["-c", str(config), *own, *words, *options.fit])
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    return run / "propagator", {
        "experiment": f"configs/experiment/nbody_{experiment}.yaml",
        "options": words,
        "epochs": options.epochs,
        "val_mse": best["validation"]["mse"],
        "cpu_seconds": sum(json.loads((run / "cpu_seconds.json").read_text())),
    }


def show(rows: dict[str, dict[str, dict[str, float]]], training: dict[str, Any]) -> None:
    """Print the table: mean, median in parentheses, and how many flew apart."""
    table = Table("error after long steps", *map(str, SHOWN), "CPU s of training")
    for name, row in rows.items():
        cells = [
            f"{at['mean']:.3g} ({at['median']:.2g})"
            + (f", {at['lost']} lost" if at["lost"] else "")
            for at in (row[str(k)] for k in SHOWN)
        ]
        cost = training.get(name, {}).get("cpu_seconds", math.nan)
        table.add_row(name, *cells, f"{cost:.0f}" if math.isfinite(cost) else "-")
    Console(width=None if sys.stdout.isatty() else 130).print(table)
