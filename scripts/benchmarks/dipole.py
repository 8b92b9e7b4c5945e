"""Dipoles and polarizabilities of molecules that a network has not seen, beside GFN2-xTB's.

``benchmark.py dipole`` trains configs/experiment/dipole_escn.yaml, some 15 CPU minutes, on what
scripts/label_gfn2.py has made of QM7, tests it on a tenth of the molecules and writes
results/dipole.json. Called again it goes on where it was stopped. The exit code is 1 where a bar is
missed.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from atomeq.cli.data_stats import data_module
from atomeq.cli.structures import versions
from atomeq.graph.atom_graph import AtomGraph
from atomeq.potential.checkpoint import load_predictor
from atomeq.units import DEBYE
from benchmarks.judged import Judged, summary
from benchmarks.record import RESULTS, ROOT, atomeq, fit, write

CONFIG = ROOT / "configs" / "experiment" / "dipole_escn.yaml"
BARS = {"dipole_mae": 0.05, "polarizability_relative": 2.0}  # D, %
LABELS = ("dipole", "polarizability")
UNITS = {"dipole_mae": "D", "polarizability_relative": "%"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("words", nargs="*", help="after --: options of atomeq fit")
    options = parser.parse_args(argv)
    run = options.runs / "dipole_escn"
    words = ["-c", str(CONFIG), *options.words]
    fit(run, words)
    if not (run / "test_errors.json").exists():
        best = f"--ckpt_path={run}/checkpoints/best.ckpt"
        atomeq("test", *words, f"--trainer.default_root_dir={run}", best)
    row = row_of(run)
    document = {
        "command": "python scripts/benchmark.py dipole",
        "what": "of molecules not trained on: components and lengths of dipoles, D, and norms of "
        "the errors of polarizabilities, in % of the polarizability's (Frobenius)",
        "bars": BARS,
        "versions": versions(),
        **row,
    }
    write(RESULTS / "dipole.json", document)
    lines = [Judged.at_most(name, row[name], bar, UNITS[name]) for name, bar in BARS.items()]
    sys.stdout.write(json.dumps(row, indent=1) + f"\n{summary(lines)}\n")
    return 1 if any(line.met is False for line in lines) else 0


def row_of(run: Path) -> dict[str, Any]:
    """Return errors, cost and size of a finished run."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    predictor = load_predictor(run / "potential")
    data = data_module(run / "config.yaml")
    data.labels = replace(data.labels, **dict(zip(LABELS, LABELS, strict=True)))
    data.use_builder(predictor.build_graph)
    data.setup("test")
    errors = json.loads((run / "test_errors.json").read_text(encoding="utf-8"))["held_out"]
    relative, lengths = errors_of(predictor, data.test_dataloader()[0])
    return {
        "dipole_mae": round(errors["dipole_mae"], 4),
        "dipole_rmse": round(errors["dipole_rmse"], 4),
        "dipole_length_mae": round(lengths, 4),
        "polarizability_relative": round(100 * relative, 3),
        "polarizability_mae_bohr3": round(errors["polarizability_mae"], 4),
        "molecules": {part: len(found) for part, found in data.structures().items()},
        "cpu_seconds": sum(json.loads((run / "cpu_seconds.json").read_text(encoding="utf-8"))),
        "epochs": config["trainer"]["max_epochs"],
        "parameters": sum(p.numel() for p in predictor.model.parameters()),
        "seed": config["seed_everything"],
        "commit": (run / "commit").read_text(encoding="utf-8"),
    }


def errors_of(predictor: Any, batches: Iterable[AtomGraph]) -> tuple[float, float]:
    """Return relative errors of polarizabilities, and errors of the lengths of dipoles in D."""
    relative: list[Tensor] = []
    lengths: list[Tensor] = []
    with torch.no_grad():
        for graph in batches:
            found = predictor(graph, LABELS)
            true = {key: getattr(graph, key).double() for key in LABELS}
            error = torch.linalg.matrix_norm(found["polarizability"] - true["polarizability"])
            relative.append(error / torch.linalg.matrix_norm(true["polarizability"]))
            size, expected = (torch.linalg.vector_norm(x["dipole"], dim=1) for x in (found, true))
            lengths.append((size - expected).abs() / DEBYE)
    return float(torch.cat(relative).mean()), float(torch.cat(lengths).mean())
