"""A long step takes what its view gives, and is loaded as it was saved."""

from pathlib import Path

import pytest
import torch

from atomeq.models.egnn_published import VelocityEGNN
from atomeq.models.segno import SEGNOPropagator
from atomeq.propagation.checkpoint import load_propagator, save_propagator
from atomeq.propagation.long_step import LongStep, Particles
from atomeq.propagation.particles import ParticleView


def test_saved_propagators_are_loaded_as_they_were(tmp_path: Path) -> None:
    view = ParticleView("molecule", 2.0, (8, 1, 1), ((0, 1), (0, 2)))
    model = SEGNOPropagator(2, 5, num_steps=3, hidden_channels=8).double()
    particles = Particles(
        torch.randn(2, 3, 3).double(),
        torch.randn(2, 3, 3).double(),
        torch.tensor([[8.0, 1, 1]] * 2),
    )
    step = LongStep(model, view)
    loaded = load_propagator(save_propagator(step, tmp_path / "p", metadata={"epochs": 3}))
    assert loaded.view == view
    assert loaded.dtype == torch.float64
    assert loaded.propagator.config() == model.config()
    for a, b in zip(step(particles), loaded(particles), strict=True):
        assert torch.equal(a, b)


def test_velocities_of_a_network_without_follow_from_the_trapezoidal_rule() -> None:
    step = LongStep(VelocityEGNN(hidden_channels=8), ParticleView("charged", time=2.0)).double()
    pos, velocities = torch.randn(2, 3, 5, 3, dtype=torch.float64)
    charges = torch.ones(3, 5, dtype=torch.float64)
    later = step(Particles(pos, velocities, charges))
    mean = (velocities + later.velocities) / 2
    torch.testing.assert_close(later.pos - pos, 2.0 * mean)


def test_a_network_must_take_what_the_view_gives() -> None:
    with pytest.raises(ValueError, match="set n_inputs: 1 and n_edge_features: 1"):
        LongStep(SEGNOPropagator(), ParticleView("gravity"))
