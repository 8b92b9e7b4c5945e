"""Measure a compiled potential against the potential it was made from: energy and forces.

``OMP_NUM_THREADS=1 benchmark.py export`` (some five minutes, most of them compiling) prints one
table and writes results/export_cpu.json; ``--quick`` takes the small crystal alone. Graphs are made
before the clock starts; times are CPU seconds of one thread, the two taken in turns, and the ratio
is the median of the turns' ratios.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ase.build import bulk
from rich.console import Console
from rich.table import Table

from atomeq import Potential, export_potential, load_compiled, load_potential
from atomeq.graph.atom_graph import AtomGraph
from atomeq.potential.checkpoint import untrained_potential
from benchmarks.record import RESULTS, ROOT, cpu_seconds_so_far, machine, write

FILE = RESULTS / "export_cpu.json"
POTENTIALS: dict[str, Callable[[], Potential]] = {
    "EGNN, configs/model/egnn.yaml": lambda: untrained_potential(
        ROOT / "configs" / "model" / "egnn.yaml", dtype=torch.float32
    ),
    "eSCN, cu-pbe": lambda: load_potential("cu-pbe"),
}
REPEATS = {32: 40, 500: 10}  # atoms: cubic cells along each axis, 2 and 5


def main(argv: list[str] | None = None) -> int:
    """Compile, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="32 atoms alone")
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE")
    arguments = parser.parse_args(argv)
    sizes = [32] if arguments.quick else list(REPEATS)
    if torch.get_num_threads() != 1:
        raise SystemExit("set OMP_NUM_THREADS=1: a package keeps the threads it was compiled with")
    rows = [row for name, make in POTENTIALS.items() for row in measured(name, make(), sizes)]
    document = {
        "machine": machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "quick": arguments.quick,
        "rows": rows,
    }
    write(arguments.out, document)
    table = Table("potential", "atoms", "edges", "eager, ms", "compiled, ms", "ratio", "compile, s")
    for row in rows:
        table.add_row(
            *(row["potential"], str(row["atoms"]), str(row["edges"])),
            *(f"{row['eager_ms']:.1f}", f"{row['compiled_ms']:.1f}", f"{row['ratio']:.2f}"),
            f"{row['compile_s']:.0f}",
        )
    Console().print(table)
    return 0


def measured(name: str, potential: Potential, sizes: list[int]) -> list[dict]:
    """Return a row for each size."""
    with tempfile.TemporaryDirectory() as folder:
        start = cpu_seconds_so_far()
        path = export_potential(potential, Path(folder) / "x.pt2")
        compile_seconds = cpu_seconds_so_far() - start
        compiled = load_compiled(path)
    rows = []
    for n_atoms in sizes:
        cells = round((n_atoms / 4) ** (1 / 3))
        atoms = bulk("Cu", cubic=True).repeat(cells)
        atoms.rattle(0.05, seed=0)
        graph = potential.build_graph(atoms)
        expected, found = potential(graph)["forces"], compiled(graph)["forces"]
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
        times = [
            (_seconds(potential, graph), _seconds(compiled, graph)) for _ in range(REPEATS[n_atoms])
        ]
        rows.append(
            {
                "potential": name,
                "atoms": len(atoms),
                "edges": graph.n_edges,
                "eager_ms": 1e3 * statistics.median(one for one, _ in times),
                "compiled_ms": 1e3 * statistics.median(other for _, other in times),
                "ratio": statistics.median(one / other for one, other in times),
                "compile_s": compile_seconds,
            }
        )
    return rows


def _seconds(potential: Potential, graph: AtomGraph) -> float:
    start = time.process_time()
    potential(graph, ("energy", "forces"))
    return time.process_time() - start
