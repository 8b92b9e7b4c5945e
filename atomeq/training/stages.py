"""Stages of a training: from an epoch or step on the loss is another one, as MACE's stage two."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.optim import Optimizer

from atomeq.training.losses import PotentialLoss

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """What is minimised from when on.

    Attributes:
        loss: The whole loss of this stage.
        epoch: Its first epoch, counted from 0.
        step: Or its first optimizer step.
    """

    loss: PotentialLoss
    epoch: int | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        given = [n for n in (self.epoch, self.step) if n is not None]
        if len(given) != 1 or given[0] < 1:
            raise ValueError(
                f"a stage begins at an epoch or at a step, of 1 or more; got epoch={self.epoch} "
                f"and step={self.step}"
            )

    def has_begun(self, epoch: int, step: int) -> bool:
        """Return whether it is on at an epoch and an optimizer step.

        Args:
            epoch: From 0.
            step: Of the optimizer, from 0.
        """
        return epoch >= self.epoch if self.epoch is not None else step >= (self.step or 0)


def stage_of(stages: Sequence[Stage], epoch: int, step: int) -> int:
    """Return how many stages have begun; the last of them is on."""
    return sum(stage.has_begun(epoch, step) for stage in stages)


def forget_moments(optimizers: Iterable[Optimizer]) -> None:
    """Let Adam's means of gradients and of their squares begin anew.

    A step is the one over the root of the other: where a stage makes gradients a hundred times as
    large its first steps would be tens of times the rate, and throw the network back by epochs.

    Args:
        optimizers: Those of a trainer, changed in place. Others than Adam's stay.
    """
    for optimizer in optimizers:
        for state in optimizer.state.values():
            if {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
                state.update({name: torch.zeros_like(value) for name, value in state.items()})


def forget_best(
    callbacks: Iterable[Callback], stage: int, *, rename: bool, monitor: str = "val/loss"
) -> None:
    """Let checkpoints and early stopping begin anew: another loss has other values.

    Args:
        callbacks: Those of a trainer, changed in place.
        stage: Number of the stage that ends, from 1.
        rename: Keep its best weights as ``best_stage_1.ckpt``, before others are best; of several
            processes one does.
        monitor: The quantity.
    """
    for callback in callbacks:
        if getattr(callback, "monitor", None) != monitor:
            continue
        if isinstance(callback, ModelCheckpoint):
            path = Path(callback.best_model_path)
            if rename and path.is_file():
                path.rename(path.with_stem(f"{path.stem}_stage_{stage}"))
            callback.best_k_models = {}
            callback.best_model_score = None
            callback.best_model_path = callback.kth_best_model_path = ""
        elif isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            infinity = torch.tensor(torch.inf)
            callback.best_score = infinity if callback.mode == "min" else -infinity
