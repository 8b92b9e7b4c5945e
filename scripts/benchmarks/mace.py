r"""CPU seconds of MACE beside mace-torch 0.3.16: energy and forces, and a training step.

``OMP_NUM_THREADS=1 PEER/bin/python scripts/benchmark.py mace`` (some three minutes; ``--quick``
takes the smallest crystal alone) prints a table and writes results/mace_cpu.json; the exit code is
1 where results differ or a bar is missed. The network is 128x0e+128x1o with products of three
factors, two layers and a cutoff of 5 Å, with the same random weights on both sides, in float32 on
one thread. Crystals are rattled MgO; graphs are made before the clock starts. A training step is
energy and forces, a loss on both, and its gradient by all weights. The two are taken in turns, one
call each, and a ratio is the median of the turns' ratios.

The peer's Python needs what atomeq needs, mace-torch, and the e3nn that it is made for:

    python3 -m venv PEER
    echo "$PWD/.venv/lib/python3.11/site-packages" > PEER/lib/python3.11/site-packages/host.pth
    PEER/bin/pip install --no-deps mace-torch==0.3.16 e3nn==0.4.4 matscipy configargparse \
        python-hostlist torch-ema prettytable gitpython gitdb smmap
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from rich.console import Console
from rich.table import Table
from torch import Tensor

from atomeq.potential.import_mace import mace_potential
from atomeq.potential.potential import Potential
from benchmarks.record import RESULTS, installed, machine, write

FILE = RESULTS / "mace_cpu.json"
BARS = {"energy and forces": 4.0, "training step": 3.0}
TURNS = {8: 21, 64: 9, 216: 5}  # atoms: cubic cells of MgO, 1, 8 and 27
CUTOFF, ELEMENTS, NEIGHBOURS = 5.0, (8, 12), 56.0
_SAME = 1e-4  # relative to the largest, float32: sums of thousands of terms in another order

Work = Callable[[], dict[str, Tensor]]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 atoms alone")
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    theirs = reference_model()
    options = {
        "interactions": [type(block).__name__ for block in theirs.interactions],
        "avg_num_neighbors": NEIGHBOURS,
    }
    ours = mace_potential(options, theirs.state_dict())
    rows = [
        row
        for n_atoms, turns in TURNS.items()
        if n_atoms == 8 or not arguments.quick
        for row in measured(ours, theirs, n_atoms, turns)
    ]
    peers = {package: installed(package) for package in ("mace-torch", "e3nn")}
    write(arguments.out, {"machine": machine(), "peers": peers, "rows": rows})
    table = Table("work", "atoms", "edges", "atomeq, ms", "mace-torch, ms", "ratio", "asked")
    for row in rows:
        table.add_row(
            *(row["work"], str(row["atoms"]), str(row["edges"])),
            *(f"{row['ours_ms']:.1f}", f"{row['theirs_ms']:.1f}", f"{row['ratio']:.1f}"),
            f">= {BARS[row['work']]}",
        )
    Console().print(table)
    return int(any(row["ratio"] < BARS[row["work"]] or row["deviation"] > _SAME for row in rows))


def reference_model(
    hidden: str = "128x0e+128x1o",
    elements: Sequence[int] = ELEMENTS,
    neighbours: float = NEIGHBOURS,
) -> Any:
    """Return mace-torch's network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # e3nn 0.4.4 is older than this torch
        from mace import modules  # first: it lets e3nn load its tables
        from e3nn import o3  # isort: skip

    torch.manual_seed(0)
    kind = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    return modules.ScaleShiftMACE(
        r_max=CUTOFF,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=kind,
        interaction_cls_first=kind,
        num_interactions=2,
        num_elements=len(elements),
        hidden_irreps=o3.Irreps(hidden),
        MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.zeros(len(elements)),
        avg_num_neighbors=neighbours,
        atomic_numbers=list(elements),
        correlation=3,
        gate=torch.nn.functional.silu,
        radial_MLP=[64, 64, 64],
        radial_type="bessel",
        atomic_inter_scale=0.8,
        atomic_inter_shift=0.1,
    )


def measured(ours: Potential, theirs: Any, n_atoms: int, turns: int) -> list[dict[str, Any]]:
    """Return a row for each kind of work on one crystal."""
    atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True).repeat(round((n_atoms / 8) ** (1 / 3)))
    atoms.rattle(0.05, seed=1)
    n_edges, sides = work(ours, theirs, atoms)
    rows = []
    for name, (one, other) in sides.items():
        for module in (ours, theirs):
            module.requires_grad_(name == "training step")
        found, expected = one(), other()
        times = [(_seconds(one), _seconds(other)) for _ in range(turns)]
        rows.append(
            {
                "work": name,
                "atoms": n_atoms,
                "edges": n_edges,
                "ours_ms": 1e3 * statistics.median(mine for mine, _ in times),
                "theirs_ms": 1e3 * statistics.median(peers for _, peers in times),
                "ratio": statistics.median(peers / mine for mine, peers in times),
                "turns": turns,
                "deviation": max(_deviation(found[key], expected[key]) for key in found),
            }
        )
    return rows


def batch_of(structures: Sequence[Atoms], elements: Sequence[int]) -> dict[str, Tensor]:
    """Return mace-torch's batch of some structures."""
    from mace import data, tools

    table = tools.AtomicNumberTable(list(elements))
    entries = [
        data.AtomicData.from_config(data.config_from_atoms(atoms), z_table=table, cutoff=CUTOFF)
        for atoms in structures
    ]
    loader = tools.torch_geometric.dataloader.DataLoader(entries, batch_size=len(entries))
    return next(iter(loader)).to_dict()


def work(ours: Potential, theirs: Any, atoms: Atoms) -> tuple[int, dict[str, tuple[Work, Work]]]:
    """Return the number of edges, and what is done on each side, ours first."""
    batch = batch_of([atoms], ELEMENTS)
    graph = ours.build_graph(atoms)
    wanted = torch.randn(len(atoms), 3, generator=torch.Generator().manual_seed(2))

    def loss(energy: Tensor, forces: Tensor) -> Tensor:
        return (energy / len(atoms)).square().sum() + (forces - wanted).square().mean()

    def our_forces() -> dict[str, Tensor]:
        return ours(graph, ("energy", "forces"))

    def their_forces() -> dict[str, Tensor]:
        return theirs(dict(batch), compute_force=True)

    def our_step() -> dict[str, Tensor]:
        ours.zero_grad()
        found = ours(graph, ("energy", "forces"), create_graph=True)
        loss(found["energy"], found["forces"]).backward()
        return {"embedding": _gradient(ours.model.embedding)}

    def their_step() -> dict[str, Tensor]:
        theirs.zero_grad()
        found = theirs(dict(batch), training=True, compute_force=True)
        loss(found["energy"], found["forces"]).backward()
        return {"embedding": _gradient(theirs.node_embedding)}

    return graph.n_edges, {
        "energy and forces": (our_forces, their_forces),
        "training step": (our_step, their_step),
    }


def _gradient(module: torch.nn.Module) -> Tensor:
    (weight,) = (weight for weight in module.parameters() if weight.numel())
    assert weight.grad is not None
    return weight.grad.flatten()


def _deviation(found: Tensor, expected: Tensor) -> float:
    error = (found.detach() - expected.detach()).abs().max()
    return float(error / expected.detach().abs().max())


def _seconds(run: Work) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start
