"""Products on the sphere against gates, trained at equal cost.

Acetylacetone (energies and forces) and QM7 (atomization energies) with eSCN and EquiformerV2, whose
update of an atom is a gate or the product of two functions on the sphere. Each fit gets as many
epochs as go into ``--seconds`` of the CPU on one core; the configurations are those of
configs/experiment, but for that option and ``--seeds``. Called again it goes on where it was
stopped; rows are in results/feed_forward.json.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from atomeq.cli.structures import versions
from benchmarks.acac import train
from benchmarks.record import RESULTS, ROOT, write

FILE = RESULTS / "feed_forward.json"
OPTION = {"escn": "update", "equiformer_v2": "feed_forward"}
UPDATES = ("gate", "product")
PILOT = {"acac": (1, 4), "qm7": (1, 2)}  # epochs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", choices=list(PILOT), default=list(PILOT))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--seconds", type=float, default=150.0, help="of the CPU, for each fit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for data, seed in ((data, seed) for seed in options.seeds for data in options.data):
        for model in OPTION:
            for update in UPDATES:
                name = f"{data}_{model}_{update}_{seed}"
                run = options.runs / name
                if not (run / "test_errors.json").exists():
                    words = ["-c", str(ROOT / "configs" / "experiment" / f"{data}_{model}.yaml")]
                    words += [f"--model.model.init_args.{OPTION[model]}={update}"]
                    words += [f"--seed_everything={seed}"]
                    train(words, run, options.seconds, PILOT[data])
                rows.append({"data": data, "model": model, "update": update, "seed": seed})
                rows[-1] |= json.loads((run / "cost.json").read_text())
                rows[-1] |= {"errors": json.loads((run / "test_errors.json").read_text())}
                sys.stdout.write(f"{json.dumps(rows[-1])}\n")
                write_results(rows, options.seconds)
    return 0


def write_results(rows: list[dict[str, Any]], seconds: float) -> None:
    """Write all rows there are so far."""
    document = {
        "command": f"python scripts/benchmark.py feed-forward --seconds {seconds:g}",
        "unit": "eV, eV/Å; cpu_seconds of the fit without its start",
        "versions": versions(),
        "rows": rows,
    }
    write(FILE, document)
