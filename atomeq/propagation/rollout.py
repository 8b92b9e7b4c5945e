"""Rollouts of a propagator: recordings of many long steps, and their errors against others."""

from collections.abc import Callable

import torch

from atomeq.propagation.long_step import LongStep, Particles
from atomeq.propagation.recordings import Recording


def roll_out(
    step: LongStep,
    start: Recording,
    num_steps: int,
    *,
    observe: Callable[[], None] | None = None,
) -> Recording:
    """Return the recording of a start and the frames that follow it.

    Args:
        step: The trained propagator.
        start: A recording of one frame.
        num_steps: Number of long steps.
        observe: Called after each.

    Raises:
        ValueError: Particles it was not trained on, or systems that fly apart.
    """
    particles = Particles(start.pos[:, 0], start.velocities[:, 0], start.numbers)
    frames = [particles]
    for later in step.rollout(particles, num_steps):
        frames.append(later)
        if observe is not None:
            observe()
    pos, velocities = (
        torch.stack([frame[field] for frame in frames], dim=1).cpu() for field in (0, 1)
    )
    times = tuple(start.times[0] + k * step.view.time for k in range(num_steps + 1))
    return Recording(start.kind, pos, velocities, start.numbers, times)


def errors_of(rolled: Recording, reference: Recording, step_time: float) -> list[dict[str, float]]:
    """Return mean squared errors after each long step whose time the reference has.

    Args:
        rolled: As :func:`roll_out` returns it.
        reference: The same particles at some of those times.
        step_time: Duration of a long step.

    Returns:
        Rows of ``position_mse`` (length²) and ``velocity_mse`` (length²/time²), averaged over
        coordinates; ``static_position_mse`` is of particles that had stayed where they started.
    """
    rows = []
    for k, moment in enumerate(rolled.times[1:], start=1):
        index = reference.index_at(moment, step_time)
        if index is None:
            continue
        true_pos, true_velocities = reference.pos[:, index], reference.velocities[:, index]
        rows.append(
            {
                "step": k,
                "time": moment,
                "position_mse": float(((rolled.pos[:, k] - true_pos) ** 2).mean()),
                "velocity_mse": float(((rolled.velocities[:, k] - true_velocities) ** 2).mean()),
                "static_position_mse": float(((rolled.pos[:, 0] - true_pos) ** 2).mean()),
            }
        )
    return rows
