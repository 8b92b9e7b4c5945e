"""The part of stress labels that is no derivative of the energies: plane waves' Pulay pressure."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph

_STEPS = 100  # that the running mean goes over


class StressOffset(nn.Module):
    """A pressure on the diagonal of the labels of the stress, given or fitted as training goes on.

    Args:
        given: eV/Å³, or ``fitted``: the running mean of what a potential misses.
    """

    value: Tensor
    n_steps: Tensor

    def __init__(self, given: float | Literal["fitted"] = 0.0) -> None:
        super().__init__()
        self.fitted = given == "fitted"
        start = 0.0 if isinstance(given, str) else given
        self.register_buffer("value", torch.tensor(start, dtype=torch.float64))
        self.register_buffer("n_steps", torch.tensor(0))
        self.register_load_state_dict_pre_hook(_complete)

    def fit(self, predicted: Tensor | None, batch: AtomGraph) -> None:
        """Move towards what stresses (n_graphs, 3, 3) miss of the labels of a batch."""
        if not self.fitted or predicted is None:
            return
        missed = (batch.stress - predicted.detach()).diagonal(dim1=1, dim2=2).mean(dim=1)
        missed = missed[missed.isfinite()].to(torch.float64)
        if len(missed):
            self.n_steps += 1
            self.value.lerp_(missed.mean(), max(1 / int(self.n_steps), 1 / _STEPS))

    def without(self, batch: AtomGraph) -> AtomGraph:
        """Return a batch with the stress labels of its energies."""
        if batch.get("stress") is None or not bool(self.value != 0):
            return batch
        identity = torch.eye(3, dtype=batch.stress.dtype, device=batch.stress.device)
        return batch.replace(stress=batch.stress - self.value.to(identity) * identity)


def _complete(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Checkpoints of before it was there have none."""
    for name, buffer in module.named_buffers():
        state_dict.setdefault(f"{prefix}{name}", torch.zeros_like(buffer))
