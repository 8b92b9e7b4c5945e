"""Callbacks of a fit: averaged weights, the trained potential as a folder."""

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.potential.checkpoint import refuse_unsaveable, save_potential
from atomeq.potential.potential import Potential
from atomeq.potential.predictor import Predictor
from atomeq.potential.uncertainty import calibrated
from atomeq.training.distributed import part_like, whole
from atomeq.training.low_rank import merged

logger = logging.getLogger(__name__)

_OLD = ("old_data", "old_data_before")


class ExponentialMovingAverage(Callback):
    """Averages the weights over the steps; validation, tests and saved potentials use the average.

    A checkpoint's ``state_dict`` holds the average, so whatever reads it gets the better weights;
    the raw weights that training goes on with are kept beside it.

    Args:
        decay: Weight of the past in each step; reached gradually as (1 + n) / (10 + n). With 0 and
            no ``equal_from`` nothing is averaged.
        equal_from: Epoch from which on, begun anew, all steps have the same weight instead, as in
            stochastic weight averaging.
    """

    def __init__(self, decay: float = 0.999, equal_from: int | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is in [0, 1), got {decay}")
        if equal_from is not None and equal_from < 0:
            raise ValueError(f"equal_from is an epoch, from 0 on, not {equal_from}")
        self.decay = decay
        self.equal_from = equal_from
        self.n_updates = self.n_equal = 0
        # While swapped in, this list holds the raw weights and the module the average.
        self._average: list[Tensor] = []
        self._swapped = False
        self._last_step = 0

    @property
    def averages(self) -> bool:
        """Whether anything is averaged."""
        return self.decay > 0 or self.equal_from is not None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the average at the first weights."""
        if stage == "fit" and self.averages and not self._average:
            self._average = [p.detach().clone() for p in _trainable(pl_module)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the weights to their device and dtype, and into shares of them."""
        if self._average:
            pairs = zip(self._average, _trainable(pl_module), strict=True)
            self._average = [part_like(average, parameter) for average, parameter in pairs]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the raw weights, and count optimizer steps where the run stands."""
        self._swap(pl_module, to_average=False)
        self._last_step = trainer.global_step
        if (
            self._average and not self.n_updates
        ):  # at what the data have said meanwhile of the references
            self._average = [p.detach().clone() for p in _trainable(pl_module)]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Move the average towards the weights after each optimizer step."""
        if trainer.global_step == self._last_step or not self._average:
            return
        self._last_step = trainer.global_step
        self.n_updates += 1
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        if self.equal_from is not None and trainer.current_epoch >= self.equal_from:
            decay = self.n_equal / (1 + self.n_equal)
            self.n_equal += 1
        for average, parameter in zip(self._average, _trainable(pl_module), strict=True):
            average.lerp_(parameter, 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        self._swap(pl_module, to_average=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train on with the raw weights."""
        self._swap(pl_module, to_average=False)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the raw weights in place when validation was interrupted."""
        self._swap(pl_module, to_average=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish with the average in the module, which is what is used from here on."""
        self._swap(pl_module, to_average=True)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the average into ``state_dict`` and the raw weights beside it."""
        if not self._average:
            return
        names = _trainable_names(pl_module)
        weights = {n: p.detach() for n, p in zip(names, _trainable(pl_module), strict=True)}
        others = dict(zip(names, self._average, strict=True))
        average, raw = (weights, others) if self._swapped else (others, weights)
        # Clones, for a checkpoint may be read back after the next step changed these in place.
        checkpoint["state_dict"] = {
            **checkpoint["state_dict"],
            **{name: whole(value).clone() for name, value in average.items()},
        }
        checkpoint["raw_weights"] = {name: whole(value).clone() for name, value in raw.items()}
        checkpoint["ema_updates"] = self.n_updates
        checkpoint["ema_equal"] = self.n_equal

    @torch.no_grad()
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore both sets of weights; outside a fit the average, already loaded, stays."""
        if not self._average:
            return
        for average, parameter in zip(self._average, _trainable(pl_module), strict=True):
            average.copy_(parameter)
        if "raw_weights" not in checkpoint:
            logger.warning("the checkpoint has no averaged weights: the average starts from it")
            return
        raw = checkpoint["raw_weights"]
        for name, parameter in zip(_trainable_names(pl_module), _trainable(pl_module), strict=True):
            parameter.copy_(raw[name])
        self.n_updates = checkpoint["ema_updates"]
        self.n_equal = checkpoint.get("ema_equal", 0)

    @torch.no_grad()
    def _swap(self, module: LightningModule, *, to_average: bool) -> None:
        if not self._average or self._swapped == to_average:
            return
        for average, parameter in zip(self._average, _trainable(module), strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)
        self._swapped = to_average


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _trainable_names(module: nn.Module) -> list[str]:
    return [name for name, p in module.named_parameters() if p.requires_grad]


class RunCheckpoint(ModelCheckpoint):
    """Checkpoints that a run continues from bit for bit, wherever it was stopped.

    One that falls on the last step of an epoch is written after the validation that follows:
    a run continued from before it would leave that validation out, and the schedule that waits for
    its result. ``last.ckpt`` follows every epoch: Lightning's own moves only when a best is beaten,
    and a run killed on a long plateau would do all of the plateau again.
    """

    _postponed = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Save every n steps, but not yet at the end of an epoch."""
        self._postponed = trainer.is_last_batch
        if not self._postponed:
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after validation."""
        super().on_validation_end(trainer, pl_module)
        self._save_postponed(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after an epoch, validated or not."""
        super().on_train_epoch_end(trainer, pl_module)
        self._save_postponed(trainer, pl_module)
        if not self._should_skip_saving_checkpoint(trainer):  # among others, saved at this step
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_postponed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._postponed:
            self._postponed = False
            super().on_train_batch_end(trainer, pl_module, None, None, 0)


def forget_scores(checkpoint: dict[str, Any], monitor: str = "val/loss") -> None:
    """Take from a training checkpoint what was the best of a quantity, and how long ago.

    For a run that goes on with another loss, whose values cannot be compared with earlier ones:
    kept, a lower old score would leave the best checkpoint, early stopping and the schedule that
    waits for a plateau where they are for good.

    Args:
        checkpoint: Changed in place, before callbacks and schedules are restored.
        monitor: The quantity.
    """
    states: dict[str, dict[str, Any]] = checkpoint.get("callbacks", {})
    for key in list(states):
        watches = states[key].get("monitor", monitor if repr(monitor) in key else None)
        if watches == monitor and {"best_model_score", "best_score"} & set(states[key]):
            del states[key]
    plateau = checkpoint.get("plateau")
    if plateau is not None and plateau.get("monitor") == monitor:
        plateau.update(best=plateau["mode_worse"], num_bad_epochs=0)


class SaveBest(Callback):
    """Writes the best weights as a folder when the fit ends; a subclass says what, and how.

    Args:
        folder: Where to; by default ``product`` in the trainer's ``default_root_dir``.

    Attributes:
        product: What is saved, which names the folder and the callback's section: ``save_...``.
        attribute: Where the task keeps the module whose weights are saved.
    """

    product: ClassVar[str]
    attribute: ClassVar[str]

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the weights of the best checkpoint, or the last ones where there is none."""
        module: nn.Module = getattr(pl_module, self.attribute)
        folder = Path(self.folder or Path(trainer.default_root_dir) / self.product)
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        last = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        metadata: dict[str, Any] = {"epochs": trainer.current_epoch, "steps": trainer.global_step}
        if best:
            checkpoint = torch.load(best, map_location="cpu", weights_only=True)
            module.load_state_dict(weights_of(checkpoint, self.attribute))
            metadata = {
                "epochs": checkpoint["epoch"] + 1,
                "steps": checkpoint["global_step"],
                "validation": checkpoint.get("validation", {}),
                "validation_before": checkpoint.get("validation_before", {}),
                **{key: checkpoint[key] for key in _OLD if checkpoint.get(key)},
            }
        try:
            self.save(pl_module, folder, metadata)
        finally:
            module.load_state_dict(last)
        logger.info("%s saved in %s", self.product, folder)

    def save(self, pl_module: LightningModule, folder: Path, metadata: dict[str, Any]) -> None:
        """Write what the task has trained."""
        raise NotImplementedError(f"{type(self).__name__} does not define save()")


class SavePotential(SaveBest):
    """Writes the best weights as a potential folder when the fit ends, calibrated.

    What it may be off by is measured on the way, on training and validation set
    (:mod:`atomeq.potential.uncertainty`), on so many structures of each; where there are no labels
    to do so by, that is told.

    Args:
        folder: Where to; by default ``potential`` in the trainer's ``default_root_dir``.
        calibrate_on: Structures of the training set, at most; 0 leaves the calibration out. Of the
            validation set it takes a quarter as many.
    """

    product = attribute = "potential"

    def __init__(self, folder: str | None = None, *, calibrate_on: int = 2000) -> None:
        super().__init__(folder)
        self.calibrate_on = calibrate_on

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before the first step of a fit, what could not be saved after the last."""
        if stage == "fit":
            refuse_unsaveable(_predictor(pl_module))

    def save(self, pl_module: LightningModule, folder: Path, metadata: dict[str, Any]) -> None:
        """Save the potential, an ordinary one: low-rank updates are merged into its weights."""
        potential = merged(_predictor(pl_module))
        if isinstance(potential, Potential):
            potential = copy.deepcopy(potential).eval().requires_grad_(False)
            potential.uncertainty = None  # that of what the fit started from is of other weights
            if self.calibrate_on:
                save_potential(potential, folder, metadata=metadata)  # whatever comes of the rest
                metadata = {**metadata, **self._calibrated(potential, pl_module.trainer)}
        save_potential(potential, folder, metadata=metadata)

    def _calibrated(self, potential: Potential, trainer: Trainer) -> dict[str, Any]:
        """Give a potential its uncertainty; return what of it is told in the folder."""
        try:
            training = _few(trainer.train_dataloader, self.calibrate_on, potential)
            held_out = _few(trainer.val_dataloaders, self.calibrate_on // 4, potential)
            potential.uncertainty, coverage = calibrated(potential, training, held_out)
        except ValueError as error:
            logger.info("the potential does not know its uncertainty: %s", error)
            return {}
        return {"coverage": coverage}


def _few(loaders: Any, most: int, potential: Potential) -> Iterator[AtomGraph]:
    """Yield the first batches of one or several loaders, of so many structures or a few more."""
    n_structures = 0
    for loader in loaders if isinstance(loaders, list) else [loaders]:
        for batch in loader or ():
            if n_structures >= most:
                return
            n_structures += batch.n_graphs
            yield batch.to(potential.device)


def _predictor(module: LightningModule) -> Predictor:
    predictor = getattr(module, "potential", None)
    assert isinstance(predictor, Predictor)
    return predictor


def weights_of(checkpoint: dict[str, Any], attribute: str) -> dict[str, Tensor]:
    """Return the part of a training checkpoint that is one module's ``state_dict``.

    Args:
        checkpoint: As Lightning saved it.
        attribute: What the task calls the module: ``potential``, or ``model`` of a propagator.
    """
    prefix = f"{attribute}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
