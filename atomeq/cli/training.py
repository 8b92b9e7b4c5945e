"""``atomeq fit | validate | test | predict``: Lightning's command line over the task and the data.

``task:`` at the top of a configuration says what is trained: a potential, unless it names another
of ``TASKS``. A run lives in one folder, ``trainer.default_root_dir``: its configuration,
checkpoints, metrics and in the end the potential.
"""

import difflib
import inspect
import itertools
import json
import logging
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import ase.io
import torch
import yaml
from ase import Atoms
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from atomeq.cli.parsers.training import HELP
from atomeq.cli.terminal import show_table
from atomeq.data.ase_files import LabelKeys
from atomeq.data.datamodule import AtomisticDataModule, Split
from atomeq.data.nbody import NBodyRecipe
from atomeq.data.targets import ScalarTarget
from atomeq.files import write_atomically
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.to_structures import to_ase
from atomeq.models.registry import MODELS, PROPAGATORS
from atomeq.training.callbacks import (
    ExponentialMovingAverage,
    LogEpochs,
    RunCheckpoint,
    SavePotential,
)
from atomeq.training.losses import PotentialLoss, ScalarLoss
from atomeq.training.propagation import (
    MoleculeDataModule,
    NBodyDataModule,
    PropagationDataModule,
    PropagationTask,
    SavePropagator,
)
from atomeq.training.task import AtomisticTask
from atomeq.typing import PropertyKey

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskKind:
    """What can be trained: the task, its data, and what saves the result."""

    task: type[LightningModule]
    data: type[LightningDataModule]
    saver: type[Callback]

    @property
    def saver_section(self) -> str:
        """The section of a configuration that the saver's arguments stand in."""
        return "save_propagator" if self.saver is SavePropagator else "save_potential"


TASKS = {
    "potential": TaskKind(AtomisticTask, AtomisticDataModule, SavePotential),
    "propagation": TaskKind(PropagationTask, PropagationDataModule, SavePropagator),
}


class TrainingParser(LightningArgumentParser):
    """A parser whose errors name the closest key that exists."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Write the message with a suggestion and exit with code 2."""
        text = " ".join(message.split())
        sys.stderr.write(f"atomeq: error: {text}{_suggestion(text)}\n")
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
        with write_atomically(folder / "config.yaml") as partial:
            partial.write_text(self.parser.dump(self.config), encoding="utf-8")


class TrainingCLI(LightningCLI):
    """Adds the run's folder, averaged weights and result tables to Lightning's command line."""

    def __init__(self, args: list[str]) -> None:
        self.run_name = _run_name(args)
        self.kind = TASKS[_task_name(args)]
        super().__init__(
            self.kind.task,
            self.kind.data,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            parser_class=TrainingParser,
            parser_kwargs={"prog": "atomeq", **{k: {"description": v} for k, v in HELP.items()}},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands, each with those arguments of the trainer that are ours to give."""
        ours = {"model", "datamodule", "weights_only", "verbose", "return_predictions"}
        return {
            "fit": {*ours, "train_dataloaders", "val_dataloaders"},
            "validate": {*ours, "dataloaders"},
            "test": {*ours, "dataloaders"},
            "predict": {*ours, "dataloaders"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``task`` and the sections ``checkpoint``, ``ema`` and that of the saver."""
        parser.add_argument(
            "--task", default="potential", choices=list(TASKS), help="What is trained."
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ExponentialMovingAverage, "ema")
        parser.add_lightning_class_args(self.kind.saver, self.kind.saver_section)
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", _checkpoint_folder)
        parser.set_defaults(
            {
                "trainer.default_root_dir": f"runs/{self.run_name}",
                "trainer.inference_mode": False,
                "trainer.enable_model_summary": False,
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

    def _parse_ckpt_path(self) -> None:
        """Refuse a damaged checkpoint before anything is read or built."""
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path in (None, "last", "best"):
            return
        try:
            torch.load(path, map_location="meta", weights_only=True, mmap=True)
        except FileNotFoundError:
            raise
        except (RuntimeError, UnpicklingError, EOFError, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged or is not a checkpoint: {error}") from error

    def fit(self, **arguments: Any) -> None:
        """Train; nothing that a checkpoint holds is executed."""
        self.trainer.fit(weights_only=True, **arguments)

    def validate(self, **arguments: Any) -> None:
        """Print the errors of the validation set."""
        self.trainer.validate(verbose=False, weights_only=True, **arguments)
        _show_errors({"val": self.model.val_results}, self.model.metrics.columns)

    def test(self, **arguments: Any) -> None:
        """Print the errors of each test set and keep them as JSON in the run's folder."""
        self.trainer.test(verbose=False, weights_only=True, **arguments)
        _show_errors(self.model.test_results, self.model.metrics.columns)
        with write_atomically(self._run_folder() / "test_errors.json") as partial:
            partial.write_text(json.dumps(self.model.test_results, indent=2) + "\n")

    def predict(self, **arguments: Any) -> None:
        """Write the structures with what was predicted of them into the run's folder."""
        batches = self.trainer.predict(weights_only=True, **arguments)
        path = self._run_folder() / "predictions.extxyz"
        with write_atomically(path) as partial:
            for graph, prediction in batches or []:
                structures = _predicted(graph, prediction, self.model.target)
                ase.io.write(partial, structures, format="extxyz", append=True)
        logger.info("predictions written to %s", path)

    def _run_folder(self) -> Path:
        folder = Path(self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def main(argv: Sequence[str]) -> None:
    """Run a training command.

    Args:
        argv: ``fit``, ``validate``, ``test`` or ``predict`` and its arguments.

    Raises:
        SystemExit: Code 2 for configurations that do not fit.
        ValueError: Data, labels or checkpoints that cannot be used.
    """
    for registry in (MODELS, PROPAGATORS):  # so that YAML files may name a model without its module
        registry.import_all()
    try:
        with warnings.catch_warnings():
            _set_up_messages()
            TrainingCLI(list(argv))
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise ValueError(
            f"the checkpoint does not fit the model of this configuration: {error}"
        ) from error


def _set_up_messages() -> None:
    logging.getLogger("atomeq").setLevel(logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # batches are concatenated from memory
        ".*GPU available but not used.*",
        ".*The number of training batches.*is smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",  # a continued run
        ".*isinstance.treespec, LeafSpec.*",  # Lightning's own use of PyTorch
        ".*using a custom batch sampler.*",  # ours keeps every structure, in order
    ):
        warnings.filterwarnings("ignore", message=message)


def _run_name(args: Sequence[str]) -> str:
    """Return the name of the experiment's file, so that experiments do not share a folder."""
    name = "latest"
    for word, following in itertools.pairwise([*args, ""]):
        option, _, value = word.partition("=")
        if option in ("-c", "--config"):
            name = Path(value or following).stem
    return name


def _task_name(args: Sequence[str]) -> str:
    """Return what the command line or its configuration files train, the last one to say so."""
    name = "potential"
    for word, following in itertools.pairwise([*args, ""]):
        option, _, value = word.partition("=")
        if option in ("-c", "--config"):
            name = _named_in(Path(value or following)) or name
        elif option == "--task":
            name = value or following
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown; there are {', '.join(TASKS)}")
    return name


def _named_in(path: Path) -> str | None:
    """Return a file's ``task``; what is wrong with the file is for the parser to say."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return document.get("task") if isinstance(document, dict) else None


def _predicted(
    graph: AtomGraph, prediction: dict[PropertyKey, Tensor], target: ScalarTarget | None
) -> list[Atoms]:
    """Return structures with what was predicted of them: labels, or the scalar by its name."""
    bare = graph.replace(energy=None, forces=None, stress=None, scalar=None, weight=None)
    if target is None:
        labels = {"energy": prediction["energy"], "forces": prediction["forces"]}
        return to_ase(bare.replace(**labels))
    structures = to_ase(bare)
    for atoms, value in zip(structures, prediction["scalar"].tolist(), strict=True):
        atoms.info[target.name] = value
    return structures


def _checkpoint_folder(root: str | Path | None) -> str:
    return str(Path(root or ".") / "checkpoints")


def _show_errors(
    results: dict[str, dict[str, float]], columns: Mapping[str, tuple[str, str]]
) -> None:
    shown = [name for name in columns if any(name in errors for errors in results.values())]
    show_table(
        ["set", *("\n".join(columns[name]) for name in shown)],
        [
            [set_name, *(f"{errors[name]:.4g}" if name in errors else "-" for name in shown)]
            for set_name, errors in results.items()
        ],
    )


def _suggestion(message: str) -> str:
    """Return the key closest to the one that a message complains about."""
    found = re.search(r"(?:[Oo]ption '|unrecognized arguments: --)([\w.]+)", message)
    if found is None:
        return ""
    close = difflib.get_close_matches(found[1], _known_keys(), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _known_keys() -> set[str]:
    sections: dict[str, Any] = {
        "trainer": Trainer,
        "model": AtomisticTask,
        "model.loss": PotentialLoss,
        "model.scalar_loss": ScalarLoss,
        "model.target": ScalarTarget,
        "data": AtomisticDataModule,
        "data.recipe": NBodyRecipe,
        "data.split": Split,
        "data.labels": LabelKeys,
        "checkpoint": RunCheckpoint,
        "ema": ExponentialMovingAverage,
        "save_potential": SavePotential,
        "save_propagator": SavePropagator,
    }
    keys = {"seed_everything", "task", "config", "ckpt_path", "class_path", "init_args", *sections}
    for section, owner in sections.items():
        names = set(inspect.signature(owner).parameters)
        keys |= names | {f"{section}.{name}" for name in names}
    for data in (NBodyDataModule, MoleculeDataModule):
        keys |= {f"data.{name}" for name in inspect.signature(data).parameters}
    for model in (*MODELS.import_all(), *PROPAGATORS.import_all()):
        names = set(inspect.signature(model).parameters)
        keys |= names | {f"model.model.init_args.{name}" for name in names}
    return keys
