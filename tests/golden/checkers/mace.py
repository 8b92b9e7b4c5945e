"""Golden checks of MACE: outputs, virials and features of the reference implementation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.mace import MACE
from atomeq.potential.derivatives import energy_and_gradients
from atomeq.potential.import_mace import mace_potential
from atomeq.potential.potential import Potential
from checkers.cases import Case, FolderCase, Tensors, compare_all
from checkers.report import Report

# The stress is the virials by a volume, which the reference makes up for molecules; the energy of
# interaction is what the atoms' energies leave of the energy.
CONTAINED = ("out.stress", "out.interaction_energy")


def handles(case: Case) -> bool:
    """Say whether a case is of MACE."""
    return case.model in ("MACE", "ScaleShiftMACE")


def check(case: FolderCase, report: Report) -> None:
    """Check a case in float64 and float32, for its stress the virials and for two energies one."""
    for dtype in case.tolerances:
        compare_all(case, report, compute(case, dtype), dtype, without=CONTAINED)


def case_potential(case: FolderCase, head: int, dtype: torch.dtype) -> Potential:
    """Return the potential of a case, for one of its heads."""
    config = case.config
    first, other = config["interaction_cls_first"], config["interaction_cls"]
    options = {
        "interactions": [first] + [other] * (config["num_interactions"] - 1),
        "avg_num_neighbors": config["avg_num_neighbors"],
        "heads": config["heads"],
        "apply_cutoff": config["apply_cutoff"],
        "distance_transform": config["distance_transform"],
    }
    state = case.weights()  # float32, these are float64 there
    for name in ("scale", "shift"):
        if config[name] is not None:
            state[f"scale_shift.{name}"] = torch.tensor(config[name], dtype=torch.float64)
    energies = torch.tensor(config["atomic_energies"], dtype=torch.float64)
    state["atomic_energies_fn.atomic_energies"] = energies
    potential = mace_potential(options, state, head=config["heads"][head]).to(dtype)
    model: Any = potential.model
    if model.radii is not None and dtype == torch.float64:  # made in float32 on the way
        model.radii.copy_(model.radii.mul(100).round().div(100))
    return potential


def compute(case: FolderCase, dtype: torch.dtype) -> Tensors:
    """Return outputs and intermediates under the names of the case; heads structure by structure.

    Intermediates are those of the first head, which the features do not depend on.
    """
    graph, heads = case.graph(), case.document["structure_heads"]
    found: Tensors = {}
    for head in sorted(set(heads)):
        potential = case_potential(case, head, dtype)
        result = _of_head(potential, graph)
        of_graph = torch.tensor([h == head for h in heads])
        of_atom = of_graph[graph.batch]
        for key, value in result.items():
            if key not in found:
                found[key] = value.clone()
            elif key.startswith("out."):
                own = of_graph if len(value) == graph.n_graphs else of_atom
                found[key][own] = value[own]
    return found


def _of_head(potential: Potential, graph: AtomGraph) -> Tensors:
    model: Any = potential.model
    found: Tensors = {}
    hooks = []

    def watch(module: torch.nn.Module, read: Callable[[Any], Tensors]) -> None:
        hooks.append(module.register_forward_hook(lambda _m, _x, y: found.update(read(y))))

    watch(model.embedding, lambda y: {"mid.node_embedding": flat(y)})
    for k, layer in enumerate(model.layers):
        name = f"mid.interactions.{k}"
        watch(layer.interaction.up, lambda y, name=name: {f"{name}.linear_up": flat(y)})
        watch(layer.interaction, lambda y, name=name, layer=layer: _sums(model, layer, name, y))
        watch(layer, lambda y, k=k: {f"mid.products.{k}": flat(y)})
    properties, (gradient, strain) = energy_and_gradients(potential.evaluate, graph, strain=True)
    for hook in hooks:
        hook.remove()
    edges, _ = model._edges(graph)
    found |= {"mid.edge_attrs": edges.harmonics, "mid.edge_feats": edges.radial}
    found["out.energy"] = properties["energy"]
    found["out.node_energy"] = properties["energies"]
    found["out.forces"], found["out.virials"] = -gradient, -strain
    return {key: value.detach() for key, value in found.items()}


def _sums(model: MACE, layer: Any, name: str, result: tuple) -> Tensors:
    sums, skip = result
    rows = torch.cat([sums[irrep] for irrep in model.target], dim=1)
    found = {name: rows.transpose(1, 2)}
    if skip:
        n_atoms = len(rows)
        full = {
            irrep: skip.get(irrep, rows.new_zeros(n_atoms, 2 * irrep.l + 1, channels))
            for irrep, channels in layer.product.linear.outputs.items()
        }
        found[f"{name}.sc"] = flat(full)
    return found


def flat(features: dict[Any, Tensor]) -> Tensor:
    """Return features as the reference has them: all m of a channel side by side."""
    return torch.cat([y.transpose(1, 2).flatten(1) for y in features.values()], dim=1)
