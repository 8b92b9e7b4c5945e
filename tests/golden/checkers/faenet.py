"""Golden checks of FAENet as published, frame averages included."""

import torch
from published.faenet import published
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.faenet import FAENet
from atomeq.models.frame_averaged import FrameAveraged
from atomeq.ops.segment.operations import segment_sum
from checkers.cases import Case, FileCase, Tensors, compare_all, gradients, probe_loss
from checkers.report import Report

PROPERTIES = "embed_block.phys_emb.properties"


def handles(case: Case) -> bool:
    """Say whether a case belongs here."""
    return case.family == "faenet"


def check(case: FileCase, report: Report) -> None:
    """Check a case in float64 and float32."""
    for dtype in case.tolerances:
        model = published(case.config)
        load(model, case, report)
        model = model.to(dtype).eval()
        wanted = case.expected(dtype)
        inputs = case.inputs(dtype)
        inputs["pos"].requires_grad_()
        graph = build_graph(model, inputs)
        found = run(model, graph)
        loss = probe_loss([found[name] for name in case.document["outputs"] if name in found])
        found["out.probe_loss"] = loss
        parameters = {f"gradparam.{n}": p for n, p in model.named_parameters()}
        parameters = {n: p for n, p in parameters.items() if n in wanted}
        found |= gradients(loss, {"grad.in.pos": inputs["pos"]} | parameters)
        pad_properties(found, wanted)
        if "edge_index" not in inputs:
            align_edges(found, wanted)
        frames = {name for name in wanted if name.startswith("mid.fa")}
        found |= averaged(model, graph, frames, report, wanted)
        compare_all(case, report, found, dtype)


def load(model: FAENet, case: FileCase, report: Report) -> None:
    """Load the reference's weights; only tables that are no weights may stay behind."""
    weights = case.weights(torch.float32)
    tables = {name: weights.pop(name) for name in list(weights) if ".phys_emb." in name}
    if PROPERTIES in model.state_dict():
        # The reference's last row belongs to Z = 85, which its element embedding does not have.
        weights[PROPERTIES] = tables[PROPERTIES][: model.num_elements]
    elif PROPERTIES in tables:
        ours = model.get_buffer(PROPERTIES)
        if not torch.allclose(ours, tables[PROPERTIES][: len(ours)], rtol=1e-6, atol=1e-12):
            report.fail("the table of element properties differs")
    model.load_state_dict(weights, strict=True)


def build_graph(model: FAENet, inputs: Tensors) -> AtomGraph:
    """Return the graph of a case, with its edges or, where it has none, those of the cutoff."""
    graph = AtomGraph(
        inputs["pos"],
        inputs["atomic_numbers"],
        batch=inputs["batch"],
        **{
            name: inputs[name]
            for name in ("cell", "cell_offsets", "edge_index", "tags")
            if name in inputs
        },
    )
    if "edge_index" in inputs:
        return graph
    edges = model.graph_builder()(graph.replace(pos=graph.pos.detach()))
    return graph.replace(edge_index=edges.edge_index, cell_offsets=edges.cell_offsets)


def run(model: FAENet, graph: AtomGraph) -> Tensors:
    """Return outputs and intermediates by the names of the case."""
    found: Tensors = {}

    def keep(name: str):
        return lambda module, inputs, output: found.__setitem__(name, output)

    hooks = [model.distance_expansion.register_forward_hook(keep("mid.rbf"))]
    hooks.append(
        model.embed_block.register_forward_hook(
            lambda module, inputs, output: found.update(
                {"mid.embed.h": output[0], "mid.embed.e": output[1]}
            )
        )
    )
    for k, block in enumerate(model.interaction_blocks):
        hooks.append(block.register_forward_hook(keep(f"mid.interaction{k}.delta_h")))
    atoms = model.atomwise(graph)
    for hook in hooks:
        hook.remove()
    found["out.energy"] = segment_sum(atoms.energies, graph.batch, graph.n_graphs)
    found["out.hidden_state"] = atoms.hidden
    if atoms.forces is not None:
        found["out.forces"] = atoms.forces
    return found


def averaged(
    model: FAENet, graph: AtomGraph, names: set[str], report: Report, wanted: Tensors
) -> Tensors:
    """Return the frame averages a case has, and compare the frames themselves as a set."""
    found: Tensors = {}
    for stem in {name.rpartition(".")[0] for name in names}:
        kind = stem.removeprefix("mid.fa")  # such as "2D_se3-all"
        wrapper = FrameAveraged(
            model,
            dim=2 if kind.startswith("2D") else 3,
            proper="se3" in kind,
            covariance="positions",
            batched=False,  # the published norm sees the whole batch
        ).eval()
        matrices, weights = wrapper.frames(graph)
        energies = wrapper(graph)["energies"]
        energy = segment_sum(energies, graph.batch, graph.n_graphs)
        found[f"{stem}.energy"] = energy.reshape(wanted[f"{stem}.energy"].shape)
        if f"{stem}.forces" in names:
            found[f"{stem}.forces"] = wrapper(graph)["forces"]
        theirs = wanted[f"{stem}.rot"].to(matrices)
        found[f"{stem}.rot"] = in_their_order(matrices.detach(), theirs)
        if len(matrices.detach().flatten(1).round(decimals=6).unique(dim=0)) != len(matrices):
            report.fail(f"{stem}: two frames are one")
        if len(matrices) != len(theirs) or not bool((weights == weights[0, 0]).all()):
            report.fail(f"{stem}: {len(matrices)} frames, the reference has {len(theirs)}")
    return found


def in_their_order(ours: Tensor, theirs: Tensor) -> Tensor:
    """Sort frames (n_frames, n_graphs, 3, 3) so that each stands where its nearest does.

    The sign of an eigenvector, a column, is the eigensolver's whim, and so is their order.
    """
    signs = (ours[None] * theirs[:, None]).sum(dim=3, keepdim=True).sign()
    turned = ours[None] * signs  # (theirs, ours, n_graphs, 3, 3)
    distance = (turned - theirs[:, None]).abs().amax(dim=(3, 4))
    nearest = distance.argmin(dim=1)[:, None, :, None, None]  # (theirs, 1, n_graphs, 1, 1)
    return torch.gather(turned, 1, nearest.expand(-1, 1, *ours.shape[1:]))[:, 0]


def align_edges(found: Tensors, wanted: Tensors) -> None:
    """Sort what belongs to edges alike: the reference's neighbour search has its own order."""
    for name in ("mid.rbf", "mid.embed.e"):
        theirs = wanted[name].to(found[name])
        order = (found[name].detach()[None] - theirs[:, None]).abs().sum(dim=2).argmin(dim=1)
        if name == "mid.rbf" or len(order.unique()) == len(order):
            found[name] = found[name][order]


def pad_properties(found: Tensors, wanted: Tensors) -> None:
    """Give the gradient of the learned table the reference's row that no atom can reach."""
    name = f"gradparam.{PROPERTIES}"
    if name in found:
        missing = len(wanted[name]) - len(found[name])
        found[name] = torch.nn.functional.pad(found[name], (0, 0, 0, missing))
