"""Sharded: every process keeps its share of weights, gradients, optimizer state and averages.

FSDP2 (``torch.distributed.fsdp.fully_shard``) around the whole potential: its weights are gathered
before a batch and given up after its gradient. Around its layers it could not be: forces are a
derivative taken inside the forward pass, whose own hooks would give the weights of each layer up
before the gradient of those forces comes for them a second time.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from atomeq.potential.predictor import Predictor
from atomeq.training.distributed import n_processes, part_like, whole


class Sharded(DDPStrategy):
    """Train a potential of which each process keeps a share, ``trainer.strategy: fsdp2``.

    Losses and weights are those of ``ddp``, and of one process with the whole batch. Checkpoints
    hold whole tensors: any number of processes, sharded or not, goes on with them.

    Raises:
        ValueError: What is trained is no potential, or recomputes its activations.

    Example:
        >>> trainer = Trainer(devices=8, strategy=Sharded())  # doctest: +SKIP
    """

    def setup(self, trainer: Trainer) -> None:
        """Refuse what cannot be sharded, and clip gradients of which some are in shares."""
        task = self.lightning_module
        if not isinstance(getattr(task, "potential", None), Predictor):
            raise ValueError("Sharded is for potentials; take trainer.strategy ddp")
        if getattr(task, "recompute", None) is not None:
            raise ValueError(
                "Sharded gathers weights once for a batch, and model.recompute wants them again "
                "within its gradient; leave one of the two out"
            )
        super().setup(trainer)
        self.precision_plugin.clip_grad_by_norm = _clip  # pyright: ignore[reportAttributeAccessIssue]

    def configure_ddp(self) -> None:
        """Shard the potential in place of wrapping the task, and keep a form of it that is not."""
        task: Any = self.lightning_module
        for tensor in task.potential.state_dict().values():
            distributed.broadcast(tensor, src=0)
        self._unsharded = copy.deepcopy(task.potential).cpu()
        shard(task.potential)

    def on_train_end(self) -> None:
        """Give the task its potential back, whole."""
        task: Any = self.lightning_module
        weights = {name: whole(tensor) for name, tensor in task.potential.state_dict().items()}
        self._unsharded.load_state_dict(weights)
        task.potential = self._unsharded.to(self.root_device).train(task.potential.training)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole weights."""
        return {name: whole(one) for name, one in super().lightning_module_state_dict().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole state of an optimizer."""
        found: dict[str, Any] = super().optimizer_state(optimizer)
        states = {
            number: {key: whole(value) for key, value in state.items()}
            for number, state in found["state"].items()
        }
        return {**found, "state": states}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's share of whole states."""
        super().load_optimizer_state_dict(checkpoint)
        for optimizer in self.optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        state[key] = part_like(value, parameter)


StrategyRegistry.register("fsdp2", Sharded, description="FSDP2 around the whole potential")


def shard(potential: nn.Module) -> None:
    """Leave each process its share of the weights of a potential, which is called as before.

    Args:
        potential: Changed in place. What it trains beside its network in another dtype, energies
            of elements say, stays whole, and its gradients are averaged.
    """
    trained = [one for one in potential.parameters() if one.requires_grad]
    own = {one for one in trained if one.dtype != trained[0].dtype}
    for parameter in own:
        parameter.register_hook(_mean)
    # Its parameters, while they are gathered, are what the task differentiates by: so they stay
    # gathered from the forward pass to the end of the backward pass.
    fully_shard(potential, reshard_after_forward=False, ignored_params=own)
    assert isinstance(potential, FSDPModule)
    potential.set_reduce_scatter_unused_params(True)  # a head that one process has nothing of
    potential.register_forward_hook(_give_up)


def _give_up(potential: nn.Module, *_: object) -> None:
    """Give gathered weights up where no backward pass will."""
    if not potential.training:
        assert isinstance(potential, FSDPModule)
        potential.reshard()


def _mean(gradient: Tensor) -> Tensor:
    total = gradient.clone()
    distributed.all_reduce(total)
    return total / n_processes()


def _clip(optimizer: Optimizer, clip_val: float) -> None:
    """Clip the gradients by their common norm; torch's own takes shares alone, or none."""
    groups = optimizer.param_groups
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    norms = [whole(torch.linalg.vector_norm(gradient)).double() for gradient in gradients]
    factor = float((clip_val / (torch.stack(norms).norm() + 1e-6)).clamp(max=1.0))
    for gradient in gradients:
        gradient.mul_(factor)
