"""Every figure that is asked of atomeq on a CPU, beside what is measured here, in one table.

``benchmark.py bars [--quick] [--only WORD]`` takes one row after the other and writes each to
results/bars_cpu.json as it is done. Called again it goes on where it was stopped: rows measured
with this very code on this machine, as carefully, are not measured again, but with ``--again``, or
where something was needed that was not there: torch-sim, or a Python with fairchem-core, given as
``ATOMEQ_PEER_PYTHON`` (``benchmark.py models --help`` says how to make one); without it the file
keeps what was measured elsewhere. The exit code is 1 where a bar is missed.

A row is a function of ``quick`` that measures and yields judged figures; a benchmark that asks
something has one in ``ROWS``.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from ase import Atoms
from rich.console import Console

from atomeq.models.ponita_published import PublishedPONITA
from atomeq.potential.potential import Potential
from benchmarks import (
    dynamics,
    large,
    models,
    operation_bars,
    screening,
    small_systems,
    training_bars,
)
from benchmarks.judged import Judged, summary, table_of
from benchmarks.operation_cases import cases
from benchmarks.record import RESULTS, code_digest, machine, read, write
from benchmarks.rounds import cpu_seconds, measure

Row = Callable[[bool], Iterable[Judged]]
FILE = RESULTS / "bars_cpu.json"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller and shorter where it can be")
    parser.add_argument("--only", default="", metavar="WORD", help="rows whose name has this word")
    parser.add_argument("--again", action="store_true", help="measure what has been measured too")
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = [name for name in ROWS if options.only in name]
    if not names:
        parser.error(f"no row has {options.only!r} in its name; there are {', '.join(ROWS)}")
    lines: list[Judged] = []
    for name in names:
        lines += measured(name, quick=options.quick, again=options.again, file=options.out)
    Console(width=None if sys.stdout.isatty() else 110).print(table_of("one CPU thread", lines))
    print(summary(lines))
    return 1 if any(line.met is False for line in lines) else 0


def measured(name: str, *, quick: bool, again: bool, file: Path) -> list[Judged]:
    """Return the figures of a row, from the file where it has them of this code and machine."""
    document, digest, here = read(file), code_digest(), machine()
    known = document.get(name)
    if known and not again and quick >= known["quick"]:
        there = known["machine"]
        same = known["code"] == digest and there["device"] == here["device"]
        if same and not any(line["measured"].startswith("needs ") for line in known["lines"]):
            return [Judged(**line) for line in known["lines"]]
    print(name, end=" ", file=sys.stderr, flush=True)
    start = time.monotonic()
    lines = list(ROWS[name](quick))
    seconds = time.monotonic() - start
    print(f"{seconds:.0f} s", file=sys.stderr, flush=True)
    row = {
        "quick": quick,
        "seconds": round(seconds, 1),
        "code": digest,
        "machine": here,
        "lines": [asdict(x) for x in lines],
    }
    if not known or any(x.met is not None for x in lines):  # else it was measured elsewhere
        write(file, document | {name: row})
    return lines


def operations(op: str, quick: bool) -> Iterable[Judged]:
    """Measure all cases of one operation beside other libraries."""
    torch.manual_seed(0)
    rows = []
    for name, make in cases("cpu", quick, 1):
        if name == op:
            case = make()
            rows += measure(case, case, 1.0 if quick else 4.0)
    return [bar.judged(rows) for bar in operation_bars.bars("cpu") if bar.op == op]


def of_dynamics(part: str, quick: bool) -> Iterable[Judged]:
    return dynamics.bars({part: dynamics.MEASUREMENTS[part](quick)})


def of_screening(part: str, quick: bool) -> Iterable[Judged]:
    return screening.bars({part: screening.MEASUREMENTS[part](quick)})


def of_large(part: str, quick: bool) -> Iterable[Judged]:
    return large.bars({part: large.MEASUREMENTS[part](quick)})


def of_published(name: str, limit: float, quick: bool) -> Iterable[Judged]:
    """Compare a published form with fairchem-core as shipped, in turns, with the same weights."""
    what = f"{name}, fairchem-core / ours"
    python = os.environ.get("ATOMEQ_PEER_PYTHON")
    if not python:
        return [Judged(what, "needs a Python with fairchem-core 1.10.0", f">= {limit:g} x")]
    row = models.against_peer(models.potential_of(name), name, 1 if quick else 5, python)
    apart = Judged.at_most(f"{name}, outputs differ by", row["largest_difference"], models.SAME)
    return [Judged.at_least(what, row["ratio"], limit, "x"), apart]


def of_ponita(quick: bool) -> Iterable[Judged]:
    """Time the published PONITA, as large as for rMD17, where all atoms are joined."""
    torch.manual_seed(0)
    potential = Potential(PublishedPONITA().float())
    carbons = Atoms("C21", positions=2.5 * torch.randn(21, 3).numpy())
    graph = potential.build_graph(carbons)
    seconds = [cpu_seconds(lambda: potential(graph, ("energy", "forces"))) for _ in range(7)]
    yield Judged.at_most(PONITA, statistics.median(seconds[1:]), 0.27 / 2, "CPU s")


OPERATIONS = ("spherical_harmonics", "edge_wigner", "cg_conv", "escn_layer", "geometric_product")
#: The reference takes 0.27 CPU s and 0.5 GB.
PONITA = "published PONITA, energy and forces of 21 atoms, all pairs"
#: What is asked, in the order it is measured.
ROWS: dict[str, Row] = {
    **{f"operation {op}": partial(operations, op) for op in OPERATIONS},
    **{f"dynamics {part}": partial(of_dynamics, part) for part in dynamics.MEASUREMENTS},
    **{f"large {part}": partial(of_large, part) for part in large.MEASUREMENTS},
    "published equiformer_v2": partial(of_published, "equiformer_v2", 2.5),
    "published escn": partial(of_published, "escn", 2.2),
    "published ponita": of_ponita,
    **{f"screening {part}": partial(of_screening, part) for part in screening.MEASUREMENTS},
    "training": training_bars.bars,
    "small systems": small_systems.bars,
}
