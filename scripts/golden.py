"""Compares models with the outputs of reference implementations: ``golden.py PATH [PATH ...]``.

A PATH is a case, a folder with case.json, or a folder of cases. The model is built from case.json,
takes the case's weights and computes its structures; the largest deviation of every output and
intermediate is printed, relative to the largest value of the tensor, in float64 and float32. The
exit code is 1 where one is beyond tolerance. Cases in the layout of the light models, CASE.json
beside CASE.safetensors, are checked by golden_light.py.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import golden_light
import golden_mace
import golden_sevennet
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.equiformer_v2 import EquiformerV2
from atomeq.models.escn_published import ENERGY_SCALE, PublishedESCN
from atomeq.ops.edge.wigner import build_edge_frame
from atomeq.ops.orders import coefficient_index, m_primary_order
from atomeq.ops.segment.operations import segment_sum
from atomeq.potential.official_names import build_official, official_weights

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
FIRST_EDGES = 8  # whose messages the cases hold
Tensors = dict[str, Tensor]


@dataclass
class Report:
    """What came of one case: the deviation of each tensor in each dtype."""

    deviations: dict[str, dict[torch.dtype, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    passed: bool = True

    def compare(self, name: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
        """Add one tensor; a shape that differs is beyond any tolerance."""
        deviation = float("inf")
        if ours.shape == theirs.shape:
            largest = float(theirs.abs().max()) if theirs.numel() else 0.0
            difference = (ours.double() - theirs.double()).abs()
            deviation = float(difference.max()) / (largest or 1.0) if theirs.numel() else 0.0
        self.deviations.setdefault(name, {})[dtype] = deviation
        self.passed &= deviation <= TOLERANCES[dtype]  # false for nan too


def main(argv: list[str] | None = None) -> int:
    """Check all cases; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    arguments = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 100)
    cases = [case for path in arguments.paths for case in find_cases(path)]
    light = [case for path in arguments.paths for case in golden_light.find_cases(path)]
    failed = []
    for folder in cases:
        case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        check = layout_of(case)
        if check is None:
            console.print(f"{folder}: no layout for model {case.get('model')!r}", style="red")
            failed.append(folder.name)
            continue
        report = check(folder, case)
        show(console, folder.name, report)
        if not report.passed:
            failed.append(folder.name)
    for path in light:
        light_report = golden_light.check(path)
        golden_light.show(console, f"{path.parent.name}/{path.stem}", light_report)
        if not light_report.passed:
            failed.append(f"{path.parent.name}/{path.stem}")
    cases += light
    console.print(f"{len(cases) - len(failed)} of {len(cases)} cases within tolerance")
    if failed:
        console.print("beyond: " + ", ".join(failed), style="red")
    return 1 if failed or not cases else 0


def find_cases(path: Path) -> list[Path]:
    """Return the folders with a case.json at or below a path."""
    return sorted(file.parent for file in path.rglob("case.json"))


def layout_of(case: dict[str, Any]) -> Callable[[Path, dict[str, Any]], Report] | None:
    """Return what checks a case, by what its case.json says."""
    if case.get("model") in ("escn", "equiformer_v2") and "config" in case:
        return check_oc20
    if case.get("model") == golden_sevennet.MODEL:
        return check_sevennet
    if golden_mace.is_mace(case):
        return check_mace
    return None


def show(console: Console, title: str, report: Report) -> None:
    table = Table("tensor", title=title, title_justify="left")
    for dtype, tolerance in TOLERANCES.items():
        table.add_column(f"{str(dtype).removeprefix('torch.')} ({tolerance:g})", justify="right")
    for name, found in report.deviations.items():
        cells = []
        for dtype, tolerance in TOLERANCES.items():
            deviation = found.get(dtype)
            style = "" if deviation is None or deviation <= tolerance else "[red]"
            cells.append(f"{style}{deviation:.1e}" if deviation is not None else "")
        table.add_row(name, *cells)
    console.print(table)
    for note in report.notes:
        console.print(f"  {note}")


def check_mace(folder: Path, case: dict[str, Any]) -> Report:
    """Check a case of golden/mace."""
    graph = graph_of(load_file(folder / "inputs.safetensors"))
    report = Report()
    for dtype, name in ((torch.float64, "f64"), (torch.float32, "f32")):
        theirs = load_file(folder / f"outputs_{name}.safetensors")
        for key, tensor in golden_mace.compute(folder, case, graph, dtype).items():
            if key in theirs:
                report.compare(key, tensor, theirs[key], dtype)
    return report


# eSCN and EquiformerV2


def check_oc20(folder: Path, case: dict[str, Any]) -> Report:
    """Check a case of golden/oc20_models."""
    model: Any = build_official(case["model"], case["config"])
    model.load_state_dict(official_weights(model, load_file(folder / "weights.safetensors")))
    model.eval().requires_grad_(False)
    inputs = load_file(folder / "inputs.safetensors")
    graph = graph_of(inputs)
    report = Report()
    for dtype in TOLERANCES:
        name = "f64" if dtype == torch.float64 else "f32"
        theirs = load_file(folder / f"outputs_{name}.safetensors")
        rotation = theirs.get("in.edge_rot_mat", inputs["edge_rot_mat"])
        ours = compute(model.to(dtype), graph, rotation)
        if (wigner := theirs.get("mid.wigner_first4edges")) is not None:
            ours["mid.wigner_first4edges"] = full_wigner(model, graph, rotation, wigner.shape[-1])
        for key, tensor in theirs.items():
            if key.startswith("in."):
                continue
            if key in ours:
                report.compare(key, ours[key], tensor, dtype)
            elif key.startswith("out."):
                report.compare(key, tensor.new_full((), torch.nan), tensor, dtype)
            elif dtype == torch.float64:
                report.notes.append(f"{key} has no counterpart here and was not compared")
    if case["config"].get("use_pbc", True):
        report.notes.append(compare_edges(model, graph))
    return report


def check_sevennet(folder: Path, case: dict[str, Any]) -> Report:
    """Check a case of golden/sevennet."""
    graph = graph_of(load_file(folder / "inputs.safetensors"))
    report = Report()
    for dtype in TOLERANCES:
        name = "f64" if dtype == torch.float64 else "f32"
        ours = golden_sevennet.outputs(folder, case, graph, dtype)
        for key, tensor in load_file(folder / f"outputs_{name}.safetensors").items():
            if key in ours:
                report.compare(key, ours[key].reshape(tensor.shape), tensor, dtype)
            elif key.startswith("out.") and (key != "out.stress" or all(case["stress_valid"])):
                report.compare(key, tensor.new_full((), torch.nan), tensor, dtype)
            elif dtype == torch.float64 and key.startswith("mid."):
                report.notes.append(f"{key} has no counterpart here and was not compared")
    return report


def graph_of(inputs: Tensors) -> AtomGraph:
    """Return the structures with the very edges of the reference."""
    return AtomGraph(
        pos=inputs["pos"].double(),
        atomic_numbers=inputs["atomic_numbers"].long(),
        cell=inputs["cell"].double(),
        pbc=inputs["pbc"].bool(),
        edge_index=inputs["edge_index"].long(),
        cell_offsets=inputs["cell_offsets"].round().long(),
        batch=inputs["batch"].long(),
        natoms=inputs["natoms"].long(),
    )


def compute(model: Any, graph: AtomGraph, rotation: Tensor) -> Tensors:
    """Return outputs and intermediates under the names of the cases."""
    watch = watch_escn if isinstance(model, PublishedESCN) else watch_equiformer_v2
    with watch(model) as found:
        outputs = model(graph, edge_rotation=rotation)
    energies = outputs["energies"]
    found["out.energy"] = segment_sum(energies, graph.batch, graph.n_graphs)
    if "forces" in outputs:
        found["out.forces"] = outputs["forces"]
    found["mid.node_energy_raw"] = raw_energies(model, graph, energies)[:, None]
    return found


def raw_energies(model: Any, graph: AtomGraph, energies: Tensor) -> Tensor:
    """Return the head's numbers before their scale and reference."""
    if isinstance(model, EquiformerV2):
        if model.linear_energies is not None:
            energies = energies - model.linear_energies[graph.atomic_numbers]
        return energies * model.energy_divisor
    if model.energy_reduce == "mean":
        return energies * graph.natoms[graph.batch]
    return energies / ENERGY_SCALE


def full_wigner(model: Any, graph: AtomGraph, rotation: Tensor, n_sph: int) -> Tensor:
    """Return all rows of the Wigner matrices of the first edges, sorted by degree."""
    lmax = math.isqrt(n_sph) - 1
    frame = build_edge_frame(
        graph.edge_vectors()[:4].to(model.dtype), graph.edge_index[:, :4], n_atoms=graph.n_atoms,
        lmax=lmax, mmax=lmax, rotation=rotation[:4],
    )  # fmt: skip
    return by_degree(frame.wigner, lmax, lmax)


def by_degree(rows: Tensor, lmax: int, mmax: int) -> Tensor:
    """Sort m-primary rows (n_edges, n_rows, channels) by degree, as the cases have them."""
    order = m_primary_order(lmax, mmax)
    return rows[:, [order.index(row) for row in coefficient_index(lmax, mmax)]]


def compare_edges(model: Any, graph: AtomGraph) -> str:
    """Say whether our builder finds the edges of the reference; equal distances may differ."""
    built = model.graph_builder()(graph)
    found, expected = (
        set(map(tuple, torch.cat([g.edge_index, g.cell_offsets.T]).T.tolist()))
        for g in (built, graph)
    )
    return f"edges built here: {len(found)}, {len(found ^ expected)} other than the reference's"


@contextmanager
def watch_equiformer_v2(model: Any) -> Iterator[Tensors]:
    """Collect what flows through EquiformerV2."""
    found: Tensors = {}

    def keep(name: str) -> Callable:
        return lambda module, given, result: found.__setitem__(f"mid.{name}", result)

    def keep_messages(name: str) -> Callable:
        def hook(module: nn.Module, given: tuple, result: tuple[Tensor, Tensor]) -> None:
            rows, scalars = (tensor[:FIRST_EDGES] for tensor in result)
            found[f"mid.{name}_out"] = by_degree(rows, model.lmax, model.mmax)
            found[f"mid.{name}_extra_m0"] = scalars

        return hook

    hooks = [
        model.degree_embedding.register_forward_hook(keep("edge_degree_embedding")),
        model.norm_out.register_forward_hook(keep("final_norm")),
    ]
    for k, block in enumerate(model.blocks):
        prefix = f"mid.block{k}.in"
        hooks += [
            block.register_forward_pre_hook(
                lambda module, given, prefix=prefix: found.__setitem__(prefix, given[0])
            ),
            block.register_forward_hook(keep(f"block{k}.out")),
            block.norm_1.register_forward_hook(keep(f"block{k}.norm_1")),
            block.norm_2.register_forward_hook(keep(f"block{k}.norm_2")),
            block.attention.register_forward_hook(keep(f"block{k}.attn_out")),
            block.feed_forward.register_forward_hook(keep(f"block{k}.ffn_out")),
            block.attention.first.register_forward_hook(keep_messages(f"block{k}.so2_conv_1")),
            block.attention.second.register_forward_hook(keep_messages(f"block{k}.so2_conv_2")),
        ]
    yield found
    for hook in hooks:
        hook.remove()


@contextmanager
def watch_escn(model: Any) -> Iterator[Tensors]:
    """Collect what flows through eSCN; resolutions are side by side in the cases."""
    found: Tensors = {}
    hooks = []

    def messages(results: list[Tensor]) -> Tensor:
        parts = zip(results, model.lmax, model.mmax, strict=True)
        return torch.cat([by_degree(rows[:FIRST_EDGES], l, m) for rows, l, m in parts], dim=1)

    for k, layer in enumerate(model.layers):
        watched: list[tuple[nn.Module, str, Callable]] = [
            (layer, "block_out", lambda given, result: torch.cat(result, dim=1)),
            (layer.edge_network, "edge_scalars", lambda given, result: result[:FIRST_EDGES]),
            (layer.source, "so2_source_out", lambda given, result: messages(result)),
            (layer.target, "so2_target_out", lambda given, result: messages(result)),
            (layer.update, "message_aggregated", lambda given, result: torch.cat(given[1], dim=1)),
        ]
        for module, name, read in watched:
            key = f"mid.layer{k}.{name}"
            hooks.append(
                module.register_forward_hook(
                    lambda module, given, result, key=key, read=read: found.__setitem__(
                        key, read(given, result)
                    )
                )
            )
    yield found
    for hook in hooks:
        hook.remove()


if __name__ == "__main__":
    sys.exit(main())
