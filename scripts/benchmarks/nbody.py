"""Train EGNN and SEGNO on charged n-body systems, three seeds each, and collect what came out.

``benchmark.py nbody`` runs ``atomeq fit`` and ``atomeq test`` one after the other, about an hour on
one core, and writes results/nbody.json. Called again it goes on where it was stopped; ``--collect``
only reads the runs that have been finished.
"""

import argparse
import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

from atomeq.cli.structures import versions
from benchmarks.record import RESULTS, ROOT, atomeq, fit, write

FILE = RESULTS / "nbody.json"
BARS = {"egnn": 0.0070, "segno": 0.0043}  # test error to reach, length²
CURVE_EPOCHS = 10  # between two points of the curve


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(BARS), default=list(BARS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    options = parser.parse_args(argv)
    wanted = [(model, seed) for model in options.models for seed in options.seeds]
    for model, seed in wanted:
        run = options.runs / f"nbody_{model}_seed{seed}"
        if not options.collect and not (run / "test_errors.json").exists():
            train(model, seed, run)
        write_results(options.runs)
    return 0


def train(model: str, seed: int, run: Path) -> None:
    """Fit and test one seed."""
    words = ["-c", str(ROOT / "configs" / "experiment" / f"nbody_{model}.yaml")]
    words += [f"--data.folder={run.parent / 'nbody-data'}"]
    words += [f"--seed_everything={seed}", f"--data.seed={seed}"]
    fit(run, words)
    best = f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"
    atomeq("test", *words, f"--trainer.default_root_dir={run}", "--overwrite", best)


def write_results(runs: Path) -> None:
    """Write the table of all runs that have been tested, and show it."""
    found = {
        model: [
            row_of(path.parent) for path in sorted(runs.glob(f"nbody_{model}_*/test_errors.json"))
        ]
        for model in BARS
    }
    document = {
        "command": "python scripts/benchmark.py nbody",
        "what": "charged systems of 5 bodies, positions 1,000 steps (1.0 units of time) ahead; "
        "3,000 trajectories train, 2,000 validate, 2,000 test; the epoch of lowest validation "
        "error is tested",
        "unit": "mean squared error of a coordinate, length²",
        "versions": versions(),
        "models": {
            model: {"bar": BARS[model], "worst": max(row["test_mse"] for row in rows), "runs": rows}
            for model, rows in found.items()
            if rows
        },
    }
    write(FILE, document)
    for model, rows in found.items():
        for row in rows:
            figures = f"test MSE {row['test_mse']:.5f}, {row['cpu_seconds']:.0f} CPU s"
            sys.stdout.write(f"{model} seed {row['seed']}: {figures}\n")


def row_of(run: Path) -> dict[str, Any]:
    """Return seed, commit, errors, CPU seconds and curve of a finished run."""
    validation: dict[int, float] = {}
    training: dict[int, float] = {}
    # A run continued after a stop has several versions; later ones overwrite what they repeat.
    for path in sorted(run.glob("metrics/version_*/metrics.csv"), key=_version_number):
        for line in csv.DictReader(path.read_text().splitlines()):
            if line.get("val/loss"):
                validation[int(line["epoch"]) + 1] = float(line["val/loss"])
            if line.get("train/loss"):
                training[int(line["epoch"]) + 1] = float(line["train/loss"])
    best = min(validation, key=validation.__getitem__)
    last = max(validation)
    return {
        "seed": int(run.name.rpartition("seed")[2]),
        "commit": (run / "commit").read_text(),
        "test_mse": json.loads((run / "test_errors.json").read_text())["test"]["mse"],
        "val_mse": validation[best],
        "best_epoch": best,
        "epochs": max(training),
        "diverged": not math.isfinite(validation[last]) or validation[last] > 2 * validation[best],
        "cpu_seconds": sum(json.loads((run / "cpu_seconds.json").read_text())),
        "curve": [
            {"epoch": epoch, "train": round(training[epoch], 6), "val": round(value, 6)}
            for epoch, value in sorted(validation.items())
            if epoch % CURVE_EPOCHS == 0
        ],
    }


def _version_number(path: Path) -> int:
    return int(path.parent.name.rpartition("_")[2])
