"""PropagationTask: Lightning trains a propagator on where particles are a long step later.

With its data modules, which serve systems of equal size as flat batches: features are computed once
for a whole set, and all batches share one edge index.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional
from torchmetrics import MeanMetric

from atomeq.data.md_trajectory import read_motion
from atomeq.data.nbody import FRAME_TIME, NBodyRecipe, Trajectories, load_nbody
from atomeq.data.particles import ParticleView, batched_pairs
from atomeq.models.base import Propagator
from atomeq.potential.checkpoint import refuse_unsaveable, save_propagator
from atomeq.potential.long_step import LongStep
from atomeq.training.schedules import WarmupCosine
from atomeq.typing import EdgeIndex

logger = logging.getLogger(__name__)


class PropagationBatch(NamedTuple):
    """Systems of equal size, flattened: n_atoms particles in n_systems.

    Attributes:
        pos: Positions at the start, (n_atoms, 3).
        velocities: Velocities at the start, in lengths per long step, (n_atoms, 3).
        node_features: Of each particle, (n_atoms, n_inputs), as the view gives them.
        edge_features: Of each pair, (n_edges, n_edge_features).
        edge_index: Row 0 is the source, row 1 the target, (2, n_edges).
        target: Positions at the end, (n_atoms, 3).
        target_velocities: Velocities at the end, in lengths per long step, (n_atoms, 3).
    """

    pos: Tensor
    velocities: Tensor
    node_features: Tensor
    edge_features: Tensor
    edge_index: EdgeIndex
    target: Tensor
    target_velocities: Tensor


class PropagationSet:
    """Systems with their features, served in batches; an iterable that Lightning takes as a loader.

    Args:
        trajectories: With both frames.
        view: What the model is shown of them.
        from_frame: What the model sees.
        to_frame: What it predicts.
        batch_size: Systems in a batch; the last batch may have fewer.
        seed: Of the order, a new one in each epoch; None keeps the order of the set.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        view: ParticleView,
        *,
        from_frame: int,
        to_frame: int,
        batch_size: int,
        seed: int | None = None,
    ) -> None:
        pos, velocities = trajectories.at(from_frame)
        target, target_velocities = trajectories.at(to_frame)
        self.n_systems, self.n_bodies = pos.shape[:2]
        self.pairs = view.pairs(self.n_bodies)
        velocities = velocities * view.time
        nodes, edges = view.features(pos, velocities, trajectories.charges, self.pairs)
        later = target_velocities * view.time
        self.per_system = (pos, velocities, nodes, edges, target, later)
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
            pos, velocities, nodes, edges, target, later = (
                tensor[chosen].flatten(0, 1) for tensor in self.per_system
            )
            edge_index = self._edge_index(len(chosen))
            yield PropagationBatch(pos, velocities, nodes, edges, edge_index, target, later)

    def _edge_index(self, n_systems: int) -> EdgeIndex:
        if n_systems not in self._edges:
            self._edges[n_systems] = batched_pairs(self.pairs, n_systems, self.n_bodies)
        return self._edges[n_systems]


class PropagationDataModule(LightningDataModule):
    """Sets of systems, and the view that a propagator has of them.

    A subclass fills both in :meth:`setup`, once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sets: dict[str, PropagationSet] = {}
        self.view = ParticleView()

    def train_dataloader(self) -> PropagationSet:
        """Return the training systems, shuffled by seed and epoch."""
        return self.sets["train"]

    def val_dataloader(self) -> PropagationSet:
        """Return the validation systems."""
        return self.sets["val"]

    def test_dataloader(self) -> PropagationSet:
        """Return the test systems."""
        return self.sets["test"]


class NBodyDataModule(PropagationDataModule):
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

    def setup(self, stage: str) -> None:
        """Read or simulate the set, once."""
        if self.sets:
            return
        frames = self.to_frame - self.from_frame
        self.view = ParticleView(self.recipe.system, time=frames * FRAME_TIME)
        for name, part in load_nbody(self.recipe, self.folder).items():
            train = name == "train"
            chosen = slice(self.max_train) if train else slice(None)
            self.sets[name] = PropagationSet(
                Trajectories(
                    part.pos[chosen], part.velocities[chosen], part.charges[chosen], part.frames
                ),
                self.view,
                from_frame=self.from_frame,
                to_frame=self.to_frame,
                batch_size=self.batch_size if train else self.eval_batch_size,
                seed=self.seed if train else None,
            )


class MoleculeDataModule(PropagationDataModule):
    """Serves pairs of frames of one molecule's trajectory, a long step apart.

    Training, validation and test are consecutive stretches of it, and no pair reaches from one into
    the next: frames drawn at random, as published, have neighbours in time in every set.

    Args:
        path: The trajectory; any file that ASE reads.
        time: Duration of the long step, fs.
        frame_time: Time between two frames, fs; by default what the frames call ``time_fs``.
        bond_length: Atoms nearer than this in the first frame see each other, Å.
        train_share: Share of the frames that train.
        val_share: Share of the frames that validate; the rest tests.
        max_train: At most this many training pairs, evenly spread; None is all.
        max_eval: At most this many pairs to validate, and to test.
        batch_size: Pairs in a training batch.
        eval_batch_size: Pairs in a batch without gradients.
        seed: Of the order of the training pairs.
    """

    def __init__(
        self,
        path: str,
        time: float,
        *,
        frame_time: float | None = None,
        bond_length: float = 2.5,
        train_share: float = 0.8,
        val_share: float = 0.1,
        max_train: int | None = 500,
        max_eval: int | None = 2000,
        batch_size: int = 100,
        eval_batch_size: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if min(train_share, val_share) <= 0 or train_share + val_share >= 1:
            raise ValueError(
                f"shares {train_share} and {val_share} of the frames leave nothing to test"
            )
        self.path = path
        self.time = time
        self.frame_time = frame_time
        self.bond_length = bond_length
        self.shares = (train_share, val_share)
        self.most = {"train": max_train, "val": max_eval, "test": max_eval}
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Read the trajectory, once."""
        if self.sets:
            return
        motion = read_motion(self.path, frame_time=self.frame_time)
        stride = motion.stride(self.time)
        bonds = motion.bonds(self.bond_length)
        self.view = ParticleView("molecule", self.time, motion.atomic_numbers, bonds)
        n_frames = len(motion.pos)
        train_end = int(n_frames * self.shares[0])
        val_end = int(n_frames * sum(self.shares))
        stretches = {"train": (0, train_end), "val": (train_end, val_end)}
        stretches["test"] = (val_end, n_frames)
        for name, (first, end) in stretches.items():
            train = name == "train"
            self.sets[name] = PropagationSet(
                motion.windows(first, end, stride, self.most[name]),
                self.view,
                from_frame=0,
                to_frame=stride,
                batch_size=self.batch_size if train else self.eval_batch_size,
                seed=self.seed if train else None,
            )


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


class SavePropagator(Callback):
    """Writes the best weights as a propagator folder when the fit ends.

    Args:
        folder: Where to; by default ``propagator`` in the trainer's ``default_root_dir``.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a network that does not fit the data or cannot be saved, before the first step."""
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(pl_module, PropagationTask)
        assert isinstance(data, PropagationDataModule)
        self.step = LongStep(pl_module.model, data.view)
        if stage == "fit":
            refuse_unsaveable(self.step)

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the weights of the best checkpoint, or the last ones where there is none."""
        folder = Path(self.folder or Path(trainer.default_root_dir) / "propagator")
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        metadata: dict[str, Any] = {"epochs": trainer.current_epoch}
        step = copy.deepcopy(self.step).cpu()
        if best:
            checkpoint = torch.load(best, map_location="cpu", weights_only=True)
            prefix = "model."
            step.propagator.load_state_dict(
                {
                    name.removeprefix(prefix): tensor
                    for name, tensor in checkpoint["state_dict"].items()
                    if name.startswith(prefix)
                }
            )
            validation = checkpoint.get("validation", {})
            metadata = {"epochs": checkpoint["epoch"] + 1, "validation": validation}
        save_propagator(step, folder, metadata=metadata)
        logger.info("propagator saved in %s", folder)
