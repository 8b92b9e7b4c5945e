"""What starting costs: CPU seconds and modules of a first import, a first command, a first energy.

``benchmark.py startup [--quick]`` starts fresh processes by turns and takes the CPU time that each
needs beyond a bare Python; the compiled C kernels are there from before. The table goes to
results/startup_cpu.json.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.record import RESULTS, children_cpu_seconds, machine, write

FILE = RESULTS / "startup_cpu.json"
BARE = "python"
LAST_LINE = "import sys; print(len(sys.modules))"
STARTS = {
    BARE: "pass",
    "import torch": "import torch",
    "import atomeq": "import atomeq",
    "atomeq --help": "from atomeq.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    "load_potential('cu-pbe')": "from atomeq import load_potential; load_potential('cu-pbe')",
    "first energy and forces": "from ase.build import bulk\nfrom atomeq import AtomeqCalculator\n"
    "atoms = bulk('Cu', cubic=True); atoms.calc = AtomeqCalculator('cu-pbe'); atoms.get_forces()",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two rounds in place of five")
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE")
    options = parser.parse_args(argv)
    rows = measure(2 if options.quick else 5)
    write(options.out, {"machine": machine(), "quick": options.quick, "starts": rows})
    table = Table("start", "CPU s beyond a bare Python", "modules", box=None)
    for name, row in rows.items():
        table.add_row(name, f"{row['cpu_s']:.2f}", str(row["modules"]))
    Console().print(table)
    return 0


def measure(rounds: int) -> dict[str, dict[str, Any]]:
    """Return CPU seconds and modules of each start."""
    times: dict[str, list[float]] = {name: [] for name in STARTS}
    modules: dict[str, int] = {}
    _started("first energy and forces")  # compiles what is not in the cache
    for _ in range(rounds):
        for name in STARTS:
            before = children_cpu_seconds()
            modules[name] = _started(name)
            times[name].append(children_cpu_seconds() - before)
    bare = statistics.median(times[BARE])
    return {
        name: {"cpu_s": statistics.median(taken) - bare, "modules": modules[name]}
        for name, taken in times.items()
        if name != BARE
    }


def _started(name: str) -> int:
    """Start a process and return how many modules it has imported."""
    command = [sys.executable, "-c", f"{STARTS[name]}\n{LAST_LINE}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])
