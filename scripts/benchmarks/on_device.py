"""Milliseconds of whole models, steps of dynamics and of training on a GPU, by who serves.

``benchmark.py on-device WHAT [--device cuda|cpu] [--quick] [--out FILE]``; WHAT is

* ``models``: energy and forces of 32 crystals of copper at once, or of one;
* ``dynamics``: a step of NVE with cu-pbe, 150, 1,000 and 10,000 atoms, and of a crystal of 64 atoms
  with an EquiformerV2 of 31 million parameters (random weights);
* ``training``: a step on energy and forces, AdamW, two crystals of 108 atoms.

Each is measured with plain torch (``reference``), with what ``auto`` takes at every precision, and
where it applies with its launches replayed from a CUDA graph. Times are wall-clock medians between
synchronisations of the device. A row that fails says why, and the others are measured. Rows are
written as they come.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from ase import Atoms
from ase.build import bulk

from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.integrators import VelocityVerlet
from atomeq.ops.dispatch import use_backend
from atomeq.ops.precision import PRECISIONS
from atomeq.potential.captured import Captured
from atomeq.potential.checkpoint import build_model, load_potential
from atomeq.potential.potential import Potential
from benchmarks.record import RESULTS, ROOT, machine, write

EQUIFORMER = "published/equiformer_v2_31m"
MODELS = ("cu-pbe", "escn", "esen", EQUIFORMER, "equiformer_v3", "mace", "nequip")
ATOMS = {150: (5, 5, 6), 1_000: (10, 10, 10), 10_000: (20, 20, 25)}  # repeats of one atom
Row = dict[str, Any]
Way = tuple[str, str, bool]  # backend, precision, whether launches are replayed

REFERENCE: Way = ("reference", "highest", False)
WAYS: tuple[Way, ...] = (REFERENCE, *(("auto", one, False) for one in PRECISIONS))
REPLAYED: Way = ("auto", "high", True)


def potential_of(name: str, device: str) -> Potential:
    """Return a shipped potential, or one of a configuration with random weights, float32."""
    if name == "cu-pbe":
        return load_potential(name, device=device)
    node = yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text("utf-8"))
    torch.manual_seed(0)
    potential = Potential(build_model(node)).float().to(device)
    return potential.requires_grad_(False).eval()


def crystal(*repeats: int, seed: int = 0) -> Atoms:
    """Return rattled copper."""
    atoms = bulk("Cu").repeat(repeats)
    atoms.rattle(0.05, seed=seed)
    return atoms


def milliseconds(call: Callable[[], object], device: str, *, quick: bool) -> float:
    """Return the median time of a call, ms, after those that compile, prove and record."""
    settle = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: list[float] = []
    for _ in range(6):
        call()
    settle()
    begun = time.perf_counter()
    enough = 1.0 if quick else 3.0
    while len(times) < 5 or (len(times) < 100 and time.perf_counter() - begun < enough):
        before = time.perf_counter()
        call()
        settle()
        times.append(time.perf_counter() - before)
    return 1e3 * statistics.median(times)


def models(device: str, *, quick: bool) -> Iterator[Row]:
    """Yield energy and forces of each model, one crystal and many."""
    for name in MODELS[:1] if device == "cpu" else MODELS:
        potential = potential_of(name, device)
        for n in (1, 2 if device == "cpu" else 32):
            batch = [crystal(2, 2, 2, seed=k) for k in range(n)]
            graph = potential.build_graph(batch)
            about = {"model": name, "atoms": graph.n_atoms, "edges": graph.n_edges}
            for way in (*WAYS, REPLAYED):
                answer = Captured(potential, wanted=way[2])
                work = lambda answer=answer, graph=graph: answer(graph, ("energy", "forces"))  # noqa: E731
                yield measured(about, way, potential, work, device, quick)


def dynamics(device: str, *, quick: bool) -> Iterator[Row]:
    """Yield a step of NVE of each size."""
    sizes = {8: (2, 2, 2)} if device == "cpu" else ATOMS
    cases = [("cu-pbe", repeats) for repeats in sizes.values()]
    if device != "cpu":
        cases.append((EQUIFORMER, (4, 4, 4)))
    for name, repeats in cases:
        potential = potential_of(name, device)
        for way in (REFERENCE, ("auto", "highest", False), ("auto", "highest", True), REPLAYED):
            evaluate, integrator = Evaluator(potential, capture=way[2]), VelocityVerlet(1.0)
            states = [integrator.init(evaluate.prepare([crystal(*repeats)]), evaluate)]

            def step(states=states, integrator=integrator, evaluate=evaluate) -> None:
                states[0] = integrator.step(states[0], evaluate)

            about = {"model": name, "atoms": states[0].graph.n_atoms}
            yield measured(about, way, potential, step, device, quick)


def training(device: str, *, quick: bool) -> Iterator[Row]:
    """Yield a step of training of each model that kernels serve."""
    for name in ("escn",) if device == "cpu" else ("escn", "equiformer_v2", "mace", "nequip"):
        repeats = (2, 2, 1) if device == "cpu" else (3, 6, 6)
        for way in WAYS:
            potential = potential_of(name, device).requires_grad_(True).train()
            graph = potential.build_graph([crystal(*repeats, seed=k) for k in range(2)])
            optimizer = torch.optim.AdamW(potential.parameters(), lr=1e-5)

            def step(potential=potential, graph=graph, optimizer=optimizer) -> None:
                found = potential(graph, ("energy", "forces"))
                (found["energy"].square().sum() + found["forces"].square().sum()).backward()
                optimizer.step()
                optimizer.zero_grad()

            about = {"model": name, "atoms": graph.n_atoms, "edges": graph.n_edges}
            yield measured(about, way, potential, step, device, quick)


def measured(
    about: Row, way: Way, potential: Potential, work: Callable[[], object], device: str, quick: bool
) -> Row:
    """Return a row: what was measured, and its time or why there is none."""
    backend, precision, replays = way
    row = {**about, "backend": backend, "precision": precision, "replayed": replays}
    potential.precision = precision
    try:
        with use_backend(backend):
            row["milliseconds"] = milliseconds(work, device, quick=quick)
    except (RuntimeError, NotImplementedError, ValueError) as problem:  # memory included
        row["failed"] = f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
    return row


WORK = {"models": models, "dynamics": dynamics, "training": training}


def main(argv: list[str] | None = None) -> int:
    """Measure one kind of work; the exit code is 1 where a row failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=WORK)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="shorter; on a CPU it is a smoke test")
    parser.add_argument("--out", type=Path, help="JSON file; by default in results")
    options = parser.parse_args(argv)
    out = options.out or RESULTS / f"{options.what}_{options.device}.json"
    about = machine()
    if options.device == "cuda":
        about["device"] = torch.cuda.get_device_name()
    rows: list[Row] = []
    for row in WORK[options.what](options.device, quick=options.quick):
        rows.append(row)
        write(out, {**about, "clock": "wall", "quick": options.quick, "rows": rows})
        result = row.get("failed") or f"{row['milliseconds']:.3f} ms"
        served = f"{row['backend']} {row['precision']}{' replayed' if row['replayed'] else ''}"
        print(f"{row['model']:28} {row['atoms']:>6} atoms  {served:24} {result}", flush=True)
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
