"""Models trained on acetylacetone at equal cost: test errors of energies and forces.

``atomeq fit`` and ``atomeq test`` on configs/experiment/acac_*.yaml, one model after another. Each
fit gets as many epochs as go into ``--seconds`` of the CPU on one core, by what epochs cost in two
short runs before, so that the schedule of the learning rate ends with it. ``--collect`` only reads
runs that are finished. ``--mace-torch PYTHON`` names an interpreter with mace-torch, whose own
command then trains a MACE at the same cost (:mod:`benchmarks.peers.mace_torch`).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from atomeq.cli.structures import versions
from atomeq.potential.checkpoint import load_potential
from benchmarks.peers import mace_torch
from benchmarks.record import (
    RESULTS,
    ROOT,
    atomeq,
    children_cpu_seconds,
    commit,
    rows_of_tested,
    write,
)

USUAL = 150.0  # CPU seconds of a fit; results of other costs have files of their own
MODELS = ("egnn", "escn", "equiformer_v2", "nequip", "mace")
PILOT = (1, 4)  # epochs of the short runs; the difference leaves out what a start costs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--seconds", type=float, default=USUAL, help="of the CPU, for each fit")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--mace-torch", metavar="PYTHON", help="an interpreter that has it")
    options = parser.parse_args(argv)
    peer = options.runs / f"acac_{mace_torch.NAME}"
    wanted = options.mace_torch and not options.collect
    if wanted and not (peer / "test_errors.json").exists():
        train_mace_torch(options.mace_torch, peer, options.seconds)
    for model in options.models:
        run = options.runs / f"acac_{model}"
        if not options.collect and not (run / "test_errors.json").exists():
            experiment = ROOT / "configs" / "experiment" / f"acac_{model}.yaml"
            train(["-c", str(experiment)], run, options.seconds)
        write_results(options.runs, options.seconds)
    return 0


def train(config: list[str], run: Path, seconds: float, pilot: tuple[int, int] = PILOT) -> None:
    """Fit and test a model, and keep what it cost beside its checkpoints.

    Args:
        config: Words of ``atomeq fit`` that name the experiment and what differs.
        run: Folder of the run.
        seconds: Of the CPU, of all epochs.
        pilot: Epochs of the two short runs that say what one costs.
    """
    fit_at_cost(partial(cost_of_fit, config), run, seconds, pilot, commit=commit())
    where = [f"--trainer.default_root_dir={run}", f"--ckpt_path={run}/checkpoints/best.ckpt"]
    atomeq("test", *config, *where, "--overwrite", "--trainer.accelerator=cpu")


def train_mace_torch(python: str, run: Path, seconds: float) -> None:
    """Let mace-torch train a MACE, which then becomes a potential of ours and is tested as such."""
    run = run.resolve()
    experiment = ROOT / "configs" / "experiment" / "acac_escn.yaml"
    data = yaml.safe_load(experiment.read_text())["data"]["init_args"]
    version = mace_torch.version(python)
    fit_at_cost(partial(mace_torch.cost_of_fit, python, data), run, seconds, PILOT, version=version)
    potential = run / "potential"
    atomeq("convert", str(run / f"{mace_torch.NAME}.model"), str(potential), "--overwrite")
    where = [f"--potential={potential}", f"--trainer.default_root_dir={run}"]
    atomeq("test", "-c", str(experiment), *where, "--overwrite", "--trainer.accelerator=cpu")


def fit_at_cost(
    cost_of: Callable[[Path, int], float],
    run: Path,
    seconds: float,
    pilot: tuple[int, int],
    **of: str,
) -> None:
    """Fit in a folder for as many epochs as go into the seconds; write what it cost and is of."""
    with tempfile.TemporaryDirectory() as scratch:
        short, long = (cost_of(Path(scratch) / str(n), n) for n in pilot)
    per_epoch = (long - short) / (pilot[1] - pilot[0])
    n_epochs = max(1, round(seconds / per_epoch))
    cost = cost_of(run, n_epochs)
    start = short - per_epoch * pilot[0]
    spent = {"epochs": n_epochs, "cpu_seconds": round(cost - start, 1), **of}
    (run / "cost.json").write_text(json.dumps(spent))


def cost_of_fit(config: list[str], run: Path, n_epochs: int) -> float:
    """Return the CPU seconds of a fit, the start of the process included."""
    before = children_cpu_seconds()
    where = [f"--trainer.default_root_dir={run}", f"--trainer.max_epochs={n_epochs}"]
    atomeq("fit", *config, *where, "--overwrite", "--trainer.accelerator=cpu")
    return children_cpu_seconds() - before


def write_results(runs: Path, seconds: float) -> None:
    """Write the table of all runs that have been tested, earlier ones included, and show it."""
    file = RESULTS / ("acac.json" if seconds == USUAL else f"acac_{seconds:g}s.json")
    names = (*MODELS, mace_torch.NAME)
    rows = rows_of_tested(file, {name: runs / f"acac_{name}" for name in names}, row_of)
    document = {
        "command": f"python scripts/benchmark.py acac --seconds {seconds:g}",
        "what": "acetylacetone (BOTNet data): 450 frames at 300 K to train on, 50 choose the "
        "epoch, tests of MD at 300 K and 600 K; mean absolute errors",
        "unit": "energy meV/atom, forces meV/Å, rms their root mean square; cpu_seconds of the fit "
        "without its start",
        "versions": versions(),
        "models": rows,
    }
    write(file, document)
    for model, row in rows.items():
        errors = "  ".join(f"{key} {value:.1f}" for key, value in row.items() if key.endswith("K"))
        sys.stdout.write(
            f"{model:14} {errors}  {row['cpu_seconds']:.0f} CPU s  {row['epochs']} epochs\n"
        )


def row_of(run: Path) -> dict[str, Any]:
    """Return errors, cost and size of a finished run."""
    row: dict[str, Any] = {}
    for name, found in json.loads((run / "test_errors.json").read_text()).items():
        row[f"energy {name}"] = round(found["energy_per_atom_mae"], 3)
        row[f"forces {name}"] = round(found["forces_mae"], 2)
        row[f"rms forces {name}"] = round(found["forces_rmse"], 2)
    file = run / "config.yaml"  # those of mace-torch have none
    seed = yaml.safe_load(file.read_text())["seed_everything"] if file.exists() else mace_torch.SEED
    model = load_potential(run / "potential").model
    return {
        **row,
        **json.loads((run / "cost.json").read_text()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
    }
