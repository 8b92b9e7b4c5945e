"""Train every model on QM7 at equal cost and collect the table of test errors.

``.venv/bin/python scripts/train_qm7.py`` runs ``atomeq fit`` and ``atomeq test`` one model after
the other, each about eight minutes of one core (the epochs in configs/experiment/qm7_*.yaml are
chosen so), and writes scripts/results/qm7.json. Called again it goes on where it was stopped;
``--collect`` only reads the runs that have been finished.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from atomeq.cli.structures import versions
from atomeq.files import write_atomically
from atomeq.potential.checkpoint import load_predictor
from atomeq.units import KCAL_PER_MOL

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results" / "qm7.json"
BAR = 1.5  # kcal/mol, to be reached by one of them
MODELS = ("egnn", "escn", "equihgnn", "faenet", "segno", "equiformer_v2", "hypergraph")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    options = parser.parse_args()
    for model in options.models:
        run = options.runs / f"qm7_{model}"
        if not options.collect and not (run / "test_errors.json").exists():
            train(model, run)
        write_results(options.runs)


def train(model: str, run: Path) -> None:
    """Fit and test a model, and keep the CPU seconds of the fit beside its checkpoints."""
    run.mkdir(parents=True, exist_ok=True)
    words = ["-c", str(ROOT / "configs" / "experiment" / f"qm7_{model}.yaml")]
    words += [f"--trainer.default_root_dir={run}"]
    checkpoints = run / "checkpoints"
    resumed = ["--ckpt_path=last"] if (checkpoints / "last.ckpt").exists() else []
    spent = run / "cpu_seconds.json"
    earlier = json.loads(spent.read_text()) if spent.exists() else []
    before = _children_cpu_seconds()
    try:
        atomeq("fit", *words, *resumed)
    finally:  # a fit that was stopped has cost its time too
        spent.write_text(json.dumps([*earlier, round(_children_cpu_seconds() - before, 1)]))
    (run / "commit").write_text(_commit())
    atomeq("test", *words, "--overwrite", f"--ckpt_path={checkpoints / 'best.ckpt'}")


def atomeq(*words: str) -> None:
    """Run a command of the package in a process of its own, on one thread."""
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    code = "from atomeq.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, *words], env=os.environ | threads, check=True)


def write_results(runs: Path) -> None:
    """Write the table of all runs that have been tested, and show it."""
    tested = [model for model in MODELS if (runs / f"qm7_{model}" / "test_errors.json").exists()]
    rows = {model: row_of(runs / f"qm7_{model}") for model in tested}
    document = {
        "command": "python scripts/train_qm7.py",
        "what": "atomization energies of QM7 (7,101 molecules, PBE0): 5,326 train, 355 choose the "
        "epoch, 1,420 are tested",
        "unit": "kcal/mol",
        "bar": BAR,
        "versions": versions(),
        "models": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with write_atomically(RESULTS) as partial:
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
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


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
