"""A small potential with generic weights, quick enough for tests of what stands on potentials."""

import torch

from atomeq.models.egnn import EGNN
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences


def small_potential(dtype: torch.dtype = torch.float64, *, cutoff: float = 4.5) -> Potential:
    """An untrained EGNN that knows copper and aluminium."""
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = EGNN(cutoff=cutoff, num_layers=2, hidden_channels=8)
    potential = Potential(model, AtomicReferences({29: -3.7, 13: -3.4}, scale=10.0)).double()
    for parameter in potential.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.3 * noise
    return potential.to(dtype).eval()
