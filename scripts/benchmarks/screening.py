"""Screening measured: throughput, engines, memory, bad structures, kills and copies.

``benchmark.py screening --quick`` prints one table and writes results/screening_cpu.json;
``--only`` takes one measurement anew. --quick takes fewer structures where the full measurement
takes long; the table says how many. Times are CPU seconds of one thread, taken in turns where two
things are compared. The engines are compared by the clock too, which means something on an idle
machine of two cores only.
"""

import argparse
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import psutil
import torch
from ase import Atoms
from ase.build import bulk
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from analytic_potentials import Gas, Pairs, of

from atomeq.dynamics.run import relax
from atomeq.potential.checkpoint import load_potential
from atomeq.screening import run as run_module
from atomeq.screening.results import read_rows
from atomeq.screening.run import screen
from atomeq.screening.sources import Found
from benchmarks.judged import Judged, table_of
from benchmarks.record import RESULTS, cpu_seconds_so_far, in_own_process, machine, read, write

FILE = RESULTS / "screening_cpu.json"
RELAX: dict[str, Any] = {"fmax": 0.05, "max_steps": 60}
SAME_ENERGY = 1e-6  # eV; extxyz keeps 1e-8 Å
BAD = ("not_finite", "overlap", "unknown_element", "unreadable", "unreadable")


def crystals(n: int) -> Iterator[Atoms]:
    """Yield copper cells of eight atoms, no two the same."""
    for k in range(n):
        atoms = bulk("Cu", cubic=True, a=3.6 + 0.0001 * (k % 1000)).repeat((2, 1, 1))
        atoms.rattle(0.08, seed=k)
        yield atoms


def found(n: int, structures: Iterable[Atoms] = ()) -> Iterator[Found]:
    """Yield structures, by default so many crystals, as a source does."""
    return (Found(f"s#{k}", atoms) for k, atoms in enumerate(structures or crystals(n)))


def throughput(quick: bool) -> dict[str, Any]:
    """CPU seconds of bare relaxation over those of the whole pipeline on the same structures."""
    n, rounds = (40, 5) if quick else (400, 5)
    potential = load_potential("cu-pbe")
    structures = list(crystals(n))
    steps = ["validate", "dedupe", {"relax": RELAX}, "properties", "rank"]
    ratios = []
    for _ in range(rounds):
        started = time.process_time()
        n_done = sum(1 for _ in relax(structures, potential, **RELAX))
        bare = time.process_time() - started
        with tempfile.TemporaryDirectory() as folder:
            started = time.process_time()
            summary = screen(found(n, structures), potential, out=folder, steps=steps)
            ratios.append(bare / (time.process_time() - started))
        assert sum(summary.counts.values()) == n_done == n
    return {"structures": n, "rounds": ratios, "pipeline_over_bare": float(np.median(ratios))}


def engines(quick: bool) -> dict[str, Any]:
    """Two workers of each engine, from the first structure taken to the last row."""
    n, rounds = (384, 2) if quick else (768, 3)
    taken: dict[str, list[dict[str, float]]] = {"processes": [], "ray": []}
    for _ in range(rounds):
        for engine, times in taken.items():
            times.append(_engine(engine, n))
    ratios = {
        name: [
            processes[name] / ray[name]
            for processes, ray in zip(taken["processes"], taken["ray"], strict=True)
        ]
        for name in ("seconds", "cpu_seconds")
    }
    medians = {f"ray_over_processes_{name}": float(np.median(r)) for name, r in ratios.items()}
    return {"structures": n, "workers": 2, **taken, **medians}


def _engine(engine: Any, n: int) -> dict[str, float]:
    """Return seconds and CPU seconds of this process and all that it has started."""
    begun: list[tuple[float, float]] = []

    def stream() -> Iterator[Found]:
        begun.append((time.perf_counter(), _cpu_of_all()))  # engines ask when workers are ready
        yield from found(n)

    ended = (0.0, 0.0)

    def observe(seen: Any, row: Any) -> None:
        nonlocal ended
        if seen.rows == n and row is not None:
            ended = (time.perf_counter(), _cpu_of_all())

    with tempfile.TemporaryDirectory() as folder:
        steps = ["validate", {"relax": RELAX}]
        screen(
            stream(), "cu-pbe", out=folder, steps=steps, engine=engine, workers=2, observe=observe
        )
    return {"seconds": ended[0] - begun[0][0], "cpu_seconds": ended[1] - begun[0][1]}


def _cpu_of_all() -> float:
    """Return CPU seconds of this process and of its children and theirs."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def memory(quick: bool) -> dict[str, Any]:
    """Largest resident memory with a null potential, one process for each number of structures."""
    numbers = (1000, 10_000) if quick else (1000, 100_000)
    peaks = [float(_child("memory", str(n))) for n in numbers]
    return {"structures": numbers, "peak_MB": peaks, "growth": peaks[1] / peaks[0] - 1}


def _memory_of(n: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        steps = ["validate", "dedupe", "single_point", "properties", "rank"]
        screen(found(int(n)), of(Gas(cutoff=4.0)), out=folder, steps=steps)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def bad(quick: bool) -> dict[str, Any]:
    """One bad structure in fifty: all have a row with the right reason, good ones their energy."""
    del quick
    n = 2000
    potential = of(Pairs())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "in")
        reasons = _spoil(folder, n)
        screen(folder, potential, out=Path(name, "out"), steps=["validate", "single_point"])
        rows = list(read_rows(Path(name, "out"), ["locator", "status", "kind", "energy"]))
    numbers = {int(Path(row["locator"].split("#")[0]).stem): row for row in rows}
    good = [k for k in range(n) if k not in reasons]
    structures = [atoms for k, atoms in enumerate(crystals(n)) if k not in reasons]
    energies = {
        good[outcome.index]: outcome.energy for outcome in relax(structures, potential, max_steps=0)
    }
    wrong = [
        k
        for k in good
        if numbers[k]["status"] != "done" or abs(numbers[k]["energy"] - energies[k]) > SAME_ENERGY
    ]
    misjudged = [k for k, kind in reasons.items() if numbers[k]["kind"] != kind]
    return {
        "structures": n,
        "bad": len(reasons),
        "accounted": len(numbers) if len(rows) == len(numbers) else -1,
        "good_wrong": len(wrong),
        "bad_misjudged": len(misjudged),
    }


def _spoil(folder: Path, n: int) -> dict[int, str]:
    """Write n files, one in fifty bad in one of five ways, and return how those must be told."""
    folder.mkdir()
    reasons: dict[int, str] = {}
    for k, atoms in enumerate(crystals(n)):
        path = folder / f"{k:05d}.extxyz"
        if k % 50:
            ase.io.write(path, atoms)
            continue
        way = k // 50 % 5
        reasons[k] = BAD[way]
        if way == 0:
            atoms.positions[0, 0] = np.nan
        if way == 1:
            atoms.positions[1] = atoms.positions[0]
        if way == 2:
            atoms.numbers[0] = 0
        if way < 3:
            ase.io.write(path, atoms)
            continue
        path = path.with_suffix(".cif")
        ase.io.write(path, atoms)
        text = path.read_text()
        path.write_text("" if way == 3 else text[: len(text) // 3])
    return reasons


def kills(quick: bool) -> dict[str, Any]:
    """Ten SIGKILLs at random moments, then a run to the end: every row once."""
    n, n_kills = (500 if quick else 2000), 10
    with tempfile.TemporaryDirectory() as folder:
        after = json.loads(_child("kills", folder, str(n), str(n_kills)))
        rows = [row["locator"] for row in read_rows(Path(folder), ["locator"])]
    return {
        "structures": n,
        "kills": n_kills,
        "rows_after_each": after,
        "missing": n - len(set(rows)),
        "twice": len(rows) - len(set(rows)),
    }


def _kills(folder: str, n: str, n_kills: str) -> None:
    """Fork a screening and kill it, again and again; it is killed over a random row, or after."""
    run_module.Results = partial(run_module.Results, rows_per_part=7)
    draw = random.Random(0)
    after = []
    for _ in range(int(n_kills)):
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            _victim(folder, n, theirs)
            os._exit(0)
        os.close(theirs)
        for _ in range(draw.randint(1, int(n) // int(n_kills))):
            os.read(ours, 1)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ours)
        after.append(sum(1 for _ in read_rows(Path(folder), ["hash"])))
    _victim(folder, n, os.open(os.devnull, os.O_WRONLY))
    print(json.dumps(after, separators=(",", ":")))


def _victim(folder: str, n: str, pipe: int) -> None:
    steps = ["validate", "dedupe", "single_point"]
    tell: Callable[..., Any] = lambda *_: os.write(pipe, b".")  # noqa: E731
    screen(found(int(n)), of(Pairs()), out=folder, steps=steps, max_edges=2000, observe=tell)


def dedupe(quick: bool) -> dict[str, Any]:
    """Copies rattled by 1e-3 Å, supercells and permutations: time, precision and recall."""
    n = 3000 if quick else 10_000
    rng = np.random.default_rng(0)
    originals = list(_different(int(0.7 * n), rng))
    stream = [Found(f"o#{k}", atoms) for k, atoms in enumerate(originals)]
    for k in range(n - len(originals)):
        source = int(rng.integers(len(originals)))
        stream.append(Found(f"c{source}#{k}", _disguise(originals[source], k, rng)))
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        screen(iter(stream), of(Gas()), out=folder, steps=["validate", {"dedupe": "structure"}])
        seconds = time.process_time() - started
        rows = list(read_rows(Path(folder), ["hash", "locator", "status", "duplicate_of"]))
    names = {row["hash"]: row["locator"] for row in rows}
    called = [row for row in rows if row["status"] == "duplicate"]
    right = sum(
        row["locator"].split("#")[0] == "c" + names[row["duplicate_of"]].split("#")[1]
        for row in called
    )
    return {
        "structures": n,
        "cpu_seconds": seconds,
        "precision": right / max(1, len(called)),
        "recall": right / (n - len(originals)),
    }


def _different(n: int, rng: np.random.Generator) -> Iterator[Atoms]:
    """Yield binary crystals, every fourth nearly the one before it, and yet another structure."""
    kinds = ("rocksalt", "zincblende", "cesiumchloride")
    last = Atoms()
    for k in range(n):
        if k % 4 == 3:
            yield _sibling(last, k)
            continue
        pair = ("NaCl", "MgO", "LiF", "KBr", "CaO")[k % 5]
        atoms = bulk(pair, kinds[k % 3], a=rng.uniform(3.6, 6.6), cubic=True)
        if len(atoms) == 2:  # so few coordinates that some would be the same by chance
            atoms = atoms.repeat((2, 2, 1))
        atoms.rattle(0.1, rng=np.random.RandomState(k))
        last = atoms
        yield atoms


def _sibling(atoms: Atoms, k: int) -> Atoms:
    """Return a structure with one atom moved, a strained cell, or two atoms exchanged."""
    other = atoms.copy()
    way = k // 4 % 3
    if way == 0:
        other.positions[0] += [0.2, 0, 0]
    if way == 1:
        other.set_cell(other.cell.array * 1.015, scale_atoms=True)
    if way == 2:
        different = int(np.flatnonzero(other.numbers != other.numbers[0])[0])
        other.numbers[[0, different]] = other.numbers[[different, 0]]
    return other


def _disguise(atoms: Atoms, k: int, rng: np.random.Generator) -> Atoms:
    copy = atoms.repeat((2, 1, 1)) if k % 3 == 0 else atoms.copy()
    copy.rattle(1e-3, rng=np.random.RandomState(k))
    return copy[rng.permutation(len(copy)).tolist()] if k % 3 == 1 else copy


MEASUREMENTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "throughput": throughput,
    "engines": engines,
    "memory": memory,
    "bad": bad,
    "kills": kills,
    "dedupe": dedupe,
}
_CHILDREN: dict[str, Callable[..., None]] = {"memory": _memory_of, "kills": _kills}


def _child(function: str, *words: str) -> str:
    """Run a function of this file in a process of its own, and return the last it prints."""
    return in_own_process("screening", "--child", function, *words).split()[-1]


def bars(results: dict[str, Any]) -> Iterator[Judged]:
    """Judge what was measured."""
    if row := results.get("throughput"):
        what = f"pipeline / bare, {row['structures']}"
        yield Judged.at_least(what, row["pipeline_over_bare"], 0.9, "x")
    if row := results.get("engines"):
        for name, text in (("seconds", "clock"), ("cpu_seconds", "CPU")):
            what = f"Ray / processes by {text}, {row['structures']}"
            yield Judged.at_least(what, row[f"ray_over_processes_{name}"], 0.85, "x")
    if row := results.get("memory"):
        few, many = row["structures"]
        value = " -> ".join(f"{peak:.0f}" for peak in row["peak_MB"]) + " MB"
        yield Judged(f"peak memory, {few} -> {many}", value, "+ 5 %", row["growth"] <= 0.05)
    if row := results.get("bad"):
        n, accounted = row["structures"], row["accounted"]
        yield Judged(f"accounted for, {row['bad']} bad", str(accounted), str(n), accounted == n)
        wrong = row["good_wrong"] + row["bad_misjudged"]
        yield Judged.at_most("of them good ones wrong, bad ones misjudged", wrong, 0)
    if row := results.get("kills"):
        what = f"missing or twice after {row['kills']} kills, {row['structures']}"
        yield Judged.at_most(what, row["missing"] + row["twice"], 0)
    if row := results.get("dedupe"):
        n = row["structures"]
        yield Judged.at_most(f"dedupe, {n}", row["cpu_seconds"], 180 * n / 10_000, "s")
        for name in ("precision", "recall"):
            yield Judged.at_least(f"dedupe, {name}", row[name], 0.99)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer structures")
    parser.add_argument("--only", choices=MEASUREMENTS, default=None, help="one measurement")
    parser.add_argument("--child", nargs="+", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.child:
        _CHILDREN[options.child[0]](*options.child[1:])
        return 0
    results = read(FILE)
    for name in MEASUREMENTS if options.only is None else (options.only,):
        started, cpu = time.perf_counter(), cpu_seconds_so_far()
        measured = MEASUREMENTS[name](options.quick)
        took = {
            "took_s": time.perf_counter() - started,
            "took_cpu_s": cpu_seconds_so_far() - cpu,
        }
        results[name] = {**measured, **took, "quick": options.quick, "machine": machine()}
        write(FILE, results)
        print(f"{name}: {took['took_s']:.0f} s", file=sys.stderr, flush=True)
    Console(width=100).print(table_of("screening, one thread", bars(results)))
    took = [sum(row[key] for row in results.values()) for key in ("took_s", "took_cpu_s")]
    Console().print(f"{took[0]:.0f} s, of them {took[1]:.0f} s of CPU")
    return 0
