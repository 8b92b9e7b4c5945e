"""Golden checks of eSEN, direct and conservative."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from atomeq.ops.segment.operations import segment_sum
from atomeq.potential.derivatives import energy_and_gradients
from atomeq.potential.official_esen import ESEN
from atomeq.potential.official_names import build_official, official_weights
from checkers import materials, oc20
from checkers.cases import Case, FolderCase, Tensors, compare_all
from checkers.oc20 import FIRST_EDGES
from checkers.report import Report
from checkers.roll import Maps, reference_rotation, rolling
from checkers.taps import Taps, first_rows


def handles(case: Case) -> bool:
    """Say whether a case belongs here."""
    if case.model != "hydra" or not isinstance(case, FolderCase):
        return False
    return str(case.config["backbone"]["model"]).rpartition(".")[2] in ESEN.names


def check(case: FolderCase, report: Report) -> None:
    """Check a case in float64 and float32, and the edges that our builder finds."""
    model: Any = build_official(case.model, case.config)
    model.double()
    model.load_state_dict(official_weights(model, case.weights()))
    model.eval().requires_grad_(False)
    graph = case.graph()
    for dtype in case.tolerances:
        theirs = case.expected(dtype)
        rotation = theirs.get("in.edge_rot_mat", case.inputs["edge_rot_mat"])
        with taps(model.to(dtype)) as found, materials.watch_stress(model) as of_stress:
            maps = [(block.message.first, block.message.second) for block in model.blocks]
            ours = outputs(model, graph, rotation, maps, case.document.get("gauge_u"))
        ours |= found | of_stress
        ours["mid.node_energy_raw"] = ours.pop("energies")
        if model.energy_reduce == "mean":
            ours["mid.node_energy_raw"] *= graph.natoms[graph.batch][:, None]
        ours["mid.wigner_first4edges"] = oc20.full_wigner(
            model, graph, rotation, (model.lmax + 1) ** 2
        )
        compare_all(case, report, shaped(ours, theirs), dtype)
    report.notes.append(oc20.compare_edges(model, graph))


def outputs(
    model: Any, graph: AtomGraph, rotation: Tensor, maps: Maps, gauge: Sequence[float] | None
) -> Tensors:
    """Return what the model gives, and derivatives of its energy where it has no head.

    Args:
        model: With its weights.
        graph: The structures.
        rotation: Of the edges, with the reference's roll.
        maps: What is between them sees the roll, unless it is a gate or a product.
        gauge: What the reference made the roll of, where the case says it.
    """
    given: Tensors = {}
    sees_roll = model.activation not in ("gate", "product") and gauge is not None

    def evaluate(deformed: AtomGraph) -> dict[Any, Tensor]:
        frames = rotation.to(model.dtype)
        with rolling(maps if sees_roll else [], model.lmax, model.mmax) as follow:
            if sees_roll:
                follow(reference_rotation(deformed.edge_vectors().to(model.dtype), gauge))
            given.update(model(deformed, edge_rotation=frames))
        return {"energy": segment_sum(given["energies"], graph.batch, graph.n_graphs)}

    if "forces" in model.outputs:
        energy = evaluate(graph)["energy"]
    else:
        properties, (gradient, strain) = energy_and_gradients(evaluate, graph, strain=True)
        energy = properties["energy"]
        given["forces"] = -gradient
        if bool((graph.volume() > 0).all()):
            given["stress"] = strain / graph.volume()[:, None, None]
    given = {f"out.{name}": tensor.detach() for name, tensor in given.items()}
    return {"energies": given.pop("out.energies")[:, None], **given, "out.energy": energy}


def shaped(ours: Tensors, theirs: Tensors) -> Tensors:
    """Return ours in the shapes of theirs: a stress is nine numbers there."""
    return {
        name: tensor.reshape(theirs[name].shape)
        for name, tensor in ours.items()
        if name in theirs and tensor.numel() == theirs[name].numel()
    }


def taps(model: Any) -> Taps:
    """Return what reads the intermediates of a case."""
    taps = Taps()
    taps.keep(model.basis, "distance_expansion", FIRST_EDGES)
    taps.keep(model.norm_out, "final_norm")
    for k, block in enumerate(model.blocks):
        taps.keep_block(block, f"block{k}")
        taps.keep(block.message_norm, f"block{k}.norm_1")
        taps.keep(block.update_norm, f"block{k}.norm_2")
        taps.keep(block.message, f"block{k}.edge_wise_out")
        taps.keep(block.update, f"block{k}.atom_wise_out")
        for number, part in enumerate((block.message.first, block.message.second), start=1):
            order = partial(oc20.by_degree, lmax=model.lmax, mmax=model.mmax)
            taps.read(part, first_rows(f"block{k}.so2_conv_{number}", FIRST_EDGES, order))
    return taps
