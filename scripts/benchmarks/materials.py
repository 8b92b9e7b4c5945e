"""CPU seconds and peak memory of published materials models, paired with fairchem-core's code.

``benchmark.py materials --peer-python PEER/bin/python`` computes energy, forces and stress of 64
rattled atoms of silicon, edges included, in float32 on one thread, with eSEN-30M (its gradients)
and EquiformerV2-31M of OMat24 (its heads), and takes a training step of eSEN on energies, forces
and stresses of two cells of 8 atoms. fairchem-core 1.10.0 takes turns with ours, with the same
random weights; a ratio is the median over rounds of the paired times, with its quartiles, and the
peak is that of a process which does nothing else. As shipped, weights of the peer want a gradient;
what it takes with them frozen, as ours are, stands beside. EquiformerV3-30M, whose code is in no
package index, is measured alone. The exit code is 1 where results differ or a bar is missed.

What PEER is stands in the head of models.py.
"""

import argparse
import functools
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from ase import Atoms
from rich.console import Console

from atomeq.graph.atom_graph import AtomGraph
from atomeq.potential.checkpoint import build_model
from atomeq.potential.official_names import build_official, official_weights
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences
from atomeq.typing import PropertyKey
from benchmarks.judged import Judged, summary, table_of
from benchmarks.models import MODELS, largest_difference, start_peer
from benchmarks.models import relative_difference as relative
from benchmarks.peers.fairchem_core import LEARNING_RATE
from benchmarks.peers.process import PeerProcess
from benchmarks.potentials import silicon
from benchmarks.record import RESULTS, in_own_process, machine, read, write

FILE = RESULTS / "materials_cpu.json"
WANTED: tuple[PropertyKey, ...] = ("energy", "forces", "stress")
ALONE = {"equiformer_v3": MODELS / "published" / "equiformer_v3_30m.yaml"}
PAIRED: dict[str, dict[str, Any]] = {
    "esen": {
        "backbone": {
            "model": "esen_backbone", "max_num_elements": 100, "sphere_channels": 128, "lmax": 3,
            "mmax": 2, "otf_graph": True, "max_neighbors": 300, "cutoff": 6.0,
            "edge_channels": 128, "distance_function": "gaussian", "num_distance_basis": 64,
            "direct_forces": False, "regress_forces": True, "regress_stress": True,
            "num_layers": 10, "hidden_channels": 128, "norm_type": "rms_norm_sh",
            "act_type": "gate", "mlp_type": "spectral", "use_envelope": True,
        },
        "heads": {"mptrj": {"module": "esen_mlp_efs_head"}},
    },
    "equiformer_v2": {
        "backbone": {
            "model": "equiformer_v2_backbone", "max_neighbors": 20, "max_radius": 12.0,
            "max_num_elements": 96, "avg_num_nodes": 31.17, "avg_degree": 61.95, "num_layers": 8,
            "sphere_channels": 128, "attn_hidden_channels": 64, "num_heads": 8,
            "attn_alpha_channels": 64, "attn_value_channels": 16, "ffn_hidden_channels": 128,
            "norm_type": "layer_norm_sh", "lmax_list": [4], "mmax_list": [2],
            "grid_resolution": 18, "edge_channels": 128, "use_atom_edge_embedding": True,
            "distance_function": "gaussian", "use_s2_act_attn": False, "use_attn_renorm": True,
            "use_gate_act": False, "use_grid_mlp": True, "use_sep_s2_act": True,
            "alpha_drop": 0.1, "drop_path_rate": 0.1, "weight_init": "uniform",
            "enforce_max_neighbors_strictly": False,
        },
        "heads": {
            "energy": {"module": "equiformer_v2_energy_head"},
            "forces": {"module": "equiformer_v2_force_head"},
            "stress": {"module": "rank2_symmetric_head", "output_name": "stress",
                       "use_source_target_embedding": True, "decompose": True},
        },
    },
}  # fmt: skip
HYDRA = {"otf_graph": True, "pass_through_head_outputs": True}
PARAMETERS = {"esen": 30_161_153, "equiformer_v2": 31_207_434}
SAME = 1e-3  # outputs in float32 over ten layers, relative to the largest
FASTER, LEANER = 2.0, 0.5  # what is asked
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; return the exit code."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(1)
    if options.alone:
        print(json.dumps(in_this_process(options.alone, train=options.train)))
        return 0
    for name in options.models:
        for train in (False, True) if name == "esen" else (False,):
            row = measure(name, options, train=train) | {"machine": machine()}
            found = {f"{name}, training step" if train else name: row}
            write(options.out, read(options.out) | found)
    lines = judged(read(options.out))
    Console(width=None if sys.stdout.isatty() else 110).print(table_of("one CPU thread", lines))
    print(summary(lines))
    return 1 if any(line.met is False for line in lines) else 0


def _parser() -> argparse.ArgumentParser:
    names = [*PAIRED, *ALONE]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--peer-python", metavar="PATH", help="a Python that has fairchem-core")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE")
    # What the script runs itself in, for the peak is one of the whole process.
    parser.add_argument("--alone", metavar="MODEL", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    return parser


def crystals(*, train: bool) -> list[Atoms]:
    """Return what is computed, turned so that no edge is along an axis, where theirs is wrong."""
    found = [silicon(8), silicon(8)] if train else [silicon(64)]
    for seed, atoms in enumerate(found):
        atoms.rattle(0.05, seed=seed + 1)
        atoms.rotate(40.0, (1, 2, 3), rotate_cell=True)
    return found


def potential_of(name: str) -> Potential:
    """Return a model with random weights."""
    torch.manual_seed(0)
    if name in ALONE:
        model = build_model(yaml.safe_load(ALONE[name].read_text(encoding="utf-8")))
    else:
        model = build_official("hydra", PAIRED[name])
    references = AtomicReferences({14: 0.0})
    return Potential(model.float(), references).eval().requires_grad_(False)


def measure(name: str, options: argparse.Namespace, *, train: bool) -> Row:
    """Return all that is measured of one model."""
    words = ["--alone", name, *(["--train"] if train else [])]
    row: Row = json.loads(in_own_process("materials", *words).splitlines()[-1])
    if name in ALONE or not options.peer_python:
        return row
    assert row["parameters"] == PARAMETERS[name]
    with tempfile.TemporaryDirectory() as folder:
        structures = crystals(train=train)
        config = HYDRA | PAIRED[name]
        peer = start_peer(options.peer_python, "hydra", config, structures, Path(folder))
        potential = potential_of(name)
        stored = torch.load(Path(folder, "weights.pt"), weights_only=True)
        potential.model.load_state_dict(official_weights(potential.model, stored))
        del stored
        pair = steps if train else energies
        row |= pair(potential, structures, peer, Path(folder), options.rounds)
        peer.close()
    return row


def in_this_process(name: str, *, train: bool) -> Row:
    """Compute once or take a step; return size, CPU seconds and the peak of this process."""
    potential, structures = potential_of(name), crystals(train=train)
    if train:
        call = functools.partial(step, potential, *labelled(potential, structures))
    else:
        call = lambda: compute(potential, structures)  # noqa: E731
    call()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "parameters": sum(p.numel() for p in potential.model.parameters()),
        "atoms": sum(map(len, structures)),
        "edges": potential.build_graph(structures).n_edges,
        "cpu_s": call()["cpu_s"],
        "peak_bytes": peak,
    }


def compute(potential: Potential, structures: list[Atoms]) -> Row:
    """Compute energy, forces and stress, edges included."""
    start = time.process_time()
    results = potential(potential.build_graph(structures), WANTED)
    return {"cpu_s": time.process_time() - start, "results": results}


def energies(
    potential: Potential, structures: list[Atoms], peer: PeerProcess, folder: Path, n_rounds: int
) -> Row:
    """Compute in turn; return times, ratios and the largest difference."""
    file = folder / "results.npz"
    first = peer.ask("compute", results=str(file))
    found = compute(potential, structures)["results"]
    if potential.conservative:
        with np.load(file, allow_pickle=False) as stored:
            theirs = {key: torch.from_numpy(stored[key]) for key in stored.files}
        difference = relative({key: found[key].float() for key in WANTED}, theirs)
    else:
        difference = largest_difference(potential, structures[0], file)
    shipped = peer.ask("compute", trainable=True)
    calls = {
        "cpu_s": lambda: compute(potential, structures)["cpu_s"],
        "peer_cpu_s": lambda: peer.ask("compute", trainable=True)["cpu_s"],
        "peer_frozen_cpu_s": lambda: peer.ask("compute")["cpu_s"],
    }
    return {
        **in_turn(calls, n_rounds),
        "peer_peak_bytes": shipped["peak_bytes"],
        "peer_frozen_peak_bytes": first["peak_bytes"],
        "largest_difference": difference,
    }


def in_turn(calls: dict[str, Callable[[], float]], n_rounds: int) -> Row:
    """Let all take turns; return medians, and ratios of the others to the first with quartiles."""
    times: dict[str, list[float]] = {key: [] for key in calls}
    for _ in range(n_rounds):
        for key, call in calls.items():
            times[key].append(call())
        shown = ", ".join(f"{key} {taken[-1]:.2f}" for key, taken in times.items())
        print(shown, file=sys.stderr, flush=True)  # what an interrupted run has found
    row: Row = {key: statistics.median(taken) for key, taken in times.items()}
    ours = times["cpu_s"]
    for key in [key for key in calls if key != "cpu_s"]:
        ratios = [b / a for a, b in zip(ours, times[key], strict=True)]
        name = key.replace("peer", "ratio").removesuffix("_cpu_s")
        row[name] = statistics.median(ratios)
        if n_rounds > 1:
            row[f"{name}_quartiles"] = statistics.quantiles(ratios, n=4)[::2]
    return row | {"rounds": n_rounds}


# Training


def labelled(potential: Potential, structures: list[Atoms]) -> tuple[AtomGraph, dict, Any]:
    """Return a batch, random labels and an optimizer."""
    graph = potential.build_graph(structures)
    made = np.random.default_rng(0)
    shapes = {"energy": (graph.n_graphs,), "forces": (graph.n_atoms, 3)}
    labels = {key: made.normal(size=shape) for key, shape in shapes.items()}
    labels["stress"] = made.normal(size=(graph.n_graphs, 3, 3))
    potential.requires_grad_(True)
    return graph, labels, torch.optim.AdamW(potential.parameters(), lr=LEARNING_RATE)


def step(potential: Potential, graph: AtomGraph, labels: dict, optimizer: Any) -> Row:
    """Take a step on energy, forces and stress as the peer does."""
    wanted = {key: torch.from_numpy(value).float() for key, value in labels.items()}
    potential.train()
    start = time.process_time()
    outputs = potential(graph, WANTED)
    loss = sum((outputs[key] - value).square().mean() for key, value in wanted.items())
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    gradients = [p.grad for p in potential.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    optimizer.step()
    optimizer.zero_grad()
    seconds = time.process_time() - start
    return {"cpu_s": seconds, "loss": float(loss.detach()), "gradient": norm}


def steps(
    potential: Potential, structures: list[Atoms], peer: PeerProcess, folder: Path, n_rounds: int
) -> Row:
    """Take steps in turn; return times, ratios and how loss and gradient differ."""
    graph, labels, optimizer = labelled(potential, structures)
    file = folder / "labels.npz"
    np.savez(file, **labels)
    theirs = peer.ask("step", labels=str(file))
    ours = step(potential, graph, labels, optimizer)
    calls = {
        "cpu_s": lambda: step(potential, graph, labels, optimizer)["cpu_s"],
        "peer_cpu_s": lambda: peer.ask("step", labels=str(file))["cpu_s"],
    }
    return {
        **in_turn(calls, n_rounds),
        "peer_peak_bytes": theirs["peak_bytes"],
        "largest_difference": max(abs(ours[k] / theirs[k] - 1) for k in ("loss", "gradient")),
    }


# Results


def judged(rows: dict[str, Row]) -> list[Judged]:
    """Judge what was measured."""
    lines = []
    for name, row in rows.items():
        lines.append(Judged(f"{name}, {row['atoms']} atoms", f"{row['cpu_s']:.2f} CPU s"))
        memory = f"{row['peak_bytes'] / 1e9:.2f} GB"
        if "ratio" not in row:
            lines.append(Judged(f"{name}: peak", memory))
            continue
        low, high = row.get("ratio_quartiles", (row["ratio"],) * 2)
        what = f"{name}: fairchem / ours ({low:.2f} to {high:.2f})"
        lines.append(Judged.at_least(what, row["ratio"], FASTER, "x"))
        if "ratio_frozen" in row:
            lines.append(Judged(f"{name}: its weights frozen", f"{row['ratio_frozen']:.2f} x"))
        share = row["peak_bytes"] / row["peer_peak_bytes"]
        lines.append(Judged.at_most(f"{name}: peak, {memory}, of fairchem's", share, LEANER))
        differs = row["largest_difference"]
        lines.append(Judged.at_most(f"{name}: results differ, relative", differs, SAME))
    return lines
