"""What each process of several computes of one structure: the energies of its own atoms.

They depend on the atoms within so many edges as the model declares, its receptive depth, and on no
other: the rest of the structure is left out. Energies, and their derivatives by all atoms that they
depend on, add up to those of the whole.
"""

import torch
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from atomeq.ops.precision import use_precision
from atomeq.potential.blocks import energies_in_blocks
from atomeq.potential.derivatives import energy_and_gradients
from atomeq.potential.potential import Potential
from atomeq.potential.predictor import full_precision
from atomeq.typing import PropertyKey


def refuse_shares(potential: Potential) -> None:
    """Raise ``ValueError`` where the energies of some atoms are no share of the whole."""
    model = type(potential.model).__name__
    if type(potential) is not Potential:
        raise ValueError(
            f"{potential.name!r} is a {type(potential).__name__}, and several processes divide the "
            "network of one potential; run one"
        )
    if potential.receptive_depth is None:
        raise ValueError(
            f"{model} declares no receptive depth: an energy may depend on all of the structure, "
            "which several processes cannot divide; run one"
        )
    if potential.model.told:
        raise ValueError(f"{model} is told of the electrons of a structure, not of a part; run one")
    if not potential.conservative or potential.references.rescales_derivatives:
        raise ValueError(
            f"{model} has forces of its own, and several processes add up derivatives of energies; "
            "run one"
        )


def share(potential: Potential, graph: AtomGraph, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the energy of some atoms of a structure, and its derivatives.

    Args:
        potential: One that :func:`refuse_shares` lets pass.
        graph: The whole structure with all edges.
        own: The atoms, (n_own,).

    Returns:
        Energy (1,) eV, dE/dr (n_atoms, 3) eV/Å and dE/dε (3, 3) eV, float64.
    """
    assert potential.receptive_depth is not None
    forces = torch.zeros_like(graph.pos, dtype=torch.float64)
    if not len(own):
        return forces.new_zeros(1), forces, forces.new_zeros(3, 3)
    part, atoms, within = surroundings(graph, own, potential.receptive_depth)
    potential.warn_of_distances(part)

    def evaluate(deformed: AtomGraph) -> dict[PropertyKey, Tensor]:
        n_own, numbers = within[0], part.atomic_numbers
        if potential.model.stages() and part.pos.device.type == "cpu":  # each of fewer atoms
            wanted = within[: len(potential.model.stages())][::-1]
            energies = energies_in_blocks(potential.model, deformed, wanted)
        else:
            energies = potential.model(deformed)["energies"][:n_own]
        energies = potential.references(energies, numbers[:n_own])
        for term in potential.terms:
            energies = energies + term(deformed)[:n_own]
        return {"energy": energies.sum()[None]}

    with full_precision(graph.pos.device), use_precision(potential.precision):
        computed, (by_position, by_strain) = energy_and_gradients(evaluate, part, strain=True)
    return computed["energy"], forces.index_copy(0, atoms, by_position), by_strain[0]


def surroundings(graph: AtomGraph, own: Tensor, depth: int) -> tuple[AtomGraph, Tensor, list[int]]:
    """Return the part of a structure that the energies of some atoms depend on.

    Args:
        graph: One structure with its edges.
        own: The atoms, (n_own,).
        depth: Edges to the farthest atom that they depend on.

    Returns:
        Those atoms first, behind them the others by their distance in edges, with the edges that
        end at none of the farthest, which are of no use; the numbers of its atoms in the whole,
        (n_part,); and how many are within 0, 1, ... ``depth`` edges.
    """
    source, target = graph.edge_index
    hops = torch.full_like(graph.atomic_numbers, depth + 1)
    hops[own] = 0
    for hop in range(depth):
        reached = source[hops[target] <= hop]
        hops[reached] = hops[reached].clamp(max=hop + 1)
    atoms = torch.cat([own, *(torch.nonzero(hops == hop)[:, 0] for hop in range(1, depth + 1))])
    within = torch.bincount(hops, minlength=depth + 1)[: depth + 1].cumsum(0).tolist()
    place = torch.full_like(hops, -1).index_copy(0, atoms, torch.arange(len(atoms)).to(atoms))
    edges = torch.nonzero(hops[target] < depth)[:, 0]
    edges = edges[torch.argsort(place[target[edges]], stable=True)]  # edges are sorted by target
    part = AtomGraph(
        graph.pos[atoms],
        graph.atomic_numbers[atoms],
        cell=graph.cell,
        pbc=graph.pbc,
        edge_index=place[graph.edge_index[:, edges]],
        cell_offsets=graph.cell_offsets[edges],
    )
    return part, atoms, within
