"""Analytic potentials for the laws of motion: quick, smooth, and with averages known by heart."""

import torch
from ase import Atoms
from torch import nn

from atomeq.models.base import AtomisticModel
from atomeq.ops.segment import segment_sum
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences


class Pairs(AtomisticModel):
    """A Morse well between all pairs, brought smoothly to zero at the cutoff."""

    def __init__(
        self, cutoff: float = 5.0, *, depth: float = 0.4, distance: float = 2.5, width: float = 1.4
    ) -> None:
        super().__init__()
        self.cutoff, self.distance, self.width = cutoff, distance, width
        self.depth = nn.Parameter(torch.tensor(depth, dtype=torch.float64))

    def forward(self, graph):
        lengths = torch.linalg.vector_norm(graph.edge_vectors(), dim=1)
        decay = torch.exp(-self.width * (lengths - self.distance))
        inside = (1 - (lengths / self.cutoff) ** 2).clamp(min=0) ** 3
        energy = self.depth * (decay**2 - 2 * decay) * inside / 2
        return {"energies": segment_sum(energy, graph.edge_index[1], graph.n_atoms)}


class Tethers(AtomisticModel):
    """Every atom on a spring to a point that depends on its number; no forces between atoms."""

    def __init__(self, cutoff: float = 1.0, *, stiffness: float = 1.0) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.stiffness = nn.Parameter(torch.tensor(stiffness, dtype=torch.float64))

    def forward(self, graph):
        anchor = 3.0 * graph.atomic_numbers[:, None].to(graph.pos.dtype)
        return {"energies": self.stiffness / 2 * (graph.pos - anchor).square().sum(dim=1)}


class Gas(AtomisticModel):
    """No interaction at all."""

    def __init__(self, cutoff: float = 0.5) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.zero = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, graph):
        return {"energies": self.zero * graph.pos[:, 0]}


def pair_potential(**options: float) -> Potential:
    return Potential(Pairs(**options)).requires_grad_(False).eval()


def fcc(*, repeat=(1, 1, 1), seed=0, rattle=0.1, a=3.7) -> Atoms:
    from ase.build import bulk

    atoms = bulk("Cu", cubic=True, a=a).repeat(repeat)
    atoms.rattle(rattle, seed=seed)
    return atoms


def cluster(n_atoms: int, seed: int = 0) -> Atoms:
    """A rattled piece of fcc without cell."""
    atoms = fcc(repeat=(2, 2, 2), seed=seed, rattle=0.15, a=3.6)[:n_atoms]
    return Atoms(atoms.numbers, atoms.positions)


__all__ = ["AtomicReferences", "Gas", "Pairs", "Tethers", "cluster", "fcc", "pair_potential"]
