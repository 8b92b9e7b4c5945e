"""CPU seconds, peak memory, size and stages of models on a catalysis slab.

``benchmark.py models --models escn,equiformer_v2 --quick`` prints a table and keeps its rows, with
versions, device and commit, in results/models_cpu.json. ``escn`` and ``equiformer_v2`` are
the published forms (eSCN L6M2 of 12 layers, EquiformerV2 31M), the other names those of
configs/model, and a path names any configuration of a model. One structure has 86 atoms, 80 of Pt
and a methanol; all times are CPU seconds of energy and forces in float32 on one thread, edges
included.

``--peer-python PEER/bin/python`` runs fairchem-core 1.10.0 in turn with ours, with the same weights
on the same structure, and compares the outputs on the same edges in the same frames; the exit code
is 1 where they differ. As shipped, a peer with a force head keeps what gradients need even where
none are asked for; its time with frozen weights, which spares it that, stands beside. Its Python
needs what atomeq needs and fairchem-core, no more:

    python3 -m venv PEER
    echo "$PWD/.venv/lib/python3.11/site-packages" > PEER/lib/python3.11/site-packages/host.pth
    PEER/bin/pip install --no-deps fairchem-core==1.10.0
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from ase import Atoms
from ase.build import add_adsorbate, fcc111, molecule
from rich.console import Console
from rich.table import Table
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from atomeq.nn.stress import symmetric_tensor
from atomeq.potential.checkpoint import build_model
from atomeq.potential.official_names import official_weights
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences
from benchmarks.peers.process import PeerProcess
from benchmarks.record import RESULTS, ROOT, in_own_process, machine, read, write
from benchmarks.stages import stage_shares

FILE = RESULTS / "models_cpu.json"
MODELS = ROOT / "configs" / "model"
PUBLISHED = {
    "escn": MODELS / "published" / "escn_l6m2.yaml",
    "equiformer_v2": MODELS / "published" / "equiformer_v2_31m.yaml",
}
# What fairchem-core is told to build the same networks.
PEERS = {
    "escn": {
        "num_layers": 12, "max_neighbors": 20, "cutoff": 12.0, "sphere_channels": 128,
        "hidden_channels": 256, "lmax_list": [6], "mmax_list": [2], "num_sphere_samples": 128,
        "distance_function": "gaussian", "regress_forces": True, "use_pbc": True,
        "basis_width_scalar": 2.0, "otf_graph": True,
    },
    "equiformer_v2": {
        "use_pbc": True, "regress_forces": True, "otf_graph": True, "max_neighbors": 20,
        "max_radius": 12.0, "max_num_elements": 90, "num_layers": 8, "sphere_channels": 128,
        "attn_hidden_channels": 64, "num_heads": 8, "attn_alpha_channels": 64,
        "attn_value_channels": 16, "ffn_hidden_channels": 128, "norm_type": "layer_norm_sh",
        "lmax_list": [4], "mmax_list": [2], "grid_resolution": 18, "edge_channels": 128,
        "use_atom_edge_embedding": True, "share_atom_edge_embedding": False,
        "distance_function": "gaussian", "use_s2_act_attn": False, "use_attn_renorm": True,
        "use_gate_act": False, "use_grid_mlp": True, "use_sep_s2_act": True, "alpha_drop": 0.1,
        "drop_path_rate": 0.1, "proj_drop": 0.0, "weight_init": "uniform",
    },
}  # fmt: skip
# Outputs in float32 over a dozen layers; an option that differs shows at 1e-1.
SAME = 1e-3
GIGABYTE = 1e9
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; return the exit code."""
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(1)
    if arguments.memory_of:
        print(json.dumps(peak_memory(arguments.memory_of, arguments.batch, arguments.gradients)))
        return 0
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    rows: dict[str, Row] = {}
    for name in arguments.models.split(","):
        rows[name] = measure(name, rounds, arguments)
        row = {**rows[name], "rounds": rounds, "machine": machine()}
        write(arguments.out, {**read(arguments.out), name: row})  # what it says of others stays
    show(rows)
    differing = [n for n, row in rows.items() if row.get("largest_difference", 0.0) > SAME]
    if differing:
        print(f"outputs differ from fairchem-core's: {', '.join(differing)}")
    return 1 if differing else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models",
        default="escn,equiformer_v2",
        help="escn, equiformer_v2 (as published), others of configs/model, or paths; by commas",
    )
    parser.add_argument("--quick", action="store_true", help="one round, memory of inference alone")
    parser.add_argument("--rounds", type=int, help="default 3, of --quick 1")
    parser.add_argument("--peer-python", metavar="PATH", help="a Python that has fairchem-core")
    parser.add_argument(
        "--peer-memory",
        action="store_true",
        help="also the peer's memory at --batch; it takes what it takes (16 GB at 4)",
    )
    parser.add_argument("--batch", type=int, default=4, help="structures where memory is measured")
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE")
    # What the script runs itself in, for the peak is one of the whole process.
    parser.add_argument("--memory-of", metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--gradients", action="store_true", help=argparse.SUPPRESS)
    return parser


def measure(name: str, rounds: int, arguments: argparse.Namespace) -> Row:
    """Return all that is measured of one model."""
    potential, atoms = potential_of(name), slab()
    with torch.no_grad():
        n_edges = potential.build_graph(atoms).n_edges
    row: Row = {
        "parameters": sum(p.numel() for p in potential.model.parameters()),
        "atoms": len(atoms),
        "edges": n_edges,
    }
    if arguments.peer_python and name in PEERS:
        row |= against_peer(potential, name, rounds, arguments.peer_python)
    else:
        cpu_seconds(potential, atoms)  # first calls build tables
        row["cpu_s"] = statistics.median(cpu_seconds(potential, atoms) for _ in range(rounds))
    if name in PUBLISHED:
        row["stages"] = stage_shares(potential, atoms)
        row["batch"] = arguments.batch
        row["peak_bytes"] = peak_of_process(name, arguments.batch, gradients=False)
        if not arguments.quick:
            row["peak_bytes_gradients"] = peak_of_process(name, arguments.batch, gradients=True)
        if arguments.peer_python and arguments.peer_memory:
            row["peer_peak_bytes"] = peer_peak(name, arguments.batch, arguments.peer_python)
    return row


def potential_of(name: str) -> Potential:
    """Return the model of a name or path with random weights, knowing all its elements."""
    path = PUBLISHED.get(name, Path(name) if name.endswith(".yaml") else MODELS / f"{name}.yaml")
    if not path.is_file():
        known = sorted({file.stem for file in MODELS.glob("*.yaml")} | set(PUBLISHED))
        raise SystemExit(f"no model {name!r}; there are {', '.join(known)}, or give a path")
    torch.manual_seed(0)
    model = build_model(yaml.safe_load(path.read_text(encoding="utf-8")))
    references = AtomicReferences(dict.fromkeys((1, 6, 8, 78), 0.0))
    return Potential(model.float(), references).eval().requires_grad_(False)


def slab(seed: int = 0) -> Atoms:
    """Return 80 atoms of Pt(111) under a methanol, rattled."""
    atoms = fcc111("Pt", (4, 5, 4), vacuum=8.0, periodic=True)
    add_adsorbate(atoms, molecule("CH3OH"), 2.5, "ontop")
    atoms.rattle(0.05, seed=seed)
    return atoms


def cpu_seconds(potential: Potential, atoms: Atoms) -> float:
    """Return what energy and forces of a structure take, its edges included."""
    start = time.process_time()
    with torch.set_grad_enabled(potential.conservative):
        potential(potential.build_graph(atoms))
    return time.process_time() - start


# Against fairchem-core


def against_peer(potential: Potential, name: str, rounds: int, python: str) -> Row:
    """Run the peer in turn with ours; return both times, their ratio and how outputs differ."""
    atoms = slab()
    with tempfile.TemporaryDirectory() as folder:
        weights, results = Path(folder, "weights.pt"), Path(folder, "results.npz")
        peer = start_peer(python, name, PEERS[name], [atoms], Path(folder))
        stored = torch.load(weights, weights_only=True)
        potential.model.load_state_dict(official_weights(potential.model, stored))
        first = peer.ask("compute", results=str(results))  # it builds tables too
        difference = largest_difference(potential, atoms, results)
        ours, frozen, shipped = [], [], []
        for _ in range(rounds):
            ours.append(cpu_seconds(potential, atoms))
            frozen.append(peer.ask("compute")["cpu_s"])
            last = peer.ask("compute", trainable=True)
            shipped.append(last["cpu_s"])
        peer.close()
    ratios = [b / a for a, b in zip(ours, shipped, strict=True)]
    return {
        "cpu_s": statistics.median(ours),
        "peer_cpu_s": statistics.median(shipped),
        "peer_frozen_cpu_s": statistics.median(frozen),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "ratio_frozen": statistics.median(b / a for a, b in zip(ours, frozen, strict=True)),
        "peer_frozen_peak_bytes_one_structure": first["peak_bytes"],
        "peer_peak_bytes_one_structure": last["peak_bytes"],
        "largest_difference": difference,
    }


def start_peer(
    python: str, name: str, config: dict[str, Any], structures: list[Atoms], folder: Path
) -> PeerProcess:
    """Start a peer with a model and structures; its weights are in weights.pt of the folder."""
    inputs = folder / "structures.npz"
    np.savez(
        inputs,
        pos=np.concatenate([atoms.positions for atoms in structures]),
        numbers=np.concatenate([atoms.numbers for atoms in structures]),
        cell=np.stack([atoms.cell.array for atoms in structures]),
        natoms=np.array([len(atoms) for atoms in structures]),
    )
    peer = PeerProcess(python, "fairchem_core")
    peer.ask("build", model=name, config=config, weights=str(folder / "weights.pt"))
    peer.ask("take", structures=str(inputs))
    return peer


def largest_difference(potential: Potential, atoms: Atoms, results: Path) -> float:
    """Return how far outputs are from the peer's on its edges, relative to the largest."""
    with np.load(results, allow_pickle=False) as file:
        theirs = {key: torch.from_numpy(file[key]) for key in file.files}
    built = potential.build_graph(atoms)
    graph = AtomGraph(
        pos=built.pos, atomic_numbers=built.atomic_numbers, cell=built.cell, pbc=built.pbc,
        edge_index=theirs["edge_index"], cell_offsets=theirs["cell_offsets"].round().long(),
        batch=built.batch, natoms=built.natoms,
    )  # fmt: skip
    model: Any = potential.model
    with torch.no_grad():
        outputs = model(graph, edge_rotation=theirs["rotation"])
    ours = {"energy": outputs["energies"].sum(), "forces": outputs["forces"]}
    if "stress" in outputs:
        ours["stress"] = outputs["stress"]
        parts = (theirs["stress_isotropic"].view(1, 1), theirs["stress_anisotropic"])
        theirs["stress"] = symmetric_tensor(torch.cat(parts, dim=1))
    return relative_difference(ours, theirs)


def relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference of outputs, each relative to its own largest value."""
    return max(
        float((value - theirs[key].view_as(value)).abs().max() / theirs[key].abs().max())
        for key, value in ours.items()
    )


# Memory


def peak_of_process(name: str, batch: int, *, gradients: bool) -> int:
    """Return the largest memory of a process that computes a batch once."""
    words = ["--memory-of", name, "--batch", str(batch), *(["--gradients"] if gradients else [])]
    return json.loads(in_own_process("models", *words))


def peak_memory(name: str, batch: int, gradients: bool) -> int:
    """Compute energy and forces of a batch, and a step's gradients if asked; return the peak."""
    potential = potential_of(name).requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        graph = potential.build_graph([slab(seed) for seed in range(batch)])
        results = potential(graph)
        if gradients:
            (results["energy"].sum() + results["forces"].square().sum()).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peer_peak(name: str, batch: int, python: str) -> int:
    """Return the peer's largest memory for the same batch, without gradients."""
    with tempfile.TemporaryDirectory() as folder:
        structures = [slab(seed) for seed in range(batch)]
        peer = start_peer(python, name, PEERS[name], structures, Path(folder))
        peak = peer.ask("compute", trainable=True)["peak_bytes"]
        peer.close()
    return peak


# Results


def show(rows: dict[str, Row]) -> None:
    """Print the table, and the stages below it."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    columns = {
        "model": str, "parameters": "{:,}".format, "atoms": str, "edges": str,
        "cpu_s": "{:.3g}".format, "peer_cpu_s": "{:.3g}".format, "ratio": "{:.2f}".format,
        "peer_frozen_cpu_s": "{:.3g}".format, "ratio_frozen": "{:.2f}".format,
        "largest_difference": "{:.0e}".format, "peak_bytes": _gigabytes,
        "peak_bytes_gradients": _gigabytes, "peer_peak_bytes": _gigabytes,
    }  # fmt: skip
    titles = {
        "cpu_s": "CPU s", "peer_cpu_s": "peer\nCPU s",
        "peer_frozen_cpu_s": "frozen\nCPU s", "ratio_frozen": "frozen\nratio",
        "largest_difference": "differ by",
        "peak_bytes": "peak GB\nbatch", "peak_bytes_gradients": "peak GB\ngradients",
        "peer_peak_bytes": "peer\npeak GB",
    }  # fmt: skip
    shown = {key: form for key, form in columns.items()
             if key == "model" or any(key in row for row in rows.values())}  # fmt: skip
    table = Table(*(titles.get(key, key) for key in shown), box=None)
    for name, row in rows.items():
        cells = {"model": name, **row}
        table.add_row(*(form(cells[key]) if key in cells else "-" for key, form in shown.items()))
    console.print(table)
    for name, row in rows.items():
        if "stages" in row:
            shares = [f"{stage} {share:.0%}" for stage, share in row["stages"].items()]
            console.print(f"{name}, batch for memory {row['batch']}: {', '.join(shares)}")


def _gigabytes(count: float) -> str:
    return f"{count / GIGABYTE:.2f}"
