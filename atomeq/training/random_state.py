"""Every random state of a process as plain values, which a checkpoint holds."""

import random
from typing import Any

import numpy as np
import torch

from atomeq.training.distributed import of_all_processes


def get_rng_state() -> dict[str, Any]:
    """Return every random state as plain values, which weights_only loading accepts."""
    name, keys, *position = np.random.get_state(legacy=True)  # noqa: NPY002
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *position),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def get_rng_states() -> list[dict[str, Any]]:
    """Return the random states of all processes, by their rank."""
    return of_all_processes(get_rng_state())


def set_own_rng_state(states: list[dict[str, Any]] | dict[str, Any], rank: int) -> None:
    """Restore the state of a process; files from before there were several hold one."""
    set_rng_state(states if isinstance(states, dict) else states[min(rank, len(states) - 1)])


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what :func:`get_rng_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
