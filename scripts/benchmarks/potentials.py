"""CPU seconds of installed universal potentials, paired with the code that published them.

``benchmark.py potentials --peer-python PEER/bin/python`` times energy, forces and stress with the
neighbour list, in float32 on one thread, of ``sevennet-0`` and ``sevennet-l3i5`` in silicon of 8 to
216 atoms. Each runs in a process of its own, pinned to the same core, and they take turns, so that
whatever slows the machine slows both; a ratio is the median over rounds of the paired times, with
its quartiles. The exit code is 1 where the results differ or a bar is missed. Further rows: labels
of cells of 2 to 12 atoms in batches, and from ``potentials install`` to the first forces.

The wheel of sevenn 0.13.0 is read by ``--wheel``, or the potentials are those installed already.
The peer's Python needs what atomeq needs and, no more, sevenn:

    python3 -m venv PEER
    echo "$PWD/.venv/lib/python3.11/site-packages" > PEER/lib/python3.11/site-packages/host.pth
    PEER/bin/pip install --no-deps sevenn==0.13.0 matscipy==1.3.1 braceexpand==0.1.7 ninja==1.13.2
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from rich.console import Console
from rich.table import Table

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.potential.catalogue import install_potential
from benchmarks.peers.process import PeerProcess
from benchmarks.record import RESULTS, machine, write

PEER_NAMES = {"sevennet-0": "7net-0", "sevennet-l3i5": "7net-l3i5"}
BARS = {
    ("sevennet-0", 8): 4.0,
    ("sevennet-0", 32): 6.0,
    ("sevennet-0", 64): 6.0,
    ("sevennet-0", 216): 6.0,
    ("sevennet-l3i5", 32): 7.0,
    ("sevennet-l3i5", 216): 7.0,
}
REPEATS = {8: (1, 1, 1), 32: (2, 2, 1), 64: (2, 2, 2), 216: (3, 3, 3)}  # of 8 atoms
LABELS_AN_HOUR = 200_000
INSTALL_S = 60.0
SAME_EV_PER_ATOM, SAME_EV_PER_A = 5e-6, 2e-4  # of two float32 networks and sums
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; return the exit code."""
    options = _parser().parse_args(argv)
    if options.peer_python is None:
        print("no --peer-python: nothing is compared with SevenNet's own code", file=sys.stderr)
    if hasattr(os, "sched_setaffinity"):  # children inherit it
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    document: Row = {"machine": machine(), "rounds": options.rounds, "pairs": [], "missed": []}
    if options.wheel:
        document["install"] = install(options.wheel)
        os.environ["ATOMEQ_POTENTIALS"] = document["install"].pop("folder")
    for name, n_atoms in BARS:
        if options.atoms and n_atoms not in options.atoms:
            continue
        document["pairs"].append(pair(name, n_atoms, options))
    document["labels"] = labels("sevennet-0", options.n_labels)
    document["missed"] = missed(document)
    write(options.out, document)
    show(document)
    return 1 if document["missed"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", metavar="PATH", help="a Python that has sevenn")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="of sevenn 0.13.0")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--atoms", type=int, nargs="*", help="only these sizes")
    parser.add_argument("--n-labels", type=int, default=400, help="cells to label")
    parser.add_argument("--out", type=Path, default=RESULTS / "potentials_cpu.json", metavar="FILE")
    return parser


def install(wheel: Path) -> Row:
    """Install potentials from a wheel in a fresh folder; time one up to its first forces."""
    folder = tempfile.mkdtemp(prefix="potentials-")
    os.environ["ATOMEQ_POTENTIALS"] = folder
    code = (
        "from ase.build import bulk; from atomeq.cli import main;"
        f"main(['potentials', 'install', 'sevennet-0', '--from', {str(wheel)!r}]);"
        "from atomeq.calculators.ase import AtomeqCalculator;"
        "atoms = bulk('Si'); atoms.calc = AtomeqCalculator('sevennet-0'); atoms.get_forces()"
    )
    start, before = time.monotonic(), os.times()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    after, wall = os.times(), time.monotonic() - start
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    install_potential("sevennet-l3i5", file=wheel)
    return {"wall_s": wall, "cpu_s": cpu, "folder": folder}


def silicon(n_atoms: int) -> Atoms:
    """Return diamond silicon of so many atoms, rattled."""
    atoms = bulk("Si", cubic=True).repeat(REPEATS[n_atoms])
    atoms.rattle(0.05, seed=0)
    return atoms


def pair(name: str, n_atoms: int, options: argparse.Namespace) -> Row:
    """Time a potential and its peer in turn on one structure, and compare what they give."""
    atoms = silicon(n_atoms)
    calculator = AtomeqCalculator(name, dtype="float32")
    row: Row = {"potential": name, "atoms": n_atoms}

    def ours() -> float:
        start = time.process_time()
        calculator.calculate(atoms, ("energy", "forces", "stress"), ("positions",))
        return time.process_time() - start

    with ExitStack() as stack:
        theirs = None
        if options.peer_python:
            ask = stack.enter_context(PeerProcess(options.peer_python, "sevennet")).ask
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            path = Path(folder) / "structure.json"
            atoms.write(path)
            row["peer"] = ask("take", checkpoint=PEER_NAMES[name], structure=str(path))
            theirs = lambda: ask("compute")["cpu_s"]  # noqa: E731
            for _ in range(3):  # TorchScript optimises in its first calls
                theirs()
        ours(), ours()
        found, peers = [], []
        for _ in range(options.rounds):
            found.append(statistics.median(ours() for _ in range(3 if n_atoms < 64 else 1)))
            if theirs:
                peers.append(theirs())
        row["cpu_s"] = statistics.median(found)
        if theirs:
            expected = ask("compute")
            row |= differences(calculator.results, expected, n_atoms)
            row["peer_cpu_s"] = statistics.median(peers)
            ratios = [theirs / ours for theirs, ours in zip(peers, found, strict=True)]
            row["ratio"] = statistics.median(ratios)
            row["ratio_quartiles"] = statistics.quantiles(ratios, n=4)[::2]
    return row


def differences(found: Row, expected: Row, n_atoms: int) -> Row:
    """Return by how much results differ, eV per atom, eV/Å and eV/Å³."""
    stress = np.abs(np.subtract(found["stress"], expected["stress"]))
    return {
        "energy_difference": abs(found["energy"] - expected["energy"]) / n_atoms,
        "force_difference": float(np.abs(found["forces"] - expected["forces"]).max()),
        "stress_difference": float(stress.max()),
    }


def labels(name: str, n: int) -> Row:
    """Time energies, forces and stresses of cells of 2 to 12 atoms, in batches."""
    generator = np.random.default_rng(0)
    crystals = [("MgO", "rocksalt", 4.21), ("NaCl", "rocksalt", 5.64), ("ZnS", "zincblende", 5.41)]
    crystals += [("CsCl", "cesiumchloride", 4.12), ("GaAs", "zincblende", 5.65)]
    structures = []
    for k in range(n):
        kind, lattice, a = crystals[k % len(crystals)]
        n_cells = int(generator.integers(1, 7))
        atoms = bulk(kind, lattice, a=a).repeat((1, 1, n_cells))
        atoms.rattle(0.05, seed=k)
        structures.append(atoms)
    calculator = AtomeqCalculator(name, dtype="float32")
    wanted = ("energy", "forces", "stress")
    calculator.evaluate(structures[:20], wanted)
    start = time.process_time()
    calculator.evaluate(structures, wanted)
    seconds = time.process_time() - start
    n_atoms = statistics.mean(map(len, structures))
    return {"cells": n, "mean_atoms": n_atoms, "cpu_s": seconds, "an_hour": n / seconds * 3600}


def missed(document: Row) -> list[str]:
    """Return the bars that are not met, and the results that differ."""
    found = []
    for row in document["pairs"]:
        where = f"{row['potential']} at {row['atoms']} atoms"
        bar = BARS[row["potential"], row["atoms"]]
        if row.get("ratio", bar) < bar:
            found.append(f"{where}: {row['ratio']:.2f}x, not {bar:g}x")
        if row.get("energy_difference", 0.0) > SAME_EV_PER_ATOM:
            found.append(f"{where}: energies differ by {row['energy_difference']:.1e} eV/atom")
        if row.get("force_difference", 0.0) > SAME_EV_PER_A:
            found.append(f"{where}: forces differ by {row['force_difference']:.1e} eV/Å")
    if document["labels"]["an_hour"] < LABELS_AN_HOUR:
        found.append(f"labels: {document['labels']['an_hour']:,.0f} an hour, not 200,000")
    if document.get("install", {}).get("wall_s", 0.0) > INSTALL_S:
        found.append(f"install to forces: {document['install']['wall_s']:.0f} s, not 60")
    return found


def show(document: Row) -> None:
    """Print a table of the pairs and what else was measured."""
    table = Table("potential", "atoms", "CPU s", "sevenn", "ratio", "bar", "dF (eV/Å)")
    for row in document["pairs"]:
        low, high = row.get("ratio_quartiles", (float("nan"),) * 2)
        table.add_row(
            *(row["potential"], str(row["atoms"]), f"{row['cpu_s']:.4f}"),
            f"{row.get('peer_cpu_s', float('nan')):.4f}",
            f"{row.get('ratio', float('nan')):.2f} ({low:.2f}..{high:.2f})",
            f"{BARS[row['potential'], row['atoms']]:g}",
            f"{row.get('force_difference', float('nan')):.1e}",
        )
    console = Console(width=100)
    console.print(table)
    found = document["labels"]
    console.print(
        f"{found['an_hour']:,.0f} labels an hour and core, of cells of "
        f"{found['mean_atoms']:.1f} atoms"
    )
    if "install" in document:
        console.print(f"install to first forces: {document['install']['wall_s']:.1f} s")
    for line in document["missed"]:
        console.print(f"missed: {line}")
