"""ZBL: the universal screened repulsion of nuclei, for distances no training data reaches.

J. F. Ziegler, J. P. Biersack and U. Littmark, The Stopping and Range of Ions in Matter (1985).
"""

import math

import torch
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from atomeq.nn.radial import PolynomialEnvelope
from atomeq.ops.segment.operations import segment_sum
from atomeq.ops.tables import constant_table, table_like
from atomeq.potential.distances import COVALENT_RADII
from atomeq.potential.references import MAX_ATOMIC_NUMBER
from atomeq.potential.terms import EnergyTerm
from atomeq.traces import known_to_the_host
from atomeq.units import COULOMB_CONSTANT

_SCREENING_LENGTH = 0.46850  # Å, 0.8854 Bohr radii
_POWER = 0.23
_FEW = 4096  # edges; so few are not sorted out, for a replay has to know all sizes beforehand
_EXPONENT = 6


class ZBL(EnergyTerm):
    """Pair repulsion E = Σ Z_i Z_j e² / r · φ(r / a) · u(r / r_c), switched off at bond lengths.

    φ is Ziegler, Biersack and Littmark's screening function, a = 0.4685 Å / (Z_i^0.23 + Z_j^0.23),
    and u a polynomial with two continuous derivatives that is zero from r_c on, which is the sum of
    the covalent radii times a scale. The edges are those of the potential: its cutoff must be
    longer than r_c.

    Args:
        radius_scale: Of the sum of covalent radii.

    Raises:
        ValueError: The scale is not positive.
    """

    recordable = True
    receptive_depth = 1

    radii: Tensor

    def __init__(self, radius_scale: float = 1.0) -> None:
        super().__init__()
        if not radius_scale > 0:
            raise ValueError(f"radius_scale must be positive, not {radius_scale!r}")
        self.radius_scale = float(radius_scale)
        table = torch.full((MAX_ATOMIC_NUMBER + 1,), math.nan, dtype=torch.float64)
        table[: len(COVALENT_RADII)] = torch.tensor(COVALENT_RADII, dtype=torch.float64)
        self.register_buffer("radii", table, persistent=False)
        self._switch = PolynomialEnvelope(1.0, exponent=_EXPONENT)

    def forward(self, graph: AtomGraph) -> Tensor:
        """Return half of every pair's energy to each of its atoms, (n_atoms,), eV."""
        numbers, target = graph.atomic_numbers, graph.edge_index[1]
        lengths = graph.edge_vectors().to(torch.float64).norm(dim=1)
        ends = numbers[graph.edge_index]  # (2, n_edges)
        reach = self.radius_scale * self.radii[ends].sum(dim=0)
        if known_to_the_host(target):  # else of all pairs: those that are far give zero
            self._refuse(numbers)
        if known_to_the_host(target) and graph.n_edges > _FEW:
            near = (reach > lengths).nonzero()[:, 0]
            target, lengths, reach = (one.index_select(0, near) for one in (target, lengths, reach))
            ends = ends.index_select(1, near)
        charges = ends.to(lengths)
        amplitudes, decays = table_like(_screening, like=lengths)
        x = lengths * ((charges**_POWER).sum(dim=0) / _SCREENING_LENGTH)
        screening = torch.exp(x[:, None] * -decays) @ amplitudes
        pairs = (COULOMB_CONSTANT / 2) * charges.prod(dim=0) / lengths * screening
        return segment_sum(pairs * self._switch(lengths / reach), target, graph.n_atoms)

    def _refuse(self, numbers: Tensor) -> None:
        if len(numbers) and int(numbers.max()) >= len(COVALENT_RADII):
            raise ValueError(
                f"ZBL knows elements up to {len(COVALENT_RADII) - 1}, and the structure has "
                f"{int(numbers.max())}"
            )


@constant_table
def _screening() -> Tensor:
    """Return the amplitudes and decays of the screening function, (2, 4)."""
    amplitudes, decays = (0.18175, 0.50986, 0.28022, 0.02817), (3.19980, 0.94229, 0.40290, 0.20162)
    return torch.tensor([amplitudes, decays], dtype=torch.float64)
