"""Train every model on QM7 at equal cost and collect the table of test errors.

``benchmark.py qm7`` runs ``atomeq fit`` and ``atomeq test`` one model after the other, each about
eight minutes of one core (the epochs in configs/experiment/qm7_*.yaml are chosen so), and writes
results/qm7.json. Called again it goes on where it was stopped; ``--collect`` only reads the runs
that have been finished.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from atomeq.cli.structures import versions
from atomeq.potential.checkpoint import load_predictor
from atomeq.units import KCAL_PER_MOL
from benchmarks.record import RESULTS, ROOT, atomeq, fit, rows_of_tested, write

FILE = RESULTS / "qm7.json"
BAR = 1.5  # kcal/mol, to be reached by one of them
MODELS = ("egnn", "escn", "equihgnn", "faenet", "segno", "equiformer_v2", "hypergraph")
MODELS += ("nequip", "mace", "ponita", "se3_transformer", "clifford")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    options = parser.parse_args(argv)
    for model in options.models:
        run = options.runs / f"qm7_{model}"
        if not options.collect and not (run / "test_errors.json").exists():
            train(model, run)
        write_results(options.runs)
    return 0


def train(model: str, run: Path) -> None:
    """Fit and test a model."""
    words = ["-c", str(ROOT / "configs" / "experiment" / f"qm7_{model}.yaml")]
    fit(run, words)
    best = f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"
    atomeq("test", *words, f"--trainer.default_root_dir={run}", "--overwrite", best)


def write_results(runs: Path) -> None:
    """Write the table of all runs that have been tested, earlier ones included, and show it."""
    rows = rows_of_tested(FILE, {model: runs / f"qm7_{model}" for model in MODELS}, row_of)
    document = {
        "command": "python scripts/benchmark.py qm7",
        "what": "atomization energies of QM7 (7,101 molecules, PBE0): 5,326 train, 355 choose the "
        "epoch, 1,420 are tested",
        "unit": "kcal/mol",
        "bar": BAR,
        "versions": versions(),
        "models": rows,
    }
    write(FILE, document)
    for model, row in sorted(rows.items(), key=lambda item: item[1]["test_mae"]):
        sys.stdout.write(
            f"{model:14} MAE {row['test_mae']:.3f}  RMSE {row['test_rmse']:.3f} kcal/mol  "
            f"{row['cpu_seconds']:.0f} CPU s  {row['epochs']} epochs\n"
        )


def row_of(run: Path) -> dict[str, Any]:
    """Return errors, cost and size of a finished run."""
    errors = json.loads((run / "test_errors.json").read_text())["held_out"]
    predictor = load_predictor(run / "potential")
    config = yaml.safe_load((run / "config.yaml").read_text())
    return {
        "test_mae": round(errors["atomization_energy_mae"] / KCAL_PER_MOL, 4),
        "test_rmse": round(errors["atomization_energy_rmse"] / KCAL_PER_MOL, 4),
        "cpu_seconds": sum(json.loads((run / "cpu_seconds.json").read_text())),
        "epochs": config["trainer"]["max_epochs"],
        "parameters": sum(p.numel() for p in predictor.model.parameters()),
        "seed": config["seed_everything"],
        "commit": (run / "commit").read_text(),
    }
