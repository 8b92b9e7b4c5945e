"""What a step of training costs: energy, forces, loss, gradient and optimizer of each model.

``benchmark.py training [--models egnn,escn] [--quick]`` trains on a batch of rattled copper cells
and molecules with the loss and the parameter groups of ``atomeq fit``, AdamW, float32, one thread.
CPU seconds of the parts of a step, medians over steps, go to results/training_cpu.json, with the
time of energy and forces alone and the peak of memory, which each model has a process of its own
for.
"""

import argparse
import itertools
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from ase import Atoms
from ase.build import bulk, molecule
from rich.console import Console
from rich.table import Table

from atomeq.graph.atom_graph import AtomGraph
from atomeq.potential.checkpoint import build_model
from atomeq.potential.potential import Potential
from atomeq.training.losses import PotentialLoss
from atomeq.training.parameters import parameter_groups
from benchmarks.record import RESULTS, ROOT, in_own_process, machine, read, write

FILE = RESULTS / "training_cpu.json"
FOLDER = ROOT / "configs" / "model"
PARTS = ("forward", "backward", "optimizer")


def main(argv: list[str] | None = None) -> int:
    every = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(every), help="of configs/model, by commas")
    parser.add_argument("--quick", action="store_true", help="3 steps in place of 20")
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE")
    parser.add_argument("--of", metavar="MODEL", help=argparse.SUPPRESS)  # in its own process
    options = parser.parse_args(argv)
    n_steps = 3 if options.quick else 20
    if options.of:
        print(json.dumps(steps(options.of, n_steps)))
        return 0
    names = options.models.split(",")
    if unknown := sorted(set(names) - set(every)):
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(every)}")
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        words = ["--of", name, *(["--quick"] if options.quick else [])]
        rows[name] = json.loads(in_own_process("training", *words).splitlines()[-1])
        row = {**rows[name], "steps": n_steps, "machine": machine()}
        write(options.out, read(options.out) | {name: row})  # what it says of others stays
    show(rows)
    return 0


def steps(name: str, n_steps: int) -> dict[str, Any]:
    """Train a model of configs/model for some steps; return what one costs and the last loss."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))
    potential = Potential(model.float())
    loss, batch = PotentialLoss(), labelled(potential)
    optimizer = torch.optim.AdamW(parameter_groups(potential), lr=1e-4)
    alone, times = [], []
    for step in range(n_steps + 1):  # the first builds tables
        begin = time.process_time()
        potential.eval()(batch, ("energy", "forces"))
        alone.append(time.process_time() - begin)
        marks = [time.process_time()]
        prediction = potential.train()(batch, loss.properties, create_graph=True)
        error = loss(prediction, batch)["loss"]
        marks.append(time.process_time())
        trained = [p for p in potential.parameters() if p.requires_grad]
        error.backward(inputs=trained)  # as AtomisticTask does
        marks.append(time.process_time())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.process_time())
        if step:
            times.append([end - start for start, end in itertools.pairwise(marks)])
    medians = [statistics.median(taken) for taken in zip(*times, strict=True)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "atoms": batch.n_atoms,
        "edges": batch.n_edges,
        **dict(zip(PARTS, medians, strict=True)),
        "step": statistics.median(sum(t) for t in times),
        "energy_and_forces": statistics.median(alone[1:]),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loss": float(error.detach()),
    }


def labelled(potential: Potential) -> AtomGraph:
    """Return a batch of two copper cells and five molecules with random labels."""
    structures: list[Atoms] = [bulk("Cu", cubic=True).repeat(2) for _ in range(2)]
    structures += [molecule(name) for name in ("CH3CH2OH", "C6H6", "H2O", "C2H4", "CO2")]
    for seed, atoms in enumerate(structures):
        atoms.rattle(0.05, seed=seed)
    graph = potential.build_graph(structures)
    made = torch.Generator().manual_seed(0)
    energy, forces = (
        torch.randn(shape, generator=made, dtype=torch.float64)
        for shape in ((graph.n_graphs,), (graph.n_atoms, 3))
    )
    return graph.replace(energy=energy, forces=forces, weight=torch.ones_like(energy))


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Print CPU milliseconds of a step and of its parts."""
    titles = ("model", "parameters", "edges", "step, ms", *PARTS, "energy, forces", "peak, GB")
    table = Table(*titles, box=None)
    for name, row in rows.items():
        times = [row[key] for key in ("step", *PARTS, "energy_and_forces")]
        cells = [f"{1e3 * seconds:.1f}" for seconds in times]
        memory = f"{row['peak_bytes'] / 1e9:.2f}"
        table.add_row(name, f"{row['parameters']:,}", str(row["edges"]), *cells, memory)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
