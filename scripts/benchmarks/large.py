"""What many atoms cost: their graph beside vesin, memory of energy and forces, a second core.

``benchmark.py large [--quick]`` prints one table, all with cu-pbe on copper; ``--only`` takes one
part of it. Graphs and torch-sim take CPU seconds of one thread in turns; memory is the growth of
the peak of a warm process of its own; two threads are compared with one by the clock, on an idle
machine of two cores. torch-sim takes part where it is installed (pip install 'atomeq[torchsim]').
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from rich.console import Console

from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.integrators import VelocityVerlet
from atomeq.dynamics.run import relax
from atomeq.dynamics.state import prepare
from atomeq.graph.builders import RadiusGraph
from atomeq.potential.checkpoint import load_potential
from benchmarks.judged import Judged, table_of
from benchmarks.record import in_own_process

FMAX, MAX_STEPS = 0.05, 200
CUTOFF = 5.0  # Å, of many potentials
Row = dict[str, Any]


def copper(*repeat: int) -> Atoms:
    """Return a supercell of cubic cells, rattled."""
    atoms = bulk("Cu", cubic=True).repeat(repeat)
    atoms.rattle(0.05, seed=0)
    return atoms


def timed(call: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Return the seconds of a call."""
    started = clock()
    call()
    return clock() - started


def graph(quick: bool) -> Row:
    """Compare the AtomGraph of 4,000 atoms with vesin's own edges, in turns."""
    from vesin import NeighborList

    atoms, builder = copper(10, 10, 10), RadiusGraph(CUTOFF)

    def bare() -> object:
        search = NeighborList(cutoff=CUTOFF, full_list=True, n_threads=1)
        return search.compute(atoms.positions, atoms.cell.array, True, "ijS")

    bare()
    builder(atoms)
    turns = [(timed(lambda: builder(atoms)), timed(bare)) for _ in range(15 if quick else 41)]
    ratio = statistics.median(ours / theirs for ours, theirs in turns)
    return {"atoms": len(atoms), "ms": 1e3 * statistics.median(x for x, _ in turns), "ratio": ratio}


def memory(quick: bool) -> Row:
    """Measure the peak of energy and forces of 500, 4,000 and 20,000 atoms."""
    del quick  # it takes seconds
    sizes = ((5, 5, 5), (10, 10, 10), (17, 17, 17))
    rows = [json.loads(_child("peak", *map(str, size))) for size in sizes]
    x, y = (np.log([row[key] for row in rows]) for key in ("atoms", "bytes"))
    return {"rows": rows, "exponent": float(np.polyfit(x, y, 1)[0])}


def _peak(*repeat: str) -> None:
    """Print the growth of this process over what it has once everything is loaded and warm."""
    potential = load_potential("cu-pbe")
    potential(potential.build_graph(copper(2, 2, 2)))
    atoms = copper(*map(int, repeat))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins here
    potential(potential.build_graph(atoms))
    print(json.dumps({"atoms": len(atoms), "bytes": _status("VmHWM") - before}))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def threads(quick: bool) -> Row:
    """Compare MD of 500 and 2,048 atoms on one thread and on two, in turns."""
    n_turns, found = (1 if quick else 5), {}
    for repeat in (5, 8):
        turns = []
        for _ in range(n_turns):
            one, two = (
                json.loads(_child("steps", str(n), str(repeat), OMP_NUM_THREADS="2"))
                for n in (1, 2)
            )
            turns.append((one["seconds"] / two["seconds"], two["cpu"] / one["cpu"]))
        speedup, cost = (statistics.median(turn[k] for turn in turns) for k in (0, 1))
        found[str(4 * repeat**3)] = {"speedup": speedup, "cpu_of_two_over_one": cost}
    return found


def _steps(n_threads: str, repeat: str) -> None:
    """Print seconds and CPU seconds of ten steps, after three."""
    torch.set_num_threads(int(n_threads))
    evaluate, motion = Evaluator("cu-pbe"), VelocityVerlet(timestep=2.0, temperature=600.0)
    state = motion.init(prepare(copper(*[int(repeat)] * 3)), evaluate)
    for k in range(13):
        if k == 3:
            clock, cpu = time.perf_counter(), time.process_time()
        state = motion.step(state, evaluate)
    print(json.dumps({"seconds": time.perf_counter() - clock, "cpu": time.process_time() - cpu}))


def torchsim(quick: bool) -> Row:
    """Relax 32 cells with ``relax`` and with torch-sim's FIRE over our adapter, in turns."""
    if importlib.util.find_spec("torch_sim") is None:
        return {"lacks": "torch-sim, atomeq's extra torchsim"}
    import torch_sim

    from atomeq.calculators.torchsim import torchsim_model

    potential = load_potential("cu-pbe")
    model = torchsim_model(potential, compute_stress=False)
    structures = []
    for k in range(32):
        structures.append(bulk("Cu", cubic=True, a=3.6 + 0.002 * k).repeat((2, 1, 1)))
        structures[-1].rattle(0.08, seed=k)
    converged = torch_sim.generate_force_convergence_fn(force_tol=FMAX, include_cell_forces=False)

    def theirs() -> object:
        return torch_sim.optimize(
            structures, model, optimizer=torch_sim.Optimizer.fire, convergence_fn=converged,
            max_steps=MAX_STEPS, steps_between_swaps=1,
        )  # fmt: skip

    def ours() -> object:
        return list(relax(structures, potential, fmax=FMAX, max_steps=MAX_STEPS))

    theirs()
    ours()
    ratios = [timed(theirs) / timed(ours) for _ in range(3 if quick else 7)]
    return {"structures": len(structures), "ratio": statistics.median(ratios)}


MEASUREMENTS: dict[str, Callable[[bool], Row]] = {
    "graph": graph,
    "memory": memory,
    "threads": threads,
    "torchsim": torchsim,
}
_CHILDREN: dict[str, Callable[..., None]] = {"peak": _peak, "steps": _steps}


def _child(name: str, *words: str, **environment: str) -> str:
    return in_own_process("large", "--child", name, *words, **environment).splitlines()[-1]


def bars(results: dict[str, Row]) -> Iterator[Judged]:
    """Judge what was measured."""
    if row := results.get("graph"):
        what = f"AtomGraph of {row['atoms']} atoms / bare vesin"
        yield Judged.at_most(what, row["ratio"], 1.5, "x")
    if row := results.get("memory"):
        for one in row["rows"]:
            what = f"peak memory an atom, E+F of {one['atoms']}"
            yield Judged.at_most(what, one["bytes"] / one["atoms"] / 1e3, 60, "kB")
        yield Judged.at_most("memory ~ atoms to the power", row["exponent"], 1.03)
    for n_atoms, one in results.get("threads", {}).items():
        what = f"MD of {n_atoms} atoms, two idle cores / one"
        yield Judged.at_least(what, one["speedup"], 1.6, "x")
        yield Judged.at_most(f"{what}, CPU seconds", one["cpu_of_two_over_one"], 1.5, "x")
    if row := results.get("torchsim"):
        what = "relax of 32 cells, torch-sim with our adapter / ours"
        if "lacks" in row:
            yield Judged(what, f"needs {row['lacks']}", ">= 1.2 x")
        else:
            yield Judged.at_least(what, row["ratio"], 1.2, "x")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--only", choices=MEASUREMENTS, help="one measurement")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.child:
        _CHILDREN[options.child[0]](*options.child[1:])
        return 0
    names = MEASUREMENTS if options.only is None else (options.only,)
    results = {name: MEASUREMENTS[name](options.quick) for name in names}
    Console(width=None if sys.stdout.isatty() else 110).print(
        table_of(f"cu-pbe, {os.cpu_count()} cores here", bars(results))
    )
    return 0
