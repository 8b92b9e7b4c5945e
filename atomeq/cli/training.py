"""``atomeq fit | validate | test | predict``: Lightning's command line over the task and the data.

``task:`` at the top of a configuration says what is trained: a potential, unless it names another
of ``TASKS``. A run lives in one folder, ``trainer.default_root_dir``: its configuration,
checkpoints, metrics and in the end the potential.
"""

import difflib
import json
import logging
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import ase.io
import torch
import yaml
from ase import Atoms
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import atomeq.training.sharded  # noqa: F401 - trainer.strategy fsdp2
from atomeq.cli.errors import show_errors
from atomeq.cli.parsers.training import HELP, named_in_words
from atomeq.data.batching import LABELS
from atomeq.data.datamodule import AtomisticDataModule
from atomeq.data.targets import ScalarTarget
from atomeq.files import write_atomically
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.to_structures import to_ase
from atomeq.models.base import ConfiguredModule
from atomeq.models.registry import MODELS, PROPAGATORS
from atomeq.potential.checkpoint import load_potential
from atomeq.potential.folders import CONFIG_FILE
from atomeq.potential.mean import MeanPotential, rescaling_of, write_committee
from atomeq.propagation.callbacks import SavePropagator
from atomeq.propagation.datamodules import PropagationDataModule
from atomeq.propagation.task import PropagationTask
from atomeq.training.callbacks import (
    ExponentialMovingAverage,
    RunCheckpoint,
    SaveBest,
    SavePotential,
)
from atomeq.training.published import PublishedErrors
from atomeq.training.report import LogEpochs, ModelCard
from atomeq.training.task import AtomisticTask
from atomeq.typing import PropertyKey

logger = logging.getLogger(__name__)

# What a constructor refuses, where the parser tells it among the types that a model may be.
_NO_MODEL = re.compile(
    r"any of the Union subtypes.*?Errors:\s*- (.*?)\s*- Expected a <class 'NoneType'>", re.DOTALL
)


@dataclass(frozen=True)
class TaskKind:
    """What can be trained: the task, its data, and what saves the result."""

    task: type[LightningModule]
    data: type[LightningDataModule]
    saver: type[SaveBest]

    @property
    def saver_section(self) -> str:
        """The section of a configuration that the saver's arguments stand in."""
        return f"save_{self.saver.product}"


TASKS = {
    "potential": TaskKind(AtomisticTask, AtomisticDataModule, SavePotential),
    "propagation": TaskKind(PropagationTask, PropagationDataModule, SavePropagator),
}


class TrainingParser(LightningArgumentParser):
    """A parser whose errors name the closest key that exists."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Write the message with a suggestion and exit with code 2."""
        text = " ".join(message.split())
        sys.stderr.write(f"atomeq: error: {text}{_suggestion(text, set(self.keys()))}\n")
        sys.exit(2)

    def keys(self) -> Iterator[str]:
        """Yield every key of this parser and of those below it; a class has a parser of its own."""
        for action in self._actions:
            if isinstance(action.choices, Mapping):  # the subcommands
                for parser in action.choices.values():
                    yield from parser.keys()
            elif action.option_strings and not action.dest.endswith("help"):
                yield action.dest


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

    def __init__(self, args: list[str], *, member: int = 0) -> None:
        self.kind = TASKS[_task_name(args)]
        self.member, self.n_members, self.begins_late = member, 0, False
        self.replaced: list[Path] = []
        # A parser knows all arguments of all classes and is slow to build: that of this verb alone.
        verbs = {verb: skipped for verb, skipped in self.subcommands().items() if verb in args[:1]}
        self.subcommands = lambda: verbs
        super().__init__(
            self.kind.task,
            self.kind.data,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            trainer_defaults={"callbacks": [LogEpochs(quiet=sys.stderr.isatty()), ModelCard()]},
            parser_class=TrainingParser,
            parser_kwargs={"prog": "atomeq", **{v: {"description": HELP[v]} for v in verbs}},
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
        parser.add_argument(
            "--overwrite",
            type=bool,
            nargs="?",
            const=True,
            default=False,
            help="Replace what an earlier run left in trainer.default_root_dir.",
        )
        parser.add_argument(
            "--seeds",
            type=int | None,
            default=None,
            help="Fit as many potentials, from seed_everything on, to one committee.",
        )
        parser.add_argument(
            "--potential",
            type=str | None,
            default=None,
            help="A saved one by name or folder, to test, validate or predict by.",
        )
        parser.add_class_arguments(PublishedErrors, "published")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ExponentialMovingAverage, "ema")
        parser.add_lightning_class_args(self.kind.saver, self.kind.saver_section)
        parser.set_defaults(
            {
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
        config = self.config[self.config.subcommand]
        if config.seeds is not None:
            self.n_members, config["seeds"] = config.seeds, None  # what a member saves is its own
            self._refuse_no_committee(config)
            if type(config.seed_everything) is int:
                config.seed_everything += self.member

    def _refuse_no_committee(self, config: Namespace) -> None:
        if self.config.subcommand != "fit" or self.kind.task is not AtomisticTask:
            raise ValueError("seeds are of a fit of potentials, and nothing else makes a committee")
        if config.model.target is not None or self.n_members < 2:
            raise ValueError(
                f"a committee is of two potentials or more, not of {self.n_members} seeds"
                + (f" and the target {config.model.target}" if config.model.target else "")
            )

    def before_instantiate_classes(self) -> None:
        """Name the run's folder after its experiment, and refuse one that holds another run."""
        config = self.config[str(self.subcommand)]
        files = config.get("config") or ["latest"]
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = f"runs/{Path(str(files[-1])).stem}"
        if self.n_members:
            self._become_member(config)
        # Not kept: the saved configuration, run again, is asked again.
        overwrite, config["overwrite"] = config.overwrite, False
        if not getattr(
            rank_zero_only, "rank", 0
        ):  # the others start when this one has begun to write
            self._refuse_earlier_run(config, overwrite=overwrite)

    def _become_member(self, config: Namespace) -> None:
        """Keep this run and its potential apart from those of the other members."""
        root, name = Path(config.trainer.default_root_dir), f"seed-{self.member}"
        section = config[self.kind.saver_section]
        self.committee = Path(section.folder or root / "committee")
        section.folder = str(self.committee / name)
        config.trainer.default_root_dir = str(root / name)
        begun = any((root / name / "checkpoints").glob("last*.ckpt"))
        if config.get("ckpt_path") == "last" and not begun:
            config.ckpt_path, self.begins_late = None, True

    def _refuse_earlier_run(self, config: Namespace, *, overwrite: bool) -> None:
        folder = Path(config.trainer.default_root_dir)
        checkpoints = Path(config.checkpoint.dirpath or folder / "checkpoints")
        saved = Path(config[self.kind.saver_section].folder or folder / self.kind.saver.product)
        left = {
            "fit": [folder / "config.yaml", *checkpoints.glob("*.ckpt"), saved / CONFIG_FILE],
            "test": [folder / "test_errors.json"],
            "predict": [folder / "predictions.extxyz"],
        }
        found = [path for path in left.get(self.subcommand or "", []) if path.exists()]
        start = config.get("ckpt_path")
        goes_on = start == "last" or self.begins_late
        goes_on = goes_on or (start and checkpoints.resolve() in Path(start).resolve().parents)
        if not found or (self.subcommand == "fit" and goes_on):
            return
        if not overwrite:
            on = ", go on with it (--ckpt_path last)" if self.subcommand == "fit" else ""
            raise ValueError(
                f"{found[0]} is of an earlier run; name another folder (--trainer.default_root_dir)"
                f"{on} or replace it (--overwrite)"
            )
        # Of a fit; or a later --ckpt_path last would find the other run's.
        self.replaced = [*checkpoints.glob("*.ckpt"), *folder.glob("metrics/version_*")]

    def instantiate_classes(self) -> None:
        """Make data, task and trainer; what cannot be made of the configuration is one line."""
        try:
            self.config_init = self.parser.instantiate(self.config)
            self.datamodule = self._get(self.config_init, "data")
            self.model = self._get(self.config_init, "model")
            self.trainer = self.instantiate_trainer()
        except (OSError, ImportError):
            raise
        except ValueError as error:
            reason = _NO_MODEL.search(str(error))
            if reason is None:
                raise
            raise ValueError(f"the configuration cannot be built: {reason[1]}") from error
        except Exception as error:  # a constructor raises what it likes on values it cannot use
            raise ValueError(
                f"the configuration cannot be built: {type(error).__name__}: {error}"
            ) from error
        if (name := self._get(self.config, "potential")) is not None:
            given = self._get(self.config, "ckpt_path") is not None
            if given or self.subcommand == "fit" or not isinstance(self.model, AtomisticTask):
                raise ValueError(
                    "potential is what to test, validate or predict by in place of ckpt_path; a "
                    "fit starts from one by model.start_from, and a propagator is none"
                )
            self.model.use(name)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer with a CSV log in the run's folder, and a bar if there is a terminal."""
        config = self._get(self.config_init, "trainer")
        root = config["default_root_dir"]
        checkpoint = self._get(self.config_init, "checkpoint")
        checkpoint.dirpath = checkpoint.dirpath or os.path.abspath(Path(root) / "checkpoints")
        if config["logger"] is None:
            kwargs["logger"] = (
                CSVLogger(root, name="metrics") if self.subcommand == "fit" else False
            )
        callbacks = list(config["callbacks"] or [])
        if not sys.stderr.isatty():
            kwargs["enable_progress_bar"] = False
        elif not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks += [RichProgressBar()] if config["enable_progress_bar"] is not False else []
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)

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
        for path in self.replaced:  # now that everything could be built
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.trainer.fit(weights_only=True, **arguments)

    def validate(self, **arguments: Any) -> None:
        """Print the errors of the validation set."""
        self.trainer.validate(verbose=False, weights_only=True, **arguments)
        show_errors({"val": self.model.val_results}, self.model.metrics.columns)

    def test(self, **arguments: Any) -> None:
        """Print the errors of each test set and keep them as JSON in the run's folder."""
        self.trainer.test(verbose=False, weights_only=True, **arguments)
        published = self._get(self.config_init, "published")
        show_errors(self.model.test_results, self.model.metrics.columns, published)
        with write_atomically(self._run_folder() / "test_errors.json") as partial:
            partial.write_text(json.dumps(self.model.test_results, indent=2) + "\n")

    def predict(self, **arguments: Any) -> None:
        """Write the structures with what was predicted of them into the run's folder."""
        if self.trainer.world_size > 1:
            raise ValueError("predictions are written by one process; set trainer.devices to 1")
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
            cli = TrainingCLI(list(argv))
            for member in range(1, cli.n_members):
                TrainingCLI(list(argv), member=member)
            if cli.n_members and cli.trainer.is_global_zero:
                _make_committee(cli)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except RuntimeError as error:
        if "loading state_dict" in str(error):
            raise ValueError(
                f"the checkpoint does not fit the model of this configuration: {error}"
            ) from error
        if not _raised_by_lightning(error):
            raise
        raise ValueError(str(error)) from error


def _make_committee(cli: TrainingCLI) -> None:
    """Make the members one potential, its spread rescaled by the last one's validation set."""
    names, data = [f"seed-{k}" for k in range(cli.n_members)], cli.datamodule
    write_committee(cli.committee, names)
    if not isinstance(data, AtomisticDataModule) or data.heads or data.val_set is None:
        return
    try:
        committee = load_potential(cli.committee)
        assert isinstance(committee, MeanPotential)
        factors, _ = rescaling_of(committee, data.eval_loader(data.val_set))
    except ValueError as error:
        logger.info("the committee's spread is as it is: %s", error)
        return
    write_committee(cli.committee, names, rescaling=factors)


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
        ".*Total length of .* across ranks is zero.*",  # no validation set: the card says so
        ".*using a custom batch sampler.*",  # ours keeps every structure, in order
    ):
        warnings.filterwarnings("ignore", message=message)


def _raised_by_lightning(error: BaseException) -> bool:
    """Return whether Lightning, or a callback of its, says what the configuration does wrong."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith(("lightning.", "torchmetrics."))


def _task_name(args: Sequence[str]) -> str:
    """Return what the command line or its configuration files train, the last one to say so.

    It decides what the parser of everything else accepts, so it is looked for first.
    """
    files, task = named_in_words(args)
    named = [_named_in(Path(path)) for path in files]
    name = [name for name in ["potential", *named, task] if name][-1]
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
    bare = graph.replace(**dict.fromkeys((*LABELS, "weight")))
    if target is None:
        return to_ase(bare.replace(**prediction))
    structures = to_ase(bare)
    for atoms, value in zip(structures, prediction["scalar"].tolist(), strict=True):
        atoms.info[target.name] = value
    return structures


def _suggestion(message: str, keys: set[str]) -> str:
    """Return the key, or the class, closest to the one that a message complains about."""
    if found := re.search(r"(?:Option '|does not accept option '|arguments: --)([\w.]+)", message):
        wanted, known = found[1], {key: key for key in keys}
        ends = {key.rpartition(".")[2]: key for key in sorted(keys, reverse=True)}
        # --max_epochs is in a section, and --trainer.max_epoch_s is not far from it.
        known |= ends if "." not in wanted else {}
    elif found := re.search(r"Expected a path but (\w+) either", message):
        wanted = found[1]
        known = {
            name: name for name in _names_of(ConfiguredModule, Callback, Optimizer, LRScheduler)
        }
    else:
        return ""
    close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.6)
    return f"; did you mean {known[close[0]]!r}?" if close else ""


def _names_of(*classes: type) -> set[str]:
    below = {below for each in classes for below in each.__subclasses__()}
    return {each.__name__ for each in below} | (_names_of(*below) if below else set())
