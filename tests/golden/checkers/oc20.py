"""Golden checks of eSCN and EquiformerV2 as the Open Catalyst Project has them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import AtomisticModel
from atomeq.models.escn_published import ENERGY_SCALE, PublishedESCN, SO2Block
from atomeq.ops.edge.wigner import build_edge_frame
from atomeq.ops.orders import coefficient_index, m_primary_order
from atomeq.ops.segment.operations import segment_sum
from atomeq.potential.official_names import build_official, official_weights
from checkers.cases import Case, FolderCase, Tensors, compare_all
from checkers.report import Report

FIRST_EDGES = 8  # whose messages the cases hold


def handles(case: Case) -> bool:
    """Say whether a case belongs here."""
    return case.model in ("escn", "equiformer_v2") and "config" in case.document


def check(case: FolderCase, report: Report) -> None:
    """Check a case in float64 and float32, and the edges that our builder finds."""
    model, graph = case_model(case), case.graph()
    for dtype in case.tolerances:
        theirs = case.expected(dtype)
        rotation = theirs.get("in.edge_rot_mat", case.inputs["edge_rot_mat"])
        ours = compute(model.to(dtype), graph, rotation)
        if (wigner := theirs.get("mid.wigner_first4edges")) is not None:
            ours["mid.wigner_first4edges"] = full_wigner(model, graph, rotation, wigner.shape[-1])
        compare_all(case, report, ours, dtype)
    if case.config.get("use_pbc", True):
        report.notes.append(compare_edges(model, graph))


def case_model(case: FolderCase, **changes: Any) -> AtomisticModel:
    """Return the model of a case with its weights, with other options where ``changes`` says so."""
    model = build_official(case.model, {**case.config, **changes})
    model.load_state_dict(official_weights(model, case.weights()))
    return model.eval().requires_grad_(False)


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
    if getattr(model, "linear_energies", None) is not None:
        energies = energies - model.linear_energies[graph.atomic_numbers]
    if model.energy_reduce == "mean":
        return energies * graph.natoms[graph.batch]
    return energies * getattr(model, "energy_divisor", 1 / ENERGY_SCALE)


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

    def messages(block: SO2Block, given: object, result: list[Any]) -> Tensor:
        parts = zip(block.sum_of_maps([result]), model.lmax, model.mmax, strict=True)
        return torch.cat([by_degree(rows[:FIRST_EDGES], l, m) for rows, l, m in parts], dim=1)

    for k, layer in enumerate(model.layers):
        watched: list[tuple[nn.Module, str, Callable]] = [
            (layer, "block_out", lambda given, result: torch.cat(result, dim=1)),
            (layer.edge_network, "edge_scalars", lambda given, result: result[:FIRST_EDGES]),
            (layer.source, "so2_source_out", partial(messages, layer.source)),
            (layer.target, "so2_target_out", partial(messages, layer.target)),
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
