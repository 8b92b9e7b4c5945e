"""Microseconds per atom and step of one potential: the speed table of its card.

``benchmark.py speed cu-pbe`` times NVE on its crystal at several sizes, and on a batch of small
ones, and writes speed.json into its folder. CPU seconds on one thread, those of the clock on more.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from ase.build import bulk

from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.integrators import VelocityVerlet
from atomeq.dynamics.state import prepare
from atomeq.files import write_atomically
from atomeq.graph.files import read_structures
from atomeq.potential.folders import find_potential
from atomeq.potential.untrusted import read_yaml
from atomeq.properties.reference_values import crystals_of
from benchmarks.record import machine

SIZES = {32: 1, 500: 1, 4000: 1, 10976: 1, -32: 32}  # atoms, less than 0 in a batch: structures
ROUNDS, STEPS = 3, 2


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; return the exit code."""
    parser = argparse.ArgumentParser(prog="benchmark.py speed", description=__doc__)
    parser.add_argument("potential", help="name or folder of a potential with references.yaml")
    parser.add_argument("--structure", help="file of a molecule, for a potential of no crystal")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--quick", action="store_true", help="small sizes alone")
    options = parser.parse_args(argv)
    folder = find_potential(options.potential)
    if options.structure:
        (unit,) = read_structures(options.structure, index="0")
        sizes = {len(unit): 1, -len(unit): 32}
    else:
        first = next(iter(crystals_of(read_yaml(folder / "references.yaml")).values()))
        unit, sizes = bulk(**first["crystal"]), SIZES
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for size, copies in sizes.items():
            if not (options.quick and abs(size) > 100):
                rows.append(measured(folder, unit, abs(size), copies, threads))
                print(rows[-1], flush=True)
    words = ["scripts/benchmark.py speed", str(options.potential)]
    words += ["--structure", options.structure] if options.structure else []
    words += ["--threads", *map(str, options.threads)]
    document = {"command": " ".join(words), "machine": machine(), "rows": rows}
    with write_atomically(folder / "speed.json") as partial:
        partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def measured(folder: Path, crystal: Any, size: int, copies: int, threads: int) -> dict[str, Any]:
    """Return the row of so many copies of a crystal of about so many atoms, in motion."""
    repeat = max(1, round((size / len(crystal)) ** (1 / 3)))
    atoms = crystal.repeat(repeat) if repeat > 1 else crystal
    evaluate, motion = Evaluator(folder), VelocityVerlet(timestep=2.0, temperature=300.0)
    state = motion.init(prepare([atoms] * copies), evaluate)
    clock = time.process_time if threads == 1 else time.perf_counter
    state = motion.step(state, evaluate)
    seconds = []
    for _ in range(ROUNDS):
        start = clock()
        for _ in range(STEPS):
            state = motion.step(state, evaluate)
        seconds.append((clock() - start) / STEPS)
    us = 1e6 * statistics.median(seconds) / (len(atoms) * copies)
    return {"structures": copies, "atoms": len(atoms), "threads": threads, "us_per_atom": us}


if __name__ == "__main__":
    main()
