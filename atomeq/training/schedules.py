"""Learning-rate schedules that know the length of the run."""

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def total_steps(trainer: Trainer, n_batches: int) -> int:
    """Return the number of optimizer steps of a run, the same before and after a resume.

    Lightning's own estimate sets up the loader before a checkpoint tells it where to go on.

    Args:
        trainer: Of the run.
        n_batches: Of an epoch.
    """
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limit = trainer.limit_train_batches
        share = limit if isinstance(limit, int) else int(n_batches * (limit or 1.0))
        n_batches = min(n_batches, share)
        limits.append(trainer.max_epochs * -(-n_batches // trainer.accumulate_grad_batches))
    if not limits:
        raise ValueError("this schedule needs an end: set trainer.max_epochs or trainer.max_steps")
    return min(limits)


class RunSchedule(LRScheduler):
    """A linear warm-up and what follows it, stepped with the optimizer over the whole run.

    Args:
        optimizer: Its learning rates are the peak.
        warmup: Part of the run that warms up.
        start: Learning rate from which it does, as a fraction of the peak.
    """

    def __init__(self, optimizer: Optimizer, *, warmup: float, start: float) -> None:
        if not (0 <= warmup < 1 and 0 <= start <= 1):
            raise ValueError(f"warmup is in [0, 1) and start in [0, 1]; got {warmup} and {start}")
        self.warmup = warmup
        self.start = start
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
            return self.start + (1 - self.start) * (step + 1) / (n_warmup + 1)
        return self._after_warmup(step, n_warmup)

    def _after_warmup(self, step: int, n_warmup: int) -> float:
        """Return the fraction of the peak at a step behind the warm-up."""
        raise NotImplementedError(f"{type(self).__name__} does not define _after_warmup()")


class WarmupCosine(RunSchedule):
    """Linear warm-up, then half a cosine down to a final fraction, over the steps of the run.

    Args:
        optimizer: Its learning rates are the peak.
        warmup: Part of the run that warms up.
        final: Learning rate at the end, as a fraction of the peak.
        start: Learning rate from which it warms up, as a fraction of the peak.

    Raises:
        ValueError: ``final`` is not between 0 and 1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: float = 0.02,
        final: float = 0.01,
        start: float = 0.0,
    ) -> None:
        if not 0 <= final <= 1:
            raise ValueError(f"final is in [0, 1], not {final}")
        self.final = final
        super().__init__(optimizer, warmup=warmup, start=start)

    def _after_warmup(self, step: int, n_warmup: int) -> float:
        progress = min(1.0, (step - n_warmup) / max(1, self.total_steps - n_warmup))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


class WarmupSteps(RunSchedule):
    """Linear warm-up, then a constant rate that is multiplied at milestones of the run.

    Args:
        optimizer: Its learning rates are the peak.
        milestones: Where the rate changes, as fractions of the run.
        gamma: What multiplies it there.
        warmup: Part of the run that warms up.
        start: Learning rate from which it warms up, as a fraction of the peak.

    Raises:
        ValueError: Milestones are no fractions of a run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[float],
        gamma: float = 0.3,
        warmup: float = 0.0,
        start: float = 0.0,
    ) -> None:
        if not all(0 < milestone <= 1 for milestone in milestones):
            raise ValueError(f"milestones are fractions of the run, not {list(milestones)}")
        self.milestones = tuple(milestones)
        self.gamma = gamma
        super().__init__(optimizer, warmup=warmup, start=start)

    def _after_warmup(self, step: int, n_warmup: int) -> float:
        passed = sum(step >= round(part * self.total_steps) for part in self.milestones)
        return self.gamma**passed
