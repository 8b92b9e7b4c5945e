"""Analytic potentials for the laws of motion: quick, smooth, and with averages known by heart."""

import torch
from ase import Atoms
from ase.build import bulk
from torch import nn

from atomeq.models.base import AtomisticModel
from atomeq.ops.segment.operations import segment_sum
from atomeq.potential.potential import Potential


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
    """Every atom on a spring to the origin; no forces between atoms, and no edges."""

    def __init__(self, cutoff: float = 1e-3, *, stiffness: float = 1.0) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.stiffness = nn.Parameter(torch.tensor(stiffness, dtype=torch.float64))

    def forward(self, graph):
        return {"energies": self.stiffness / 2 * graph.pos.square().sum(dim=1)}


class Gas(AtomisticModel):
    """No interaction at all, and no edges: atoms may pass through each other."""

    def __init__(self, cutoff: float = 1e-3) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.zero = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, graph):
        return {"energies": self.zero * graph.pos[:, 0]}


class Pass(AtomisticModel):
    """Wells at x = -1 and 1 Å, and between them at x = 0, y = 1 Å a pass of known height, eV."""

    def __init__(self, cutoff: float = 1e-3, *, height: float = 0.5) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.height = nn.Parameter(torch.tensor(height, dtype=torch.float64))

    def forward(self, graph):
        x, y, z = graph.pos.T
        along, across = (x**2 - 1) ** 2, (y - (1 - x**2)) ** 2 + z**2
        return {"energies": self.height * along + 2 * across}


class Trap(Pairs):
    """Pairs, with NaN for a structure of which an atom came above z = 100 Å."""

    def forward(self, graph):
        energies = super().forward(graph)["energies"]
        return {"energies": torch.where(graph.pos[:, 2] > 100, torch.nan, energies)}


def of(model: AtomisticModel) -> Potential:
    return Potential(model).requires_grad_(False).eval()


def crystal(*, repeat=(1, 1, 1), seed=0, a=3.6) -> Atoms:
    atoms = bulk("Cu", cubic=True, a=a).repeat(repeat)
    atoms.set_cell(atoms.cell.array @ [[1, 0.03, 0], [0, 1.01, 0.02], [0.01, 0, 0.98]], True)
    atoms.rattle(0.08, seed=seed)
    return atoms


def cluster(n_atoms: int, seed: int = 0) -> Atoms:
    """A rattled piece of fcc without cell."""
    atoms = bulk("Cu", cubic=True, a=3.6).repeat(2)
    atoms.rattle(0.15, seed=seed)
    return Atoms(atoms.numbers[:n_atoms], atoms.positions[:n_atoms])
