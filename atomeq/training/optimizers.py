"""Optimizers beside torch's: Muon for matrices with AdamW for the rest, and those that average."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import AdamW, Optimizer

from atomeq.training.callbacks import ExponentialMovingAverage


class Muon(Optimizer):
    """Orthogonalised momentum for the matrices of a network, and AdamW for everything else.

    The updates of matrices have the size that AdamW's come to, a fifth of what those are at first,
    so one rate is of both, a larger one than of AdamW alone. Stacks of matrices, one for each
    degree, and vectors are AdamW's.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        weight_decay: Of both.
        momentum: Of the matrices.
        betas: Of the rest.

    Raises:
        ValueError: There is no matrix among them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        matrices, others = _divided(groups, matrices=True), _divided(groups, matrices=False)
        if not matrices:
            raise ValueError("Muon is for matrices, and none is trained; take AdamW")
        self._muon = torch.optim.Muon(
            matrices,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        self._parts: list[Optimizer] = [self._muon]
        if others:
            self._parts.append(AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas))
        super().__init__([{"params": []}], {"lr": lr, "weight_decay": weight_decay})
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self._share()

    def _share(self) -> None:
        """Let the parts see the groups and states of the whole, which others read and replace."""
        start = 0
        for part in self._parts:
            end = start + len(part.param_groups)
            part.param_groups = self.param_groups[start:end]
            part.state, start = self.state, end

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """Make a step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up groups and states of an earlier run."""
        super().load_state_dict(state_dict)
        self._share()


def _divided(groups: list[dict[str, Any]], *, matrices: bool) -> list[dict[str, Any]]:
    """Return groups with their matrices, or with all else."""
    found = []
    for group in groups:
        own: list[Tensor] = [
            p for p in group["params"] if (p.ndim == 2 and min(p.shape) > 1) == matrices
        ]
        if own:
            found.append({**group, "params": own})
    return found


def averages_itself(optimizer: Optimizer) -> bool:
    """Whether an optimizer trains at other weights than it validates, as ScheduleFree does."""
    return callable(getattr(optimizer, "train", None)) and callable(
        getattr(optimizer, "eval", None)
    )


def refuse_two_averages(optimizers: Iterable[Optimizer], callbacks: Iterable[Callback]) -> None:
    """Raise ``ValueError`` where averages of weights are averaged once more."""
    averages = any(isinstance(c, ExponentialMovingAverage) and c.averages for c in callbacks)
    for optimizer in optimizers:
        if averages and averages_itself(optimizer):
            raise ValueError(
                f"{type(optimizer).__name__} averages the weights by itself: set ema.decay to 0"
            )


def save_averages(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Let a checkpoint hold the weights that are validated, where an optimizer trains at others."""
    optimizers, strategy = trainer.optimizers, trainer.strategy
    if any(map(averages_itself, optimizers)):
        train_or_eval(optimizers, train=False)
        found = strategy.lightning_module_state_dict()
        checkpoint["state_dict"] = {k: v.clone() for k, v in found.items()}
        states = [strategy.optimizer_state(one) for one in optimizers]
        checkpoint["optimizer_states"] = copy.deepcopy(states)
        train_or_eval(optimizers, train=True)


def train_or_eval(optimizers: Iterable[Optimizer], *, train: bool) -> None:
    """Let optimizers that average put the weights in place that they train, or validate, at."""
    for optimizer in optimizers:
        if averages_itself(optimizer):
            getattr(optimizer, "train" if train else "eval")()
