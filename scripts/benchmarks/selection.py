"""Structures chosen to be labelled against structures taken at random: acetylacetone at 600 K.

A committee that has seen 20 frames at 300 K chooses from 955 frames at 300 and 600 K; a network is
trained from the beginning on those 20 and the chosen ones, as many steps for every choice, and
tested at 600 K. Each fit is kept in ``--runs`` and not repeated, so that a call that was stopped
goes on. Rows and the curve (.png) go to results/selection.json.
"""

import argparse
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms
from matplotlib.figure import Figure

from atomeq.cli.structures import versions
from atomeq.potential.checkpoint import load_potential
from atomeq.potential.selection import batches_of
from atomeq.screening.selection import CRITERIA, By, select
from benchmarks.record import RESULTS, ROOT, atomeq, children_cpu_seconds, commit, read, write

FILE = RESULTS / "selection.json"
N_KNOWN, N_HELD_OUT, EVERY = 20, 25, 2  # at 300 K; at 600 K to choose the epoch; of the test set
NUMBERS = (10, 30)
RANDOM_SEEDS = (0, 1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of acac's files")
    parser.add_argument("--runs", type=Path, default=Path("runs/selection"))
    parser.add_argument("--steps", type=int, default=400, help="of each fit, in batches of 5")
    parser.add_argument("--by", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    parser.add_argument("--numbers", nargs="+", type=int, default=list(NUMBERS))
    options = parser.parse_args(argv)
    options.runs.mkdir(parents=True, exist_ok=True)
    cold, hot, test = (
        ase.io.read(options.data / f"{name}.extxyz.gz", ":")
        for name in ("train_300K", "train_600K", "test_MD_600K")
    )
    rng = np.random.RandomState(0)
    cold = [cold[k] for k in rng.permutation(len(cold))]
    hot = [hot[k] for k in rng.permutation(len(hot))]
    known, held_out = cold[:N_KNOWN], hot[:N_HELD_OUT]
    pool = cold[N_KNOWN:] + hot[N_HELD_OUT:]
    ase.io.write(options.runs / "val.extxyz", held_out)
    fit(options, "known", known, seeds=3)
    committee = load_potential(options.runs / "known" / "committee")
    document = read(FILE)
    rows = document.get("rows", {})
    rows["none"] = {"0": error(options.runs / "known" / "committee" / "seed-0", test)}
    lines = [(by, seed) for by in options.by for seed in (RANDOM_SEEDS if by == "random" else (0,))]
    for number in options.numbers:
        for by, seed in lines:
            name = f"{by} {seed}" if by == "random" else by
            start = time.process_time()
            chosen = choice(pool, number, committee, by, known, seed)
            seconds = time.process_time() - start
            cost = fit(options, f"{name} {number}".replace(" ", "-"), [*known, *chosen])
            where = options.runs / f"{name} {number}".replace(" ", "-") / "potential"
            hotter = sum(any(atoms is one for one in hot) for atoms in chosen)
            found = {**error(where, test), "of 600 K": hotter, "choice_cpu_s": round(seconds, 1)}
            rows.setdefault(name, {})[str(number)] = found | cost
            write(FILE, {**about(options), "rows": rows})
            sys.stdout.write(f"{name:12} {number:4} {found}\n")
            sys.stdout.flush()
    draw(rows)
    return 0


def choice(
    pool: list[Atoms], number: int, committee, by: By, known: list[Atoms], seed: int
) -> list[Atoms]:
    """Return the chosen structures of the pool."""
    found = select(pool, number, committee, by=by, training=known, seed=seed)
    return [pool[one.index] for one in found.chosen]


def fit(
    options: argparse.Namespace, name: str, structures: list[Atoms], seeds: int | None = None
) -> dict[str, float]:
    """Train on structures, unless that is done; return the CPU seconds."""
    run = options.runs / name
    done = run / "cost.json"
    if not done.exists():
        run.mkdir(exist_ok=True)
        ase.io.write(run / "train.extxyz", structures)
        before = children_cpu_seconds()
        n_epochs = options.steps // -(-len(structures) // 5)
        atomeq(
            *("fit", "-c", str(ROOT / "configs" / "experiment" / "acac_escn.yaml")),
            *(f"--data.train={run}/train.extxyz", f"--data.val={options.runs}/val.extxyz"),
            *("--data.split.val=0", f"--trainer.default_root_dir={run}", "--overwrite"),
            *(f"--trainer.max_epochs={n_epochs}", "--trainer.accelerator=cpu"),
            *(f"--trainer.check_val_every_n_epoch={max(1, n_epochs // 8)}",),
            *("--save_potential.calibrate_on=0", *([f"--seeds={seeds}"] if seeds else [])),
        )
        write(done, {"cpu_seconds": round(children_cpu_seconds() - before, 1)})
    return read(done)


def error(folder: Path, test: list[Atoms]) -> dict[str, float]:
    """Return root mean square errors of a potential at 600 K: forces meV/Å, energy meV/atom."""
    potential = load_potential(folder)
    expected = test[::EVERY]
    forces, energies = [], []
    for graph in batches_of(potential, expected):
        found = potential(graph, ("energy", "forces"))
        forces.append((found["forces"] - graph.forces).square().flatten())
        energies.append(((found["energy"] - graph.energy) / graph.natoms).square())
    each = {"forces": torch.cat(forces), "energy": torch.cat(energies)}
    return {name: round(1e3 * float(e.double().mean().sqrt()), 2) for name, e in each.items()}


def about(options: argparse.Namespace) -> dict[str, object]:
    """Return what the rows are of."""
    return {
        "command": "python scripts/benchmark.py selection --data ATOMEQ_DATA/acac",
        "what": f"acetylacetone: {N_KNOWN} frames at 300 K and the chosen ones, {options.steps} "
        f"steps of 5, every {EVERY}nd frame of the 600 K test; rms of forces and energy",
        "unit": "forces meV/Å, energy meV/atom",
        "commit": commit(),
        "versions": versions(),
    }


def draw(rows: dict[str, dict[str, dict[str, float]]]) -> None:
    """Draw the error of forces against the number of labels, a line for each choice."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    first = rows["none"]["0"]["forces"]
    for name, found in rows.items():
        if name == "none":
            continue
        numbers = sorted(map(int, found))
        errors = [first, *(found[str(number)]["forces"] for number in numbers)]
        style = {"color": "0.6", "linestyle": "--"} if name.startswith("random") else {}
        axes.plot([0, *numbers], errors, marker="o", markersize=4, label=name, **style)
    axes.set(xlabel="labels added", ylabel="rms error of forces at 600 K / meV/Å")
    axes.legend()
    figure.savefig(FILE.with_suffix(".png"), dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
