"""Forces, stress and Hessian as derivatives of the energy: all of autograd.grad above ``ops/``.

Both come from one backward pass through a symmetric strain ε of the structure
(r -> r (1 + ε), cell -> cell (1 + ε)):  F = -dE/dr,  σ = (1/V) dE/dε.
Forces are taken with respect to the unstrained positions, which are the same at ε = 0.
"""

from collections.abc import Callable
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
        stress: Derive ``stress`` (n_graphs, 3, 3), eV/Å³, ASE's sign.
        create_graph: Keep the derivatives differentiable, as training on forces needs.

    Returns:
        The properties of ``evaluate`` with forces and stress beside them.

    Raises:
        ValueError: Stress is asked of a structure whose cell has no volume.
    """
    if stress:
        refuse_flat_cells(graph)
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
    with torch.enable_grad():
        positions = graph.pos if graph.pos.requires_grad else graph.pos.detach().requires_grad_()
        deformation = graph.cell.new_zeros(graph.n_graphs, 3, 3).requires_grad_(strain)
        deformed = graph.replace(pos=positions)
        if strain:
            deformed = deformed.strained(deformation)
        properties = evaluate(deformed)
        inputs = [positions] * forces + [deformation] * strain
        gradients = list(_gradients(properties["energy"], inputs, create_graph=create_graph))
    if not create_graph:
        for key, value in properties.items():
            properties[key] = value.detach()
    return properties, gradients


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
    replicas = AtomGraph.concatenate([graph] * n_replicas)
    positions = replicas.pos.detach().requires_grad_()
    replicas = replicas.replace(pos=positions)
    with torch.enable_grad():
        forces = potential(replicas, ("forces",), create_graph=True)["forces"]
    hessian = torch.zeros(size, size, dtype=torch.float64, device=positions.device)
    if not forces.requires_grad:  # no edges, no forces
        return hessian
    for start in range(0, size, n_replicas):
        rows = torch.arange(start, min(start + n_replicas, size), device=positions.device)
        directions = torch.zeros_like(forces).reshape(n_replicas, size)
        directions[rows - start, rows] = -1.0
        gradient = torch.autograd.grad(
            forces,
            positions,
            directions.reshape(forces.shape),
            retain_graph=start + n_replicas < size,
            materialize_grads=True,
        )[0]
        hessian[rows] = gradient.reshape(n_replicas, size)[: len(rows)].to(hessian)
    return (hessian + hessian.T) / 2


def _gradients(energy: Tensor, inputs: list[Tensor], *, create_graph: bool) -> tuple[Tensor, ...]:
    """Return dE/dx for each input; structures without edges do not depend on any and give zeros."""
    if not energy.requires_grad:
        return tuple(torch.zeros_like(x) for x in inputs)
    return torch.autograd.grad(
        energy.sum(), inputs, create_graph=create_graph, materialize_grads=True
    )


def refuse_flat_cells(graph: AtomGraph) -> None:
    """Raise ``ValueError`` naming the first structure whose cell has no volume."""
    flat = torch.nonzero(graph.volume() < MIN_VOLUME).flatten().tolist()
    if flat:
        raise ValueError(
            f"stress needs a cell with a volume, and structure {flat[0]} of this batch has none; "
            "give it three cell vectors or ask for energy and forces only"
        )
