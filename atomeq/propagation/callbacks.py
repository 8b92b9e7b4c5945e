"""SavePropagator: the best weights of a fit as a folder."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from atomeq.propagation.checkpoint import refuse_unsaveable, save_propagator
from atomeq.propagation.datamodules import PropagationDataModule
from atomeq.propagation.long_step import LongStep
from atomeq.propagation.task import PropagationTask
from atomeq.training.callbacks import SaveBest


class SavePropagator(SaveBest):
    """Writes the best weights as a propagator folder when the fit ends.

    Args:
        folder: Where to; by default ``propagator`` in the trainer's ``default_root_dir``.
    """

    product = "propagator"
    attribute = "model"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a network that does not fit the data or cannot be saved, before the first step."""
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(pl_module, PropagationTask)
        assert isinstance(data, PropagationDataModule)
        self.step = LongStep(pl_module.model, data.view)
        if stage == "fit":
            refuse_unsaveable(self.step)

    def save(self, pl_module: LightningModule, folder: Path, metadata: dict[str, Any]) -> None:
        """Save the network with what it is shown."""
        save_propagator(self.step, folder, metadata=metadata)
