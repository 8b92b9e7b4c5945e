"""LongStep: a trained propagator with what it needs to be used, and what rollouts repeat.

For a propagator what :class:`~atomeq.potential.potential.Potential` is for a model: it takes
particles in their own units, and knows what the network is shown of them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from atomeq.models.base import Propagator
from atomeq.propagation.particles import (
    N_EDGE_FEATURES,
    N_INPUTS,
    ParticleView,
    SystemNumbers,
    SystemVectors,
    batched_pairs,
)


class Particles(NamedTuple):
    """Systems of equal size at one time.

    Attributes:
        pos: Positions, (n_systems, n_particles, 3); Å for atoms.
        velocities: Velocities, of the same shape; Å/fs for atoms.
        numbers: Charges, masses or atomic numbers, (n_systems, n_particles).
    """

    pos: SystemVectors
    velocities: SystemVectors
    numbers: SystemNumbers


class LongStep(nn.Module):
    """Carries systems of particles one long step ahead.

    Args:
        propagator: The network.
        view: What it is shown, and how long the step is.

    Raises:
        ValueError: The network takes other features than the view gives.

    Example:
        >>> step = load_propagator("runs/nbody_segno/propagator")  # doctest: +SKIP
        >>> later = step(Particles(pos, velocities, charges))  # doctest: +SKIP
    """

    def __init__(self, propagator: Propagator, view: ParticleView) -> None:
        super().__init__()
        arguments = propagator.config()["init_args"]
        taken = (arguments.get("n_inputs"), arguments.get("n_edge_features"))
        given = (N_INPUTS[view.kind], N_EDGE_FEATURES[view.kind])
        if taken != given:
            raise ValueError(
                f"the propagator takes {taken[0]} features of a particle and {taken[1]} of a pair; "
                f"kind {view.kind!r} gives {given[0]} and {given[1]}: set n_inputs: {given[0]} and "
                f"n_edge_features: {given[1]}"
            )
        self.propagator = propagator
        self.view = view

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the network computes in."""
        return self.propagator.dtype

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self.propagator.device

    def forward(self, particles: Particles) -> Particles:
        """Return the particles a long step later, in the dtype and on the device of the input.

        A network that gives positions only, like EGNN's velocity form, leaves the velocities to
        the trapezoidal rule: the step's mean velocity is the mean of those at its ends.
        """
        n_systems, n_particles = particles.numbers.shape
        pos, velocities, numbers = (tensor.to(self.propagator.dtype) for tensor in particles)
        pos, velocities, numbers = (t.to(self.device) for t in (pos, velocities, numbers))
        velocities = velocities * self.view.time
        pairs = self.view.pairs(n_particles).to(self.device)
        of_particles, of_pairs = self.view.features(pos, velocities, numbers, pairs)
        moved, speeds = self.propagator(
            pos.flatten(0, 1),
            velocities.flatten(0, 1),
            of_particles.flatten(0, 1),
            of_pairs.flatten(0, 1),
            batched_pairs(pairs, n_systems, n_particles),
        )
        moved = moved.unflatten(0, (n_systems, n_particles))
        if speeds is None:
            speeds = 2 * (moved - pos) - velocities
        else:
            speeds = speeds.unflatten(0, (n_systems, n_particles))
        return Particles(
            moved.to(particles.pos), (speeds / self.view.time).to(particles.pos), particles.numbers
        )

    def rollout(self, particles: Particles, num_steps: int) -> Iterator[Particles]:
        """Yield the particles after each of ``num_steps`` long steps.

        Raises:
            ValueError: Particles it was not trained on, values that are not finite, or a system
                that flew apart.
        """
        self.view.refuse_others(particles.numbers)
        for name, tensor in zip(("positions", "velocities"), particles, strict=False):
            if not torch.isfinite(tensor).all():
                raise ValueError(f"the {name} at the start hold NaN or infinity")
        for step in range(1, num_steps + 1):
            with torch.no_grad():
                particles = self(particles)
            finite = torch.isfinite(particles.pos).all(dim=2).all(dim=1)
            if not finite.all():
                broken = int(torch.nonzero(~finite)[0])
                raise ValueError(f"system {broken} flew apart in long step {step}")
            yield particles
