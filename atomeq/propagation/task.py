"""PropagationTask: Lightning trains a propagator on where particles are a long step later."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional
from torchmetrics import MeanMetric

from atomeq.models.base import Propagator
from atomeq.propagation.batches import PropagationBatch, PropagationSet
from atomeq.training.schedules import WarmupCosine

logger = logging.getLogger(__name__)


class PositionError(MeanMetric):
    """Mean squared error of predicted positions, fed with that of each batch."""

    #: Result -> its title and unit in tables.
    columns: Mapping[str, tuple[str, str]] = {"mse": ("position MSE", "length²")}


class PropagationTask(LightningModule):
    """Train a propagator on the mean squared error of positions.

    Args:
        model: The propagator.
        optimizer: Makes the optimizer from the parameters.
        velocity_weight: Weight of the squared error of velocities, in lengths per long step; for
            propagators that are used step after step. As published, nothing asks for velocities.
        scheduler: Makes the learning-rate schedule from the optimizer; stepped each epoch. A
            :class:`~atomeq.training.schedules.WarmupCosine` spans ``trainer.max_epochs``.
    """

    def __init__(
        self,
        model: Propagator,
        *,
        optimizer: OptimizerCallable = torch.optim.Adam,
        velocity_weight: float = 0.0,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if velocity_weight and not model.gives_velocities:
            raise ValueError(
                f"{type(model).__name__} gives no velocities; leave velocity_weight at 0"
            )
        self.model = model
        self.velocity_weight = velocity_weight
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.metrics = PositionError()
        self.val_results: dict[str, float] = {}
        self.test_results: dict[str, dict[str, float]] = {}
        self.skipped_steps = 0
        self._loaded = False

    def training_step(self, batch: PropagationBatch, batch_idx: int) -> Tensor:
        """Return the mean squared error of a batch."""
        pos, velocities = self._predict(batch)
        loss = functional.mse_loss(pos, batch.target)
        if self.velocity_weight and velocities is not None:
            error = functional.mse_loss(velocities, batch.target_velocities)
            loss = loss + self.velocity_weight * error
        self.log(
            "train/loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(batch.pos)
        )
        return loss

    def on_train_epoch_start(self) -> None:
        """Give the epoch its own order of systems."""
        systems = self.trainer.train_dataloader
        if isinstance(systems, PropagationSet):
            systems.epoch = self.current_epoch

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave out gradients that overflowed: clipped, they are NaN, and so are all weights."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            return
        for gradient in gradients:
            gradient.zero_()
        self.skipped_steps += 1
        logger.warning(
            "gradients overflowed and were left out, %d times so far", self.skipped_steps
        )

    def validation_step(self, batch: PropagationBatch, batch_idx: int) -> None:
        """Add a batch to the validation error."""
        pos, _ = self._predict(batch)
        error = functional.mse_loss(pos, batch.target)
        self.metrics.update(error.detach(), weight=len(batch.pos))

    def on_validation_epoch_end(self) -> None:
        """Log the mean squared error of the validation set."""
        mse = self._result()
        self.val_results = {"mse": float(mse)}
        self.log("val/loss", mse, prog_bar=True)

    def test_step(self, batch: PropagationBatch, batch_idx: int) -> None:
        """Add a batch to the test error."""
        self.validation_step(batch, batch_idx)

    def on_test_start(self) -> None:
        """Refuse weights that were never trained."""
        if not self._loaded and not self.trainer.fit_loop.epoch_progress.total.completed:
            raise ValueError(
                "these weights were never trained; give the checkpoint of a fit with --ckpt_path"
            )

    def on_test_epoch_end(self) -> None:
        """Keep and log the mean squared error of the test set."""
        mse = self._result()
        self.test_results = {"test": {"mse": float(mse)}}
        self.log("test/mse", mse)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer and its schedule."""
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        if isinstance(scheduler, WarmupCosine):
            n_epochs = self.trainer.max_epochs
            if n_epochs is None or n_epochs < 0:
                raise ValueError("WarmupCosine needs an end: set trainer.max_epochs")
            scheduler.set_total_steps(n_epochs)
        return [optimizer], [scheduler]  # pyright: ignore[reportReturnType]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the validation error of these weights."""
        checkpoint["validation"] = dict(self.val_results)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Know that the weights come from a fit."""
        self._loaded = True

    def _predict(self, batch: PropagationBatch) -> tuple[Tensor, Tensor | None]:
        return self.model(
            batch.pos,
            batch.velocities,
            batch.node_features,
            batch.edge_features,
            batch.edge_index,
        )

    def _result(self) -> Tensor:
        mse = self.metrics.compute()
        self.metrics.reset()
        return mse
