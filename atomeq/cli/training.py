"""``atomeq fit | validate | test | predict``: Lightning's command line over the task and the data.

A run lives in one folder, ``trainer.default_root_dir``: its configuration, checkpoints, metrics and
in the end the potential.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table

from atomeq.data.datamodule import AtomisticDataModule
from atomeq.training.callbacks import ExponentialMovingAverage, LogEpochs, SavePotential
from atomeq.training.metrics import UNITS
from atomeq.training.task import AtomisticTask

logger = logging.getLogger(__name__)


class TrainingParser(LightningArgumentParser):
    """A parser whose errors name the closest key that exists."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Write the message with a suggestion and exit with code 2."""
        text = " ".join(message.split())
        sys.stderr.write(f"{self.prog}: error: {text}{_suggestion(text, self)}\n")
        sys.exit(2)


class SaveConfig(SaveConfigCallback):
    """Writes the configuration into the folder of the run, under a temporary name first."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Save the configuration of a fit; other commands leave the run's folder alone."""
        if stage != "fit" or self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".config.{os.getpid()}.yaml"
        self.parser.save(
            self.config, str(partial), skip_none=False, overwrite=True, multifile=False
        )
        os.replace(partial, folder / "config.yaml")


class TrainingCLI(LightningCLI):
    """Adds the run's folder, averaged weights and result tables to Lightning's command line."""

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            AtomisticTask,
            AtomisticDataModule,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            parser_class=TrainingParser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections ``checkpoint``, ``ema`` and ``save_potential``."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ExponentialMovingAverage, "ema")
        parser.add_lightning_class_args(SavePotential, "save_potential")
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", _checkpoint_folder)
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs/latest",
                "trainer.inference_mode": False,
                "checkpoint.filename": "best",
                "checkpoint.monitor": "val/loss",
                "checkpoint.save_last": True,
                "checkpoint.enable_version_counter": False,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what was given, whatever the process itself was called with."""
        self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """Make data, task and trainer."""
        self.config_init = self.parser.instantiate(self.config)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with a CSV log in the run's folder, and a bar if there is a terminal."""
        config = self._get(self.config_init, "trainer")
        if config["logger"] is None:
            root = config["default_root_dir"]
            kwargs["logger"] = (
                CSVLogger(root, name="metrics") if self.subcommand == "fit" else False
            )
        callbacks = list(config["callbacks"] or [])
        if not sys.stderr.isatty():
            kwargs["enable_progress_bar"] = False
        elif not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks += [RichProgressBar()] if config["enable_progress_bar"] is not False else []
        return super().instantiate_trainer(callbacks=[*callbacks, LogEpochs()], **kwargs)

    def after_test(self) -> None:
        """Print the errors of each test set and keep them as JSON in the run's folder."""
        results = self.model.test_results
        Console(width=None if sys.stdout.isatty() else 160).print(_error_table(results))
        _write_json(Path(self.trainer.default_root_dir) / "test_errors.json", results)


def main(argv: Sequence[str]) -> None:
    """Run a training command.

    Args:
        argv: ``fit``, ``validate``, ``test`` or ``predict`` and its arguments.

    Raises:
        SystemExit: Code 2 for configurations that do not fit.
        ValueError: Data, labels or checkpoints that cannot be used.
    """
    logging.getLogger("atomeq").setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            _quiet_lightning()
            TrainingCLI(list(argv))
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error


def _quiet_lightning() -> None:
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # batches are concatenated from memory
        ".*GPU available but not used.*",
        ".*The number of training batches.*is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",  # a continued run
        ".*isinstance.treespec, LeafSpec.*",  # Lightning's own use of PyTorch
    ):
        warnings.filterwarnings("ignore", message=message)


def _checkpoint_folder(root: str | os.PathLike[str] | None) -> str:
    return str(Path(root or ".") / "checkpoints")


def _error_table(results: dict[str, dict[str, float]]) -> Table:
    table = Table(title="test errors", box=None, pad_edge=False)
    table.add_column("set")
    shown = [name for name in UNITS if any(f"{name}_mae" in errors for errors in results.values())]
    for name in shown:
        for kind in ("MAE", "RMSE"):
            table.add_column(f"{name} {kind}\n{UNITS[name]}", justify="right")
    for set_name, errors in results.items():
        cells = [
            f"{errors[key]:.4g}" if key in errors else "-"
            for name in shown
            for key in (f"{name}_mae", f"{name}_rmse")
        ]
        table.add_row(set_name, *cells)
    return table


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _suggestion(message: str, parser: LightningArgumentParser) -> str:
    """Return the key closest to the one that a message complains about."""
    return ""
