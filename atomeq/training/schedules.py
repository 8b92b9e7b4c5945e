"""Learning-rate schedules that know the length of the run."""

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupCosine(LRScheduler):
    """Linear warm-up, then half a cosine down to a final fraction, over the steps of the run.

    Args:
        optimizer: Its learning rates are the peak.
        warmup: Part of the run that warms up.
        final: Learning rate at the end, as a fraction of the peak.
    """

    def __init__(self, optimizer: Optimizer, warmup: float = 0.02, final: float = 0.01) -> None:
        if not (0 <= warmup < 1 and 0 <= final <= 1):
            raise ValueError(f"warmup is in [0, 1) and final in [0, 1]; got {warmup} and {final}")
        self.warmup = warmup
        self.final = final
        self.total_steps = 1
        super().__init__(optimizer)

    def set_total_steps(self, total_steps: int) -> None:
        """Set the length of the run, which is known when training starts."""
        self.total_steps = max(1, total_steps)
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each parameter group at this step."""
        return [base * self._factor(self.last_epoch) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the position; the length belongs to the run and not to its state."""
        state = super().state_dict()
        state.pop("total_steps", None)
        return state

    def _factor(self, step: int) -> float:
        n_warmup = round(self.warmup * self.total_steps)
        if step < n_warmup:
            return (step + 1) / (n_warmup + 1)
        progress = min(1.0, (step - n_warmup) / max(1, self.total_steps - n_warmup))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
