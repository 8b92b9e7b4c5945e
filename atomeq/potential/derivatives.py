"""Forces, stress, Hessian and Born effective charges: all of autograd.grad above ``ops/``.

Both come from one backward pass through a symmetric strain ε of the structure
(r -> r (1 + ε), cell -> cell (1 + ε)):  F = -dE/dr,  σ = (1/V) dE/dε.
Forces are taken with respect to the unstrained positions, which are the same at ε = 0.

Derivatives leave ``torch.inference_mode()``, where autograd records nothing, by themselves.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from atomeq.graph.atom_graph import MIN_VOLUME, AtomGraph
from atomeq.typing import PropertyKey


class ForceField(Protocol):
    """What gives differentiable forces: a Potential."""

    def __call__(
        self, graph: AtomGraph, properties: tuple[PropertyKey, ...], *, create_graph: bool
    ) -> dict[PropertyKey, Tensor]:
        """Return the properties of a batch."""
        ...


def energy_and_derivatives(
    evaluate: Callable[[AtomGraph], dict[PropertyKey, Tensor]],
    graph: AtomGraph,
    *,
    forces: bool = True,
    stress: bool = False,
    create_graph: bool = False,
) -> dict[PropertyKey, Tensor]:
    """Evaluate an energy model and derive forces and stress from its energy.

    Args:
        evaluate: Maps a graph to properties among which is ``energy`` (n_graphs,), eV.
        graph: The structures; not modified. Where ``graph.pos`` already requires grad it is
            differentiated itself (for Hessians), else a detached copy is.
        forces: Derive ``forces`` (n_atoms, 3), eV/Å.
        stress: Derive ``stress`` (n_graphs, 3, 3), eV/Å³, ASE's sign; of cells with a volume, which
            is for the caller to know (:func:`refuse_flat_cells`).
        create_graph: Keep the derivatives differentiable, as training on forces needs.

    Returns:
        The properties of ``evaluate`` with forces and stress beside them.

    Raises:
        ValueError: The energy of structures with edges does not depend on their positions.
    """
    properties, gradients = energy_and_gradients(
        evaluate, graph, forces=forces, strain=stress, create_graph=create_graph
    )
    if forces:
        properties["forces"] = -gradients.pop(0)
    if stress:
        properties["stress"] = gradients.pop(0) / graph.volume()[:, None, None]
    return properties


def energy_and_gradients(
    evaluate: Callable[[AtomGraph], dict[PropertyKey, Tensor]],
    graph: AtomGraph,
    *,
    forces: bool = True,
    strain: bool = False,
    create_graph: bool = False,
) -> tuple[dict[PropertyKey, Tensor], list[Tensor]]:
    """Evaluate an energy model and differentiate its energy, looking at no value on the way.

    Args:
        evaluate: As in :func:`energy_and_derivatives`.
        graph: The structures, with or without a volume; not modified.
        forces: Differentiate by positions.
        strain: Differentiate by a symmetric strain.
        create_graph: Keep the derivatives differentiable.

    Returns:
        The properties of ``evaluate``, and those asked for of dE/dr (n_atoms, 3), eV/Å, and dE/dε
        (n_graphs, 3, 3), eV.
    """
    with torch.inference_mode(False), torch.enable_grad():
        graph, positions = _with_positions(graph)
        deformed, inputs = graph.replace(pos=positions), [positions] * forces
        if strain:
            inputs.append(torch.zeros_like(graph.cell).requires_grad_())
            deformed = deformed.strained(inputs[-1])
        properties = evaluate(deformed)
        gradients = _gradients(properties["energy"], inputs, graph, create_graph=create_graph)
    if not create_graph:
        for key, value in properties.items():
            properties[key] = value.detach()
    return properties, gradients


def with_born_effective_charges(
    evaluate: Callable[[AtomGraph], dict[PropertyKey, Tensor]],
    graph: AtomGraph,
    *,
    create_graph: bool = False,
) -> dict[PropertyKey, Tensor]:
    """Evaluate a model and derive how the dipole changes with the positions of the atoms.

    Args:
        evaluate: Maps a graph to properties among which is ``dipole`` (n_graphs, 3), e·Å.
        graph: The structures; not modified.
        create_graph: Keep everything differentiable.

    Returns:
        The properties of ``evaluate`` and beside them ``born_effective_charges``, (n_atoms, 3, 3),
        e: [i, a, b] is dμ_a / dr_ib.
    """
    with torch.inference_mode(False), torch.enable_grad():
        graph, positions = _with_positions(graph)
        properties = evaluate(graph.replace(pos=positions))
        rows = [
            _gradients(component, [positions], graph, create_graph=create_graph, retain_graph=True)
            for component in properties["dipole"].unbind(dim=1)
        ]
        properties["born_effective_charges"] = torch.stack([row[0] for row in rows], dim=1)
    return properties if create_graph else {key: x.detach() for key, x in properties.items()}


def force_constants(potential: ForceField, graph: AtomGraph, *, max_edges: int) -> Tensor:
    """Return the Hessian of the energy of one structure, exact and symmetrised.

    The structure is repeated in a batch, so that one backward pass gives a row of the Hessian for
    every replica: vector-Jacobian products in parallel, whatever the model is made of.

    Args:
        potential: With forces that are derivatives of its energy.
        graph: One structure with its edges; not modified.
        max_edges: Limits the number of replicas, at least one.

    Returns:
        (3 n_atoms, 3 n_atoms), eV/Å².
    """
    size = 3 * graph.n_atoms
    n_replicas = max(1, min(size, max_edges // max(graph.n_edges, 1)))
    with torch.inference_mode(False), torch.enable_grad():
        hessian = torch.zeros(size, size, dtype=torch.float64, device=graph.pos.device)
        replicas = AtomGraph.concatenate([_differentiable(graph)] * n_replicas)
        positions = replicas.pos.detach().requires_grad_()
        replicas = replicas.replace(pos=positions)
        forces = potential(replicas, ("forces",), create_graph=True)["forces"]
        for start in range(0, size, n_replicas):
            rows = torch.arange(start, min(start + n_replicas, size), device=positions.device)
            directions = torch.zeros_like(forces).reshape(n_replicas, size)
            directions[rows - start, rows] = -1.0
            (gradient,) = _gradients(
                forces,
                [positions],
                replicas,
                along=directions.reshape(forces.shape),
                retain_graph=start + n_replicas < size,
            )
            hessian[rows] = gradient.reshape(n_replicas, size)[: len(rows)].to(hessian)
    return (hessian + hessian.T) / 2


def _with_positions(graph: AtomGraph) -> tuple[AtomGraph, Tensor]:
    """Return a graph that autograd can use, and positions to differentiate by."""
    graph = _differentiable(graph)
    return graph, graph.pos if graph.pos.requires_grad else graph.pos.detach().requires_grad_()


def _differentiable(graph: AtomGraph) -> AtomGraph:
    """Return a graph that autograd can use: clones in place of what inference mode made."""
    made = {name: value.clone() for name, value in vars(graph).items() if value.is_inference()}
    return graph.replace(**made) if made else graph


def _gradients(
    values: Tensor,
    inputs: list[Tensor],
    graph: AtomGraph,
    *,
    along: Tensor | None = None,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> list[Tensor]:
    """Return the derivatives of values, summed or along a direction, by each input.

    Structures without edges depend on no position and no strain, and give zeros.

    Raises:
        ValueError: The values do not depend on an input though there are edges.
    """
    gradients = pulled_back(
        values, inputs, along, create_graph=create_graph, retain_graph=retain_graph
    )
    found, unreached = [], False
    for gradient, x in zip(gradients, inputs, strict=True):
        unreached = unreached or gradient is None
        found.append(torch.zeros_like(x) if gradient is None else gradient)
    if unreached and graph.n_edges:
        raise ValueError(
            f"the model's energy does not depend on the positions of {graph.n_atoms} atoms with "
            f"{graph.n_edges} edges, so its derivatives would be zero without being so: somewhere "
            "it leaves autograd (detach, no_grad, numpy); keep it differentiable"
        )
    return found


def pulled_back(
    values: Tensor,
    inputs: list[Tensor],
    along: Tensor | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> Sequence[Tensor | None]:
    """Return the derivatives of values, summed or along a direction, or None where there is none.

    Args:
        values: Of any shape.
        inputs: By which to differentiate.
        along: The direction, like ``values``.
        create_graph: As of ``torch.autograd.grad``.
        retain_graph: Likewise.
    """
    if not values.requires_grad:
        return [None] * len(inputs)
    direction = torch.ones_like(values) if along is None else along
    return torch.autograd.grad(
        values,
        inputs,
        direction,
        create_graph=create_graph,
        retain_graph=retain_graph,
        allow_unused=True,
    )


def refuse_flat_cells(graph: AtomGraph) -> None:
    """Raise ``ValueError`` naming the first structure whose cell has no volume."""
    flat = (graph.volume() < MIN_VOLUME).tolist()  # a device is asked but once
    if any(flat):
        raise ValueError(
            f"stress needs a cell with a volume, and structure {flat.index(True)} of this batch "
            "has none; give it three cell vectors or ask for energy and forces only"
        )
