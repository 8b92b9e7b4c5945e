"""Directions and frames of single atoms, smooth in the positions, that turn along with them.

A direction of an atom is that of a neighbour; a frame is spanned by two neighbours. Weights end at
a cutoff and where two neighbours lie in line, so sums over directions, and means over frames, are
smooth while neighbours come, go and become equivalent: Pozdnyakov and Ceriotti, Smooth, exact
rotational symmetrization for deep learning on point clouds, NeurIPS 2023, arXiv:2305.19302.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atomeq.typing import EdgeVectors


class Directions(NamedTuple):
    """Directions of each atom, the first of them zero: that of no neighbour.

    Attributes:
        vectors: Unit vectors, or zero, (n_atoms, n_directions, 3).
        weights: In sums over the directions of an atom, (n_atoms, n_directions); 0 where it has
            fewer than others.
        edge: To which edge each belongs, (n_atoms, n_directions); -1 to none.
    """

    vectors: Float[Tensor, "n_atoms n_directions 3"]
    weights: Float[Tensor, "n_atoms n_directions"]
    edge: Int[Tensor, "n_atoms n_directions"]

    @property
    def present(self) -> Bool[Tensor, "n_atoms n_directions"]:
        """Which directions are those of neighbours."""
        return self.edge >= 0


def neighbour_directions(
    units: EdgeVectors, target: Tensor, weights: Tensor, n_atoms: int
) -> Directions:
    """Return the directions to all neighbours that have a weight.

    Args:
        units: From targets to sources, of length 1, (n_edges, 3).
        target: (n_edges,).
        weights: Zero from some distance on, (n_edges,).
        n_atoms: Number of atoms.
    """
    near = torch.nonzero(weights.detach() > 0)[:, 0]
    near = near[torch.argsort(target[near], stable=True)]
    atom = target[near]
    counts = torch.bincount(atom, minlength=n_atoms)
    number = torch.arange(len(near), device=near.device) - (counts.cumsum(0) - counts)[atom]
    n_slots = 1 + (int(counts.max()) if n_atoms else 0)
    slot = atom * n_slots + 1 + number
    edge = near.new_full((n_atoms * n_slots,), -1).index_put((slot,), near)
    shares = weights.new_zeros(n_atoms * n_slots).index_put((slot,), weights.index_select(0, near))
    first = torch.arange(0, n_atoms * n_slots, n_slots, device=near.device)
    shares = shares.index_fill(0, first, 1.0)
    vectors = units.new_zeros(n_atoms * n_slots, 3)
    vectors = vectors.index_put((slot,), units.index_select(0, near))
    return Directions(
        vectors.view(n_atoms, n_slots, 3),
        shares.view(n_atoms, n_slots),
        edge.view(n_atoms, n_slots),
    )
