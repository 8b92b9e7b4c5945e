"""Golden checks of SevenNet: outputs and features of each layer, modality by modality."""

from typing import Any

import torch
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from atomeq.nn.irreps import Features
from atomeq.potential.import_sevennet import sevennet_potential
from checkers.cases import Case, FolderCase, Tensors, compare_all
from checkers.report import Report

MODEL = "E3_equivariant_model (SevenNet/NequIP)"


def handles(case: Case) -> bool:
    """Say whether a case is of SevenNet."""
    return case.model == MODEL


def check(case: FolderCase, report: Report) -> None:
    """Check a case in float64 and float32; the stress only where every structure has one."""
    without = [] if all(case.document["stress_valid"]) else ["out.stress"]
    for dtype in case.tolerances:
        theirs, ours = case.expected(dtype), outputs(case, dtype)
        ours |= {key: ours[key].reshape(theirs[key].shape) for key in ours.keys() & theirs.keys()}
        compare_all(case, report, ours, dtype, without=without)


def outputs(case: FolderCase, dtype: torch.dtype) -> Tensors:
    """Return our outputs and intermediates under the names of the case."""
    state, graph = case.weights(), case.graph()
    modalities = case.document["modalities"] or [None] * graph.n_graphs
    found: Tensors = {}
    for modal in dict.fromkeys(modalities):  # a potential knows one; the batch is put together
        own = compute(case, state, graph, dtype, modal)
        chosen = torch.tensor([m == modal for m in modalities])
        for name, tensor in own.items():
            rows = chosen if len(tensor) == graph.n_graphs else chosen[graph.batch]
            if len(tensor) not in (graph.n_graphs, graph.n_atoms):
                found[name] = tensor  # of edges, which know no modality
                continue
            found.setdefault(name, torch.full_like(tensor, torch.nan))[rows] = tensor[rows]
    return found


def compute(
    case: FolderCase, state: Tensors, graph: AtomGraph, dtype: torch.dtype, modal: str | None
) -> Tensors:
    """Compute the whole batch with the potential of one modality."""
    potential = sevennet_potential(case.config, state, modal=modal).to(dtype)
    model: Any = potential.model
    found: Tensors = {}

    def keep(name: str) -> Any:
        return lambda module, given, result: found.__setitem__(f"mid.{name}", flat(result))

    hooks = [model.embedding.register_forward_hook(keep("node_embedding"))]
    for t, layer in enumerate(model.layers):
        hooks.append(layer.register_forward_hook(keep(f"block{t}.out")))
        if t < 2:
            hooks.append(layer.intro.register_forward_hook(keep(f"block{t}.self_interaction_1")))
            hooks.append(layer.outro.register_forward_hook(keep(f"block{t}.self_interaction_2")))
    properties = ["energy", "energies", "forces"]
    if all(case.document["stress_valid"]):
        properties.append("stress")
    found |= {f"out.{name}": value for name, value in potential(graph, properties).items()}
    for hook in hooks:
        hook.remove()
    found["mid.node_energy_raw"] = model(graph)["energies"]
    if model.element_scale is not None:
        found["mid.node_energy_raw"] /= model.element_scale[model.index[graph.atomic_numbers]]
    return {name: tensor.detach() for name, tensor in found.items()}


def flat(features: Features) -> Tensor:
    """Return features as the cases have them: entry after entry, m fastest."""
    return torch.cat([x.transpose(1, 2).flatten(1) for x in features.values()], dim=1)
