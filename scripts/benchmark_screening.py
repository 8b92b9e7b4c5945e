"""Screening measured: throughput against bare relaxation, memory, bad structures, kills, copies.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/benchmark_screening.py --quick

prints one table and one line of JSON. --quick takes small numbers of structures where the full
measurement takes long; each line says how many.
"""

import argparse
import json
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.build import bulk

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from analytic_potentials import Gas, of

from atomeq.dynamics.run import relax
from atomeq.potential.checkpoint import load_potential
from atomeq.screening.results import read_rows
from atomeq.screening.run import screen
from atomeq.screening.sources import Found

ROUNDS = 3
MEASUREMENTS = ("throughput", "memory", "bad", "kills", "dedupe")


def crystals(n: int, *, size: int = 2) -> Iterator[Atoms]:
    for k in range(n):
        atoms = bulk("Cu", cubic=True, a=3.6 + 0.0001 * (k % 1000)).repeat((size, 1, 1))
        atoms.rattle(0.08, seed=k)
        yield atoms


def throughput(quick: bool) -> dict[str, Any]:
    """CPU seconds of bare relaxation over those of the pipeline, interleaved rounds."""
    n = 40 if quick else 400
    potential = load_potential("cu-pbe")
    structures = list(crystals(n))
    options: dict[str, Any] = {"fmax": 0.05, "max_steps": 60}
    ratios = []
    for _ in range(ROUNDS):
        started = time.process_time()
        n_done = sum(1 for _ in relax(structures, potential, **options))
        bare = time.process_time() - started
        with tempfile.TemporaryDirectory() as folder:
            found = (Found(f"s#{k}", atoms) for k, atoms in enumerate(structures))
            steps = ["validate", "dedupe", {"relax": options}, "properties", "rank"]
            started = time.process_time()
            summary = screen(found, potential, out=folder, steps=steps)
            ratios.append(bare / (time.process_time() - started))
        assert sum(summary.counts.values()) == n_done == n
    return {"structures": n, "pipeline_over_bare": float(np.median(ratios)), "goal": ">= 0.9"}


def memory(quick: bool) -> dict[str, Any]:
    """Largest resident memory with a null potential, one process per number of structures."""
    numbers = (500, 5000) if quick else (1000, 100_000)
    peaks = [int(_child("_memory_of", str(n))) for n in numbers]
    return {"structures": numbers, "peak_MB": [peak / 1e6 for peak in peaks], "goal": "constant"}


def _memory_of(n: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = (Found(f"s#{k}", atoms) for k, atoms in enumerate(crystals(int(n))))
        screen(found, of(Gas()), out=folder, steps=["validate", "dedupe", "single_point"])
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def bad(quick: bool) -> dict[str, Any]:
    """Bad structures among good ones: all accounted for, the good ones right."""
    n = 500 if quick else 2000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "in")
        good, spoiled = _spoil(folder, n)
        summary = screen(
            folder, of(Gas()), out=Path(name, "out"), steps=["validate", "single_point"]
        )
        rows = list(read_rows(Path(name, "out"), ["locator", "status", "energy"]))
    right = {row["locator"] for row in rows if row["status"] == "done" and row["energy"] == 0}
    return {
        "structures": n,
        "accounted": len({row["locator"] for row in rows}),
        "bad": spoiled,
        "failed": summary.counts.get("failed", 0),
        "good_right": len(right),
        "good": good,
        "kinds": summary.kinds,
    }


def _spoil(folder: Path, n: int) -> tuple[int, int]:
    """Write n files, one in fifty bad in one of five ways."""
    folder.mkdir()
    n_bad = 0
    for k, atoms in enumerate(crystals(n)):
        path = folder / f"{k:05d}.cif"
        if k % 50:
            ase.io.write(path.with_suffix(".extxyz"), atoms)
            continue
        way, n_bad = n_bad % 5, n_bad + 1
        if way == 0:
            atoms.positions[0, 0] = np.nan
        if way == 1:
            atoms.positions[1] = atoms.positions[0]
        if way == 2:
            atoms.numbers[0] = 0
        if way < 3:
            ase.io.write(path.with_suffix(".extxyz"), atoms)
            continue
        ase.io.write(path, atoms)
        text = path.read_text()
        path.write_text("" if way == 3 else text[: len(text) // 3])
    return n - n_bad, n_bad


def kills(quick: bool) -> dict[str, Any]:
    """SIGKILLs at random moments, then a run to the end: every row once."""
    n, n_kills = (300, 3) if quick else (2000, 10)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(n_kills):
            process = _start("_victim", folder, str(n))
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0.2, 2.0))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        _child("_victim", folder, str(n))
        rows = [row["locator"] for row in read_rows(Path(folder), ["locator"])]
    return {
        "structures": n,
        "kills": n_kills,
        "missing": n - len(set(rows)),
        "twice": len(rows) - len(set(rows)),
    }


def _victim(folder: str, n: str) -> None:
    from atomeq.screening import results

    results._ROWS_PER_PART = 20
    print("begin", flush=True)

    def slowly() -> Iterator[Found]:
        for k, atoms in enumerate(crystals(int(n))):
            time.sleep(0.002)
            yield Found(f"s#{k}", atoms)

    screen(slowly(), of(Gas()), out=folder, steps=["validate", "dedupe", "single_point"])


def dedupe(quick: bool) -> dict[str, Any]:
    """Copies rattled by 1e-3 Å, supercells and permutations: time, precision and recall."""
    n = 600 if quick else 10_000
    rng = np.random.default_rng(0)
    originals = list(_different(int(0.7 * n), rng))
    found = [Found(f"o#{k}", atoms) for k, atoms in enumerate(originals)]
    for k in range(n - len(originals)):
        source = int(rng.integers(len(originals)))
        found.append(Found(f"c{source}#{k}", _disguise(originals[source], k, rng)))
    with tempfile.TemporaryDirectory() as folder:
        steps = [{"dedupe": {"match": "structure"}}]
        started = time.process_time()
        screen(iter(found), of(Gas()), out=folder, steps=steps)
        seconds = time.process_time() - started
        rows = list(read_rows(Path(folder), ["id", "locator", "status", "duplicate_of"]))
    names = {row["id"]: row["locator"] for row in rows}
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
        "goal": "10,000 in < 180 s, both >= 0.99",
    }


def _different(n: int, rng: np.random.Generator) -> Iterator[Atoms]:
    kinds = ("rocksalt", "zincblende", "cesiumchloride")
    for k in range(n):
        pair = ("NaCl", "MgO", "LiF", "KBr", "CaO")[k % 5]
        atoms = bulk(pair, kinds[k % 3], a=rng.uniform(3.6, 6.6), cubic=True)
        if len(atoms) == 2:  # so few coordinates that some would be the same by chance
            atoms = atoms.repeat((2, 2, 1))
        atoms.rattle(0.1, rng=np.random.RandomState(k))
        yield atoms


def _disguise(atoms: Atoms, k: int, rng: np.random.Generator) -> Atoms:
    copy = atoms.repeat((2, 1, 1)) if k % 3 == 0 else atoms.copy()
    copy.rattle(1e-3, rng=np.random.RandomState(k))
    return copy[rng.permutation(len(copy)).tolist()] if k % 3 == 1 else copy


def _start(function: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--child", function, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _child(function: str, *words: str) -> str:
    process = _start(function, *words)
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{function} ended with {process.returncode}")
    return output.split()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small numbers of structures")
    parser.add_argument("--only", choices=MEASUREMENTS, default=None, help="one of them")
    parser.add_argument("--child", nargs="+", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        {"_memory_of": _memory_of, "_victim": _victim}[options.child[0]](*options.child[1:])
        return
    found: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor()}
    measure = {f.__name__: f for f in (throughput, memory, bad, kills, dedupe)}
    for name in MEASUREMENTS if options.only is None else (options.only,):
        found[name] = measure[name](options.quick)
        print(f"{name:12}", ", ".join(f"{key} {value}" for key, value in found[name].items()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
