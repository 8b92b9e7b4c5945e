"""PropagationTask: Lightning trains a propagator on where particles are a long step later.

With its data module, which serves systems of equal size as flat batches: features are computed once
for a whole set, and all batches share one edge index.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional
from torchmetrics import MeanMetric

from atomeq.data.nbody import NBodyRecipe, Trajectories, fully_connected, load_nbody
from atomeq.models.base import Propagator
from atomeq.training.schedules import WarmupCosine
from atomeq.typing import EdgeIndex

logger = logging.getLogger(__name__)


class PropagationBatch(NamedTuple):
    """Systems of equal size, flattened: n_atoms bodies in n_systems.

    Attributes:
        pos: Positions at the start, (n_atoms, 3).
        velocities: Velocities at the start, (n_atoms, 3).
        node_features: Speed of each body, (n_atoms, 1).
        edge_features: Product of the charges and squared distance of each pair, (n_edges, 2).
        edge_index: Row 0 is the source, row 1 the target, (2, n_edges).
        target: Positions at the end, (n_atoms, 3).
    """

    pos: Tensor
    velocities: Tensor
    node_features: Tensor
    edge_features: Tensor
    edge_index: EdgeIndex
    target: Tensor


class PropagationSet:
    """Systems with their features, served in batches; an iterable that Lightning takes as a loader.

    Args:
        trajectories: With both frames.
        from_frame: What the model sees.
        to_frame: What it predicts.
        batch_size: Systems in a batch; the last batch may have fewer.
        seed: Of the order, a new one in each epoch; None keeps the order of the set.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        *,
        from_frame: int,
        to_frame: int,
        batch_size: int,
        seed: int | None = None,
    ) -> None:
        pos, velocities = trajectories.at(from_frame)
        target, _ = trajectories.at(to_frame)
        self.n_systems, self.n_bodies = pos.shape[:2]
        source, receiver = fully_connected(1, self.n_bodies)
        squared = ((pos[:, receiver] - pos[:, source]) ** 2).sum(dim=-1)
        charges = trajectories.charges
        products = charges[:, receiver] * charges[:, source]
        self.per_system = (
            pos,
            velocities,
            torch.linalg.vector_norm(velocities, dim=-1, keepdim=True),
            torch.stack([products, squared], dim=-1),
            target,
        )
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self._edges: dict[int, EdgeIndex] = {}

    def __len__(self) -> int:
        return -(-self.n_systems // self.batch_size)

    def __iter__(self) -> Iterator[PropagationBatch]:
        order = torch.arange(self.n_systems)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
            order = torch.randperm(self.n_systems, generator=generator)
        for chosen in order.split(self.batch_size):
            pos, velocities, nodes, edges, target = (
                tensor[chosen].flatten(0, 1) for tensor in self.per_system
            )
            edge_index = self._edge_index(len(chosen))
            yield PropagationBatch(pos, velocities, nodes, edges, edge_index, target)

    def _edge_index(self, n_systems: int) -> EdgeIndex:
        if n_systems not in self._edges:
            self._edges[n_systems] = fully_connected(n_systems, self.n_bodies)
        return self._edges[n_systems]


class NBodyDataModule(LightningDataModule):
    """Simulates few-body systems once, keeps them in a folder and serves them in batches.

    Args:
        folder: Where simulated sets are kept.
        recipe: What to simulate.
        from_frame: What the model sees; a frame is 0.1 units of time.
        to_frame: What it predicts.
        max_train: Only the first of the training systems are used; None is all.
        batch_size: Systems in a training batch.
        eval_batch_size: Systems in a batch without gradients.
        seed: Of the order of the training systems.
    """

    def __init__(
        self,
        folder: str = "runs/nbody-data",
        *,
        recipe: NBodyRecipe | None = None,
        from_frame: int = 30,
        to_frame: int = 40,
        max_train: int | None = 3000,
        batch_size: int = 100,
        eval_batch_size: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.recipe = recipe if recipe is not None else NBodyRecipe()
        self.from_frame = from_frame
        self.to_frame = to_frame
        self.max_train = max_train
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.sets: dict[str, PropagationSet] = {}

    def setup(self, stage: str) -> None:
        """Read or simulate the set, once."""
        if self.sets:
            return
        for name, part in load_nbody(self.recipe, self.folder).items():
            train = name == "train"
            chosen = slice(self.max_train) if train else slice(None)
            self.sets[name] = PropagationSet(
                Trajectories(
                    part.pos[chosen], part.velocities[chosen], part.charges[chosen], part.frames
                ),
                from_frame=self.from_frame,
                to_frame=self.to_frame,
                batch_size=self.batch_size if train else self.eval_batch_size,
                seed=self.seed if train else None,
            )

    def train_dataloader(self) -> PropagationSet:
        """Return the training systems, shuffled by seed and epoch."""
        return self.sets["train"]

    def val_dataloader(self) -> PropagationSet:
        """Return the validation systems."""
        return self.sets["val"]

    def test_dataloader(self) -> PropagationSet:
        """Return the test systems."""
        return self.sets["test"]


class PositionError(MeanMetric):
    """Mean squared error of predicted positions, fed with that of each batch."""

    #: Result -> its title and unit in tables.
    columns: Mapping[str, tuple[str, str]] = {"mse": ("position MSE", "length²")}


class PropagationTask(LightningModule):
    """Train a propagator on the mean squared error of positions.

    Args:
        model: The propagator.
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes the learning-rate schedule from the optimizer; stepped each epoch. A
            :class:`~atomeq.training.schedules.WarmupCosine` spans ``trainer.max_epochs``.
    """

    def __init__(
        self,
        model: Propagator,
        *,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.metrics = PositionError()
        self.val_results: dict[str, float] = {}
        self.test_results: dict[str, dict[str, float]] = {}
        self.skipped_steps = 0
        self._loaded = False

    def training_step(self, batch: PropagationBatch, batch_idx: int) -> Tensor:
        """Return the mean squared error of a batch."""
        loss = self._loss(batch)
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
        self.metrics.update(self._loss(batch).detach(), weight=len(batch.pos))

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

    def _loss(self, batch: PropagationBatch) -> Tensor:
        pos, _ = self.model(*batch[:3], batch.edge_features, batch.edge_index)
        return functional.mse_loss(pos, batch.target)

    def _result(self) -> Tensor:
        mse = self.metrics.compute()
        self.metrics.reset()
        return mse
