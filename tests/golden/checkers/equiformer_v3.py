"""Golden checks of EquiformerV3, direct and conservative."""

import math
from functools import partial
from typing import Any

from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from atomeq.nn.attention import degree_rescale, relative_softmax
from atomeq.ops.edge.wigner import build_edge_frame
from atomeq.potential.official_equiformer_v3 import EQUIFORMER_V3
from atomeq.potential.official_names import build_official, official_weights
from checkers import esen, oc20
from checkers.cases import Case, FolderCase, Tensors, compare_all
from checkers.oc20 import FIRST_EDGES
from checkers.report import Report
from checkers.taps import Taps, first_rows


def handles(case: Case) -> bool:
    """Say whether a case belongs here."""
    return case.model in EQUIFORMER_V3.names and isinstance(case, FolderCase)


def check(case: FolderCase, report: Report) -> None:
    """Check a case in float64 and float32, and the edges that our builder finds."""
    options = {name: value for name, value in case.config.items() if name != "name"}
    model: Any = build_official(case.model, options)
    model.load_state_dict(official_weights(model, case.weights()))
    model.eval().requires_grad_(False)
    graph = case.graph()
    for dtype in case.tolerances:
        theirs = case.expected(dtype)
        rotation = theirs.get("in.edge_rot_mat", case.inputs["edge_rot_mat"])
        with taps(model.to(dtype), graph) as found:
            maps = [(block.attention.first, block.attention.second) for block in model.blocks]
            gauge = case.document.get("gauge_u")
            ours = found | esen.outputs(model, graph, rotation, maps, gauge)
        ours["mid.node_energy_raw"] = ours.pop("energies") * model.energy_divisor
        ours |= wigner(model, graph, rotation)
        compare_all(case, report, esen.shaped(ours, theirs), dtype)
    report.notes.append(oc20.compare_edges(model, graph))


def wigner(model: Any, graph: AtomGraph, rotation: Tensor) -> Tensors:
    """Return the rows that are kept of the first Wigner matrices, and the way back."""
    frame = build_edge_frame(
        graph.edge_vectors()[:4].to(model.dtype), graph.edge_index[:, :4], n_atoms=graph.n_atoms,
        lmax=model.lmax, mmax=model.mmax, rotation=rotation[:4],
    )  # fmt: skip
    back = frame.wigner.mT * degree_rescale(model.lmax, model.mmax).to(model.dtype)
    return {"mid.wigner_first4edges": frame.wigner, "mid.wigner_inv_first4edges": back}


def taps(model: Any, graph: AtomGraph) -> Taps:
    """Return what reads the intermediates of a case; messages are those of the first edges."""
    taps = Taps()
    degrees = [math.isqrt(row) for row in range((model.lmax + 1) ** 2)]
    taps.keep(model.basis, "distance_expansion", FIRST_EDGES)
    taps.read(model.cut, lambda _given, result: {"envelope": result[:FIRST_EDGES, None]})
    taps.keep(model.degree_embedding, "edge_degree_embedding")
    taps.keep(model.norm_out, "final_norm")
    if model.stress is not None:
        taps.read(model.stress.network, lambda _given, y: {"stress_block.node_irreps": y[:, :9, 0]})
    for k, block in enumerate(model.blocks):
        attention, name = block.attention, f"block{k}"
        taps.keep_block(block, name)
        taps.keep(block.norm_1, f"{name}.norm_1")
        taps.keep(block.norm_2, f"{name}.norm_2")
        taps.keep(attention, f"{name}.attn_out")
        taps.keep(block.feed_forward, f"{name}.ffn_out")
        taps.keep(attention.activation, f"{name}.act_out", FIRST_EDGES)
        for number, part in enumerate((attention.first, attention.second), start=1):
            read = first_rows(f"{name}.so2_linear_{number}", FIRST_EDGES, lambda rows: rows)
            taps.read(part, read)
        taps.read(
            attention.first, partial(_shares, f"{name}.alpha_softmax", model, attention, graph)
        )
        radial = partial(_radial, f"{name}.rad_func_out", degrees if model.shared_radial else None)
        taps.read(attention.radial, radial)
    return taps


def _shares(
    name: str, model: Any, attention: Any, graph: AtomGraph, _given: tuple, y: Any
) -> Tensors:
    """Return the attention weights in front of the second envelope."""
    logits = attention.logits(y[1].split(attention.n_scalars, dim=1)[0])
    lengths = graph.edge_vectors().norm(dim=1).to(logits)
    envelope = None if model.cut is None else model.cut(lengths)
    epsilon, target = attention.weighing.epsilon, graph.edge_index[1]
    return {name: relative_softmax(logits, envelope, target, graph.n_atoms, epsilon)}


def _radial(name: str, degrees: list[int] | None, _given: tuple, y: Tensor) -> Tensors:
    """Return radial weights, for every row of a degree where its rows share them."""
    y = y[:FIRST_EDGES]
    return {name: y if degrees is None else y.unflatten(1, (degrees[-1] + 1, -1))[:, degrees]}
