"""Measure what batched dynamics costs: throughput against ASE, overhead of a step, memory, scaling.

``benchmark.py dynamics --quick`` (about five minutes) prints one table and writes
results/dynamics_cpu.json; without ``--quick`` 256 molecules relax to 0.1 eV/Å, which
takes about a quarter of an hour. Times are CPU seconds of one thread, taken in turns where two
things are compared. Relaxations are also timed by the clock with as many threads as there are
cores for the batch; a molecule alone is too small for threads. That means something on an idle
machine only.

The molecules of the relaxation are random chains of H, C, N and O; their potential is a network
with random weights, computed in full and scaled down, on top of Morse wells between all pairs that
give every molecule a minimum: what is measured is cost, not chemistry. They compute in float32, as
they are used. Quick runs relax all 256 as well, to 2 eV/Å, some 45 steps instead of 145; the paths
are the same. One by one only every n-th molecule is relaxed, and the times are compared per step of
a molecule. How much faster the potential itself is in a full batch than alone stands in the table
beside what batching gave: dynamics cannot add much to it.

``--memory`` measures what keeping freed memory (atomeq/dynamics/memory.py) is worth.

``--crystals`` relaxes 64 rattled crystals of 4 to 40 atoms with sevennet-0, which has to be
installed: in batches by L-BFGS, and every n-th of them one by one by ASE's FIRE with the same
potential. The figure is CPU seconds of an atom's relaxation; it is the product of what a step costs
and of how many there are, which stand beside.
"""

import argparse
import itertools
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.data import covalent_radii
from ase.optimize import FIRE as ASE_FIRE
from rich.console import Console
from torch import Tensor

from atomeq import AtomeqCalculator, Potential, load_potential, relax
from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.integrators import VelocityVerlet
from atomeq.dynamics.optimizers import FIRE
from atomeq.dynamics.state import prepare
from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import AtomisticModel
from atomeq.models.egnn import EGNN
from atomeq.models.escn import ESCN
from atomeq.ops.segment.operations import segment_sum
from atomeq.typing import PropertyKey
from benchmarks.judged import Judged, table_of
from benchmarks.record import RESULTS, cpu_seconds_so_far, in_own_process, machine, write

_log = logging.getLogger("benchmarks.dynamics")
FILE = RESULTS / "dynamics_cpu.json"
CRYSTALS = RESULTS / "crystals_cpu.json"
FMAX, QUICK_FMAX = 0.1, 2.0  # eV/Å
MAX_STEPS = 1000
NETWORKS: dict[str, Callable[[], AtomisticModel]] = {
    # configs/model/egnn.yaml and configs/model/escn.yaml
    "EGNN": lambda: EGNN(cutoff=5.0, num_layers=4, hidden_channels=64),
    "eSCN": lambda: ESCN(
        cutoff=5.0, num_layers=1, sphere_channels=32, hidden_channels=32, edge_channels=32
    ),
}


class WithMorse(AtomisticModel):
    """A network beside Morse wells at the sum of the covalent radii."""

    def __init__(self, network: AtomisticModel) -> None:
        super().__init__()
        self.network, self.cutoff = network, network.cutoff
        self.register_buffer("radii", torch.tensor(covalent_radii[:100], dtype=torch.float64))

    def forward(self, graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        """Return the energies of both."""
        source, target = graph.edge_index
        lengths = torch.linalg.vector_norm(graph.edge_vectors(), dim=1)
        radii = self.radii[graph.atomic_numbers]
        decay = torch.exp(-2.0 * (lengths - radii[source] - radii[target]))
        inside = (1 - (lengths / self.cutoff) ** 2).clamp(min=0) ** 3
        wells = segment_sum((decay**2 - 2 * decay) * inside / 2, target, graph.n_atoms)
        return {"energies": wells + 0.02 * self.network(graph)["energies"].to(wells.dtype)}


def molecules(n: int) -> list[Atoms]:
    """Return self-avoiding random chains of 5 to 30 atoms."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(n):
        positions = [np.zeros(3)]
        size = int(random.integers(5, 31))
        while len(positions) < size:
            step = random.normal(size=3)
            new = positions[random.integers(len(positions))] + 1.5 * step / np.linalg.norm(step)
            if min(np.linalg.norm(new - old) for old in positions) > 1.2:
                positions.append(new)
        found.append(Atoms(random.choice([1, 6, 7, 8], size), positions))
    return found


def random_potential(make: Callable[[], AtomisticModel], dtype: torch.dtype) -> Potential:
    """Return a potential whose network has generic weights."""
    torch.manual_seed(0)
    network = make()
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return Potential(WithMorse(network)).to(dtype).requires_grad_(False).eval()


def relaxation(
    potential: Potential,
    structures: list[Atoms],
    *,
    fmax: float,
    every: int,
    n_threads: int = 1,
    n_turns: int = 8,
    optimizer: Literal["fire", "lbfgs"] = "fire",
) -> dict[str, Any]:
    """Relax molecules in flight, and every n-th of them one by one, in turns.

    With one thread CPU seconds are taken, with more of them those of the clock. One by one takes
    one thread always: with two it is slower.
    """
    clock = time.process_time if n_threads == 1 else time.perf_counter
    evaluate, calculator = Evaluator(potential), AtomeqCalculator(potential)
    flight = relax(structures, evaluate, optimizer=optimizer, fmax=fmax, max_steps=MAX_STEPS)
    # Of all sizes alike: every n-th of them in the order of their size.
    alone = sorted(range(len(structures)), key=lambda k: len(structures[k]))[every // 2 :: every]
    alone = np.random.default_rng(0).permutation(alone).tolist()
    share, per_turn = -(-len(alone) // n_turns), -(-len(structures) // n_turns)
    together = one_by_one = 0.0
    outcomes, energies, n_steps = {}, {}, 0
    for turn in range(n_turns):  # the machine changes while it lasts
        torch.set_num_threads(n_threads)
        started = clock()
        count = None if turn == n_turns - 1 else per_turn
        outcomes |= {outcome.index: outcome for outcome in itertools.islice(flight, count)}
        together += clock() - started
        torch.set_num_threads(1)
        started = clock()
        for k in alone[turn * share : (turn + 1) * share]:
            atoms = structures[k].copy()
            atoms.calc = calculator
            with ASE_FIRE(atoms, logfile=None) as run:
                run.run(fmax=fmax, steps=MAX_STEPS)
                n_steps += run.nsteps + 1  # and the start
            energies[k] = atoms.get_potential_energy()
        one_by_one += clock() - started
    n_batched = sum(outcome.n_steps + 1 for outcome in outcomes.values())
    differences = [
        abs(outcomes[k].energy - energy) for k, energy in energies.items() if outcomes[k].converged
    ]
    row: dict[str, Any] = {
        "threads": n_threads,
        "molecules": len(structures),
        "fmax": fmax,
        "converged": sum(outcome.converged for outcome in outcomes.values()),
        "one_by_one": len(alone),
        "batched_s": together,
        "batched_ms_per_step_of_a_molecule": 1e3 * together / n_batched,
        "ase_ms_per_step": 1e3 * one_by_one / n_steps,
        "speedup": (one_by_one / n_steps) / (together / n_batched),
        "batched_steps": n_batched / len(structures),
        "ase_steps": n_steps / len(alone),
        "speedup_of_relaxations": (one_by_one / sum(len(structures[k]) for k in alone))
        / (together / sum(map(len, structures))),
        "largest_energy_difference_eV": max(differences),
    }
    _log.info("%s", row)
    return row


def crystals(n: int) -> list[Atoms]:
    """Return rattled crystals of 4 to 40 atoms, of one element and of two."""
    random = np.random.default_rng(0)
    kinds: list[dict[str, Any]] = [
        {"name": "MgO", "crystalstructure": "rocksalt", "a": 4.21},
        {"name": "NaCl", "crystalstructure": "rocksalt", "a": 5.64},
        {"name": "GaAs", "crystalstructure": "zincblende", "a": 5.65},
        {"name": "ZnS", "crystalstructure": "zincblende", "a": 5.41},
        {"name": "CsCl", "crystalstructure": "cesiumchloride", "a": 4.12},
        {"name": "Si"}, {"name": "Cu"}, {"name": "Al"}, {"name": "W"},
    ]  # fmt: skip
    found = []
    for k in range(n):
        unit = bulk(**kinds[k % len(kinds)])
        n_cells = int(random.integers(4, 41)) // len(unit)
        atoms = unit.repeat((1, 2, max(n_cells // 2, 2 // len(unit))))
        atoms.rattle(0.1, seed=k)
        found.append(atoms)
    return found


def crystal_relaxation(*, quick: bool) -> dict[str, Any]:
    """Relax crystals in batches by L-BFGS and, in turns, every n-th alone by ASE's FIRE."""
    potential = load_potential("sevennet-0").to(torch.float32).requires_grad_(False)
    structures = crystals(64)
    every, fmax = (8, 0.05) if quick else (4, 0.02)
    potential(potential.build_graph(structures[0]))
    return relaxation(potential, structures, fmax=fmax, every=every, n_turns=4, optimizer="lbfgs")


def bound(potential: Potential, structures: list[Atoms], n_rounds: int = 3) -> float:
    """Return by how much the potential alone, without any dynamics, is faster in a full batch."""
    singles = [potential.build_graph(atoms) for atoms in structures]
    batch = potential.build_graph(structures)
    alone, together = [], []
    for _ in range(n_rounds):
        started = time.process_time()
        for graph in singles:
            potential(graph)
        alone.append(time.process_time() - started)
        started = time.process_time()
        potential(batch)
        together.append(time.process_time() - started)
    return min(alone) / min(together)


def relaxations(*, quick: bool) -> dict[str, dict[str, Any]]:
    """Measure each network on 256 molecules."""
    rows = {}
    for name, make in NETWORKS.items():
        structures, potential = molecules(256), random_potential(make, torch.float32)
        fmax, every = (QUICK_FMAX, 16) if quick else (FMAX, 4)
        row = relaxation(potential, structures, fmax=fmax, every=every)
        row["ratio_of_the_potential_alone"] = bound(potential, structures[:32])
        if not quick and (n_threads := os.cpu_count() or 1) > 1:
            row["all_cores"] = relaxation(
                potential, structures, fmax=QUICK_FMAX, every=16, n_threads=n_threads
            )
        rows[name] = row
    return rows


def stepping(name: str, n_steps: int = 40) -> dict[str, float]:
    """Measure steps of a full batch, and their page faults, in this process."""
    evaluate = Evaluator(random_potential(NETWORKS[name], torch.float32))
    motion, state = FIRE(), None
    used, n_moved = [], 0
    state = motion.init(prepare(molecules(45)), evaluate)
    for step in range(n_steps + 5):
        if step >= 5:
            n_moved += state.graph.n_graphs
        if step == 5:
            used.append(resource.getrusage(resource.RUSAGE_SELF))
        state = motion.step(state, evaluate)
    used.append(resource.getrusage(resource.RUSAGE_SELF))
    user, system, faults = (
        getattr(used[1], key) - getattr(used[0], key)
        for key in ("ru_utime", "ru_stime", "ru_minflt")
    )
    return {"ms": 1e3 * (user + system) / n_moved, "faults_per_step": faults / n_steps}


def memory(n_turns: int = 3) -> dict[str, object]:
    """Compare steps with freed memory kept and, in turns, given back as glibc does by itself."""
    default = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}  # its own; so atomeq sets nothing
    rows: dict[str, object] = {}
    for name in NETWORKS:
        kept, given_back = [], []
        for _ in range(n_turns):
            for found, more in ((kept, {}), (given_back, default)):
                printed = in_own_process("dynamics", "--stepping", name, **more)
                found.append(json.loads(printed))
        ratios = [b["ms"] / a["ms"] for a, b in zip(kept, given_back, strict=True)]
        rows[name] = {"kept": kept, "given_back": given_back, "ratios": ratios}
        _log.info("%s: %s", name, rows[name])
    return rows


def overhead(n_steps: int) -> dict[str, Any]:
    """Measure what a step of 500 Cu atoms spends outside of the potential."""
    potential = load_potential("cu-pbe")
    spent = 0.0
    forward = potential.forward

    def timed(*args, **kwargs):
        nonlocal spent
        started = time.process_time()
        results = forward(*args, **kwargs)
        spent += time.process_time() - started
        return results

    potential.forward = timed
    evaluate, motion = Evaluator(potential), VelocityVerlet(timestep=2.0, temperature=600.0)
    state = motion.init(prepare(bulk("Cu", cubic=True).repeat(5)), evaluate)
    spent, started = 0.0, time.process_time()
    for _ in range(n_steps):
        state = motion.step(state, evaluate)
    total = time.process_time() - started
    row = {
        "atoms": 500,
        "steps": n_steps,
        "ms_per_step": 1e3 * total / n_steps,
        "overhead_of_step": (total - spent) / total,
        "overhead_of_potential": (total - spent) / spent,
    }
    _log.info("%s", row)
    return row


def scaling(sizes: tuple[tuple[int, int, int], ...], n_steps: int) -> dict[str, object]:
    """Measure time and memory of MD from 500 to 10,000 Cu atoms, the small ones first."""
    rows = []
    for repeat in sizes:
        evaluate = Evaluator("cu-pbe")
        motion = VelocityVerlet(timestep=2.0, temperature=600.0)
        state = motion.init(prepare(bulk("Cu", cubic=True).repeat(repeat)), evaluate)
        times = []
        for _ in range(n_steps):
            started = time.process_time()
            state = motion.step(state, evaluate)
            times.append(time.process_time() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows.append({"atoms": state.graph.n_atoms, "s_per_step": min(times), "peak_GB": peak / 1e9})
        _log.info("%s", rows[-1])
    x, y = (np.log([row[key] for row in rows]) for key in ("atoms", "s_per_step"))
    return {"rows": rows, "exponent": float(np.polyfit(x, y, 1)[0])}


def scaling_in_subprocess(*, quick: bool) -> dict[str, Any]:
    """Run :func:`scaling` in a fresh process, whose peak of memory is its own."""
    words = ["--quick"] if quick else []
    return json.loads(in_own_process("dynamics", "--scaling", *words))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--memory", action="store_true", help="only what keeping memory is worth")
    parser.add_argument("--crystals", action="store_true", help="only crystals with sevennet-0")
    parser.add_argument("--scaling", action="store_true", help="scaling alone, as JSON")
    parser.add_argument("--stepping", choices=NETWORKS, help="steps of a batch alone, as JSON")
    options = parser.parse_args(argv)
    logging.basicConfig()
    _log.setLevel(logging.INFO)
    torch.set_num_threads(1)
    if options.scaling:
        # The small ones first: the peak of a process never falls.
        sizes = ((5, 5, 5), (9, 9, 9), (13, 13, 15))
        sys.stdout.write(json.dumps(scaling(sizes, 2 if options.quick else 4)))
        return 0
    if options.stepping:
        sys.stdout.write(json.dumps(stepping(options.stepping)))
        return 0
    if options.memory:
        Console().print(memory())
        return 0
    if options.crystals:
        results = {"quick": options.quick, "machine": machine()}
        results["crystals"] = crystal_relaxation(quick=options.quick)
        write(CRYSTALS, results)
        Console().print(table_of("dynamics, one CPU thread", bars(results)))
        return 0
    started = cpu_seconds_so_far()
    results: dict[str, Any] = {"quick": options.quick, "machine": machine()}
    results |= {name: measure(options.quick) for name, measure in MEASUREMENTS.items()}
    results["cpu_s"] = cpu_seconds_so_far() - started
    write(FILE, results)
    Console().print(table_of("dynamics, one CPU thread where not said", bars(results)))
    return 0


MEASUREMENTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "relaxation": lambda quick: relaxations(quick=quick),
    "overhead": lambda quick: overhead(10 if quick else 30),
    "scaling": lambda quick: scaling_in_subprocess(quick=quick),
}


def bars(results: dict[str, Any]) -> Iterator[Judged]:
    """Judge what was measured."""
    for name, row in results.get("relaxation", {}).items():
        n, alone = row["molecules"], row["ratio_of_the_potential_alone"]
        yield Judged.at_least(f"{name}: {n} batched / ASE FIRE", row["speedup"], 4.0, "x")
        yield Judged(f"{name}: of the potential alone", f"{alone:.2f} x")
        if "all_cores" in row:
            cores = row["all_cores"]
            what = f"{name}: by the clock, {cores['threads']} threads"
            yield Judged(what, f"{cores['speedup']:.2f} x")
        what = f"{name}: to {row['fmax']} eV/Å"
        yield Judged(what, f"{row['converged']} of {n} converged", "all", row["converged"] == n)
        difference = row["largest_energy_difference_eV"]
        yield Judged.at_most(f"{name}: energies differ", difference, 1e-6, "eV")
    if row := results.get("crystals"):
        what = f"sevennet-0: {row['molecules']} crystals batched / ASE FIRE"
        yield Judged.at_least(what, row["speedup_of_relaxations"], 5.0, "x")
        steps = f"{row['ase_steps']:.0f} / {row['batched_steps']:.0f}"
        yield Judged("sevennet-0: steps of FIRE / of L-BFGS", steps)
        yield Judged("sevennet-0: cost of a step", f"{row['speedup']:.2f} x")
        yield Judged("sevennet-0: converged", str(row["converged"]), str(row["molecules"]),
                     row["converged"] == row["molecules"])  # fmt: skip
    if row := results.get("overhead"):
        share = 100 * row["overhead_of_step"]
        yield Judged.at_most("MD overhead, 500 atoms, of a step", share, 10.0, "%")
    if row := results.get("scaling"):
        largest = row["rows"][-1]
        what = f"peak memory, {largest['atoms']} atoms"
        yield Judged.at_most(what, largest["peak_GB"], 8.0, "GB")
        yield Judged("time ~ atoms to the power", f"{row['exponent']:.3f}")
