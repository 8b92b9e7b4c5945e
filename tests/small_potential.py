"""Small potentials with generic weights, quick enough for tests of what stands on potentials."""

from collections.abc import Callable

import torch

from atomeq.models.base import AtomisticModel
from atomeq.models.egnn import EGNN
from atomeq.models.mace import MACE
from atomeq.models.nequip import NequIP
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences

NETWORKS: dict[str, Callable[[float], AtomisticModel]] = {
    "egnn": lambda cutoff: EGNN(cutoff=cutoff, num_layers=2, hidden_channels=8),
    "nequip": lambda cutoff: NequIP(
        cutoff, irreps=["4x0e", "4x0e+3x1o+2x2e", "4x0e"], radial_channels=[8], num_radial=4
    ),
    "mace": lambda cutoff: MACE(
        cutoff, irreps="4x0e+4x1o", lmax_edge=2, radial_channels=[8], num_radial=4
    ),
}


def small_potential(
    dtype: torch.dtype = torch.float64, *, cutoff: float = 4.5, network: str = "egnn"
) -> Potential:
    """An untrained network that knows copper and aluminium."""
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NETWORKS[network](cutoff)
    potential = Potential(model, AtomicReferences({29: -3.7, 13: -3.4}, scale=10.0)).double()
    for parameter in potential.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.3 * noise
    return potential.to(dtype).eval()
