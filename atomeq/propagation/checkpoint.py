"""A propagator on disk: a folder like a potential's, whose model.yaml adds ``view``, what it sees.

What makes such a folder safe to write and to load is said in :mod:`atomeq.potential.checkpoint`.
"""

from pathlib import Path
from typing import Any

import torch

from atomeq.models.registry import PROPAGATORS
from atomeq.potential.checkpoint import (
    build_registered,
    content_of,
    load_weights,
    read_document,
    read_weights,
    resolve_device,
    saveable_node,
    write_folder,
)
from atomeq.potential.folders import CONFIG_FILE, CheckpointError, find_propagator
from atomeq.propagation.long_step import LongStep
from atomeq.propagation.particles import ParticleView


def save_propagator(
    step: LongStep, folder: str | Path, *, metadata: dict[str, Any] | None = None
) -> Path:
    """Write a propagator and its view to a folder, replacing what a save left there.

    Args:
        step: What to save.
        folder: Created if missing.
        metadata: Plain values to keep in ``model.yaml``.

    Returns:
        The folder.

    Raises:
        CheckpointError: The network could not be loaded again.
    """
    return write_folder(Path(folder), _description(step), step.propagator, metadata)


def refuse_unsaveable(step: LongStep) -> None:
    """Raise :class:`CheckpointError` where a save would fail, or what it wrote not be loaded."""
    content_of(step.propagator, _description(step))


def load_propagator(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> LongStep:
    """Load a propagator from a folder that :func:`save_propagator` wrote.

    Args:
        path: The folder.
        device: Where to put it; by default the CPU.
        dtype: The dtype the network computes in; by default the one it was saved with.

    Returns:
        The long step in evaluation mode, its parameters frozen.

    Raises:
        CheckpointError: Nothing there, a potential, a damaged file, a wrong hash, an unknown
            network or version.
    """
    folder = find_propagator(path)
    document = read_document(folder)
    if "view" not in document:
        raise CheckpointError(f"{folder} holds a potential, not a propagator; use `atomeq md`")
    named_in, weights = folder / CONFIG_FILE, read_weights(folder)
    network = build_registered(document["model"], PROPAGATORS, named_in, weights)
    try:
        step = LongStep(network, ParticleView.from_config(document["view"]))
    except (AttributeError, ValueError) as error:
        raise CheckpointError(f"{named_in}: {error}") from error
    saved = getattr(torch, document["dtype"])
    step = step.to(saved)
    load_weights(step.propagator, weights, folder)
    step = step.to(dtype if dtype is not None else saved)
    return step.to(resolve_device(device)).requires_grad_(False).eval()


def _description(step: LongStep) -> dict[str, Any]:
    return {
        "model": saveable_node(step.propagator, PROPAGATORS),
        "view": step.view.config(),
        "dtype": str(step.dtype).removeprefix("torch."),
    }
