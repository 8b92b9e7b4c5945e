"""What a fit tells: lines while it runs, in the end the card and the figures of its potential."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import __version__ as lightning_version
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from atomeq.data.batching import GraphDataset
from atomeq.data.datamodule import AtomisticDataModule
from atomeq.data.splits import DataFiles
from atomeq.files import write_atomically
from atomeq.potential.checkpoint import CONFIG_FILE, load_predictor
from atomeq.potential.heads import HeadedPotential
from atomeq.potential.potential import ELECTRIC, Potential
from atomeq.potential.predictor import Predictor
from atomeq.training.callbacks import ExponentialMovingAverage, SavePotential
from atomeq.training.figures import Parity, draw_learning_curve, draw_parity
from atomeq.training.task import AtomisticTask

logger = logging.getLogger(__name__)

_SECONDS = 10.0  # between two lines of progress within an epoch
_MOST_IN_PARITY = 500  # structures; a large set would take as long as an epoch

Row = dict[str, float]


class LogEpochs(Callback):
    """Logs what is trained, progress within an epoch, and a line for each: loss and errors.

    The lines are kept, and checkpoints hold them: a continued run knows how it began.

    Args:
        quiet: Whether something else shows the progress within an epoch.
        seconds: Between two lines of progress.
    """

    def __init__(self, *, quiet: bool = False, seconds: float = _SECONDS) -> None:
        self.quiet = quiet
        self.seconds = seconds
        self.rows: list[Row] = []
        self._started = self._told = self._cpu_started = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the lines so far."""
        return {"rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the lines of the run that goes on."""
        self.rows = [dict(row) for row in state_dict["rows"]]

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is trained."""
        before = self.rows[-1].get("cpu_s", 0.0) if self.rows else 0.0
        self._cpu_started = time.process_time() - before
        model: Any = getattr(pl_module, "potential", pl_module).model
        logger.info(
            "%s: %s; %d batches in an epoch",
            type(model).__name__,
            parameter_count(model),
            trainer.num_training_batches,
        )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started = self._told = time.perf_counter()

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log how far the epoch is, now and then."""
        now = time.perf_counter()
        if self.quiet or trainer.is_last_batch or now - self._told < self.seconds:
            return
        self._told = now
        done, total = batch_idx + 1, int(trainer.num_training_batches)
        left = (now - self._started) / done * (total - done)
        logger.info(
            "epoch %d  %d/%d batches, %.0f s left", trainer.current_epoch, done, total, left
        )

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the line."""
        units = {f"val/{name}": unit for name, (_, unit) in _columns(pl_module).items()}
        shown = ["train/loss", "val/loss", "val/energy_per_atom_mae", "val/forces_mae"]
        target = getattr(pl_module, "target", None)
        shown += [f"val/{target.name}_mae"] if target is not None else []
        values = {
            name: float(trainer.callback_metrics[name])
            for name in shown
            if name in trainer.callback_metrics
        }
        cpu = time.process_time() - self._cpu_started
        self.rows.append({"epoch": trainer.current_epoch, "cpu_s": cpu, **values})
        logger.info(
            "epoch %d  %s  %.1f s",
            trainer.current_epoch,
            "  ".join(f"{k} {v:.5g} {units.get(k, '')}".rstrip() for k, v in values.items()),
            time.perf_counter() - self._started,
        )


class ModelCard(Callback):
    """Writes README.md, the learning curve and parity plots beside the saved potential.

    The card says what the run knows. What it cannot know, where the labels come from and under
    which licence the weights may be used, is left to whoever passes them on, and says so.
    """

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the card, after the potential: it is read back from its folder."""
        saver = next((c for c in trainer.callbacks if isinstance(c, SavePotential)), None)  # pyright: ignore
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if saver is None or not isinstance(pl_module, AtomisticTask):
            return
        assert isinstance(data, AtomisticDataModule)
        folder = Path(saver.folder or Path(trainer.default_root_dir) / "potential")
        potential = pl_module.potential
        head = f"@{potential.names[0]}" if isinstance(potential, HeadedPotential) else ""
        saved = load_predictor(f"{folder}{head}", device=trainer.strategy.root_device)
        rows = [r for c in trainer.callbacks if isinstance(c, LogEpochs) for r in c.rows]  # pyright: ignore
        figures = []
        if rows:
            draw_learning_curve(folder / "learning_curve.png", rows)
            figures.append(
                "Learning curve: ![loss by epoch, error of forces by time](learning_curve.png)"
            )
        shown = data.val_set
        if head and shown is not None:  # those of the head that was loaded
            shown = GraphDataset([graph for graph in shown.graphs if int(graph["head"]) == 0])
        if shown:
            n_shown, pairs = _parity(saved, shown, pl_module)
            draw_parity(folder / "parity.png", pairs)
            figures.insert(
                0, f"On {n_shown} validation structures: ![predicted against label](parity.png)"
            )
        document = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        facts = _facts(saved, pl_module, data)
        settings = _settings(pl_module, trainer, data, document["metadata"])
        errors = _errors(pl_module, data, document["metadata"])
        _tell_progress(pl_module, document["metadata"])
        name = (
            Path(trainer.default_root_dir).resolve().name if saver.folder is None else folder.name
        )
        text = "\n\n".join(
            [
                f"# {name}",
                f"Trained by `atomeq fit` on {time.strftime('%Y-%m-%d')}. The run wrote this card "
                "and says what it knows; nothing but the validation set was looked at.",
                _table(facts),
                f"## Errors\n\n{errors}",
                f"## Training\n\n{_table(settings)}",
                *figures,
            ]
        )
        with write_atomically(folder / "README.md") as partial:
            partial.write_text(text + "\n", encoding="utf-8")


def parameter_count(module: nn.Module) -> str:
    """Return how many parameters a network has, and how many of them are trained, in words."""
    total = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return f"{total:,} parameters" + ("" if trained == total else f", {trained:,} of them trained")


def _columns(module: LightningModule) -> dict[str, tuple[str, str]]:
    return dict(getattr(getattr(module, "metrics", None), "columns", {}))


def _parity(
    predictor: Predictor, dataset: GraphDataset, task: AtomisticTask
) -> tuple[int, list[Parity]]:
    """Return how many structures were predicted, and their labels beside their predictions."""
    keys = tuple(key for key in task.evaluated("val") if key in dataset.labels)
    device = next(predictor.parameters()).device
    found: dict[str, tuple[list[float], list[float]]] = {key: ([], []) for key in keys}
    chosen = range(0, len(dataset), -(-len(dataset) // _MOST_IN_PARITY))
    for index in chosen:
        graph = dataset[index].to(device)
        with torch.enable_grad():
            prediction = predictor(graph, keys, create_graph=False)
        for key in keys:
            label = getattr(graph, key)
            per_atom = graph.natoms if key == "energy" else 1
            for values, tensor in zip(found[key], (label, prediction[key]), strict=True):
                values += (tensor.detach() / per_atom).flatten().tolist()
    names = {"energy": ("energy", "eV/atom"), "forces": ("forces", "eV/Å")}
    names["stress"] = ("stress", "eV/Å³")
    units = dict.fromkeys(ELECTRIC, "e·Å²") | {"dipole": "e·Å", "born_effective_charges": "e"}
    units["polarizability"] = "e²·Å²/eV"
    names |= {key: (key.replace("_", " "), unit) for key, unit in units.items()}
    if task.target is not None:
        names["scalar"] = (task.target.name, task.target.unit)
    return len(chosen), [Parity(*names[key], *found[key]) for key in keys]


def _facts(saved: Predictor, task: AtomisticTask, data: AtomisticDataModule) -> dict[str, str]:
    target = task.target
    derived = "forces and stress are its derivatives" if saved.conservative else "forces by a head"
    what = f"energy; {derived}" if target is None else f"{target.name} [{target.unit}], no energy"
    if isinstance(saved, Potential) and saved.electric:
        what = ", ".join(
            [what] * saved.gives_energies + [key.replace("_", " ") for key in saved.electric]
        )
    load = "load_potential" if target is None else "load_predictor"
    return {
        "model": f"`{saved.model.config()['class_path']}`: "
        f"{parameter_count(task.potential.model)}, cutoff {saved.model.cutoff:g} Å",
        "predicts": what,
        "elements": ", ".join(f"Z = {z}" for z in saved.elements),
        "dtype": str(saved.dtype).removeprefix("torch."),
        "loaded by": f"`{load}(FOLDER)`",
        **_data_facts(data),
        "level of theory": "TO BE FILLED IN: what computed the labels",
        "licence": "TO BE FILLED IN: of the weights, and of the data they were trained on",
    }


def _data_facts(data: AtomisticDataModule) -> dict[str, str]:
    files = {"trained on": data.train_files, "validated on": data.val_files}
    facts = {
        what: ", ".join(Path(path).name for path in _flat(given))
        for what, given in files.items()
        if given is not None
    }
    if data.heads:
        facts["heads"] = ", ".join(data.heads) + "; facts and figures here are of the first"
    counts = {"to train": data.train_set, "to validate": data.val_set}
    facts["structures"] = ", ".join(f"{len(s)} {n}" for n, s in counts.items() if s is not None)
    if data.val_files is None:
        facts["split"] = f"`{data.split}`"
    return facts


def _flat(files: DataFiles | dict[str, DataFiles]) -> list[str]:
    if isinstance(files, dict):
        return [path for given in files.values() for path in _flat(given)]
    return [str(path) for path in files] if isinstance(files, list) else [str(files)]


def _errors(task: AtomisticTask, data: AtomisticDataModule, saved: dict[str, Any]) -> str:
    known, before = saved.get("validation", {}), saved.get("validation_before", {})
    if data.val_set is None or not known:
        return "None are known: the saved weights were not validated."
    rows = [
        f"| {title} | {f'{before[key]:.4g} | ' if before else ''}{known[key]:.4g} | {unit} |"
        for key, (title, unit) in task.metrics.columns.items()
        if key in known
    ]
    head = ("| error | before | after | unit |", "|---|---|---|---|")
    table = "\n".join([*(head if before else ("| error | | unit |", "|---|---|---|")), *rows])
    return (
        f"On the {len(data.val_set)} validation structures, which chose the epoch: errors on "
        "structures that had no say in it tend to be larger. `atomeq test` measures those.\n\n"
        + table
        + _forgetting(task, data, saved)
    )


def _forgetting(task: AtomisticTask, data: AtomisticDataModule, saved: dict[str, Any]) -> str:
    before, after = saved.get("old_data_before", {}), saved.get("old_data", {})
    if data.replay is None or data.old_val_set is None or not (before and after):
        return ""
    labels = "own labels" if data.replay.labels == "files" else "labels are the old potential's"
    rows = [
        f"| {title} | {before[key]:.4g} | {after[key]:.4g} | {unit} |"
        for key, (title, unit) in task.metrics.columns.items()
        if key in before and key in after
    ]
    return (
        f"\n\nWhat was forgotten: errors on {len(data.old_val_set)} held-out structures of the old "
        f"data ({labels}).\n\n"
        + "\n".join(["| error | before | after | unit |", "|---|---|---|---|", *rows])
    )


def _tell_progress(task: AtomisticTask, saved: dict[str, Any]) -> None:
    for key, what in (("validation", "validation errors"), ("old_data", "errors on old data")):
        before, after = saved.get(f"{key}_before", {}), saved.get(key, {})
        changes = [
            f"{title} {before[key]:.4g} to {after[key]:.4g} {unit}"
            for key, (title, unit) in task.metrics.columns.items()
            if key in before and key in after
        ]
        if changes:
            logger.info("training changed the %s: %s", what, ", ".join(changes))


def _settings(
    task: AtomisticTask, trainer: Trainer, data: AtomisticDataModule, saved: dict[str, Any]
) -> dict[str, str]:
    optimizer = trainer.optimizers[0]
    averages = [c for c in trainer.callbacks if isinstance(c, ExponentialMovingAverage)]  # pyright: ignore
    batch = {k: getattr(data, f"max_{k}") for k in ("structures", "atoms", "edges")}
    limits = ", ".join(f"{n} {k}" for k, n in batch.items() if n is not None)
    rates = {k: v for k, v in optimizer.defaults.items() if k in ("lr", "weight_decay", "betas")}
    return {
        "epochs, steps": f"{saved['epochs']}, {saved['steps']} of {trainer.current_epoch}, "
        f"{trainer.global_step}",
        "loss": f"`{task.loss_text()}`",
        "offset of stress labels": f"{task.stress_offset:.5g} eV/Å³",
        "optimizer": f"{type(optimizer).__name__} {json.dumps(rates)}",
        "schedule": "none" if task.scheduler is None else _schedule(trainer),
        "batch": f"at most {limits}, on each of {trainer.world_size} devices",
        "averaged weights": f"decay {averages[0].decay:g}" if averages else "none",
        "gradients clipped at": f"{trainer.gradient_clip_val}",
        "started from": f"{task.start_from or 'random weights'}",
        "precision": f"{trainer.precision} on {trainer.strategy.root_device.type}",
        "software": f"torch {torch.__version__}, lightning {lightning_version}",
        "configuration": "`config.yaml` in the folder of the run",
    }


def _schedule(trainer: Trainer) -> str:
    used = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
    return used[0] if used else "ReduceLROnPlateau"


def _table(facts: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.items())])
