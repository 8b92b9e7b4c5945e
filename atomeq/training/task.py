"""AtomisticTask: what Lightning trains, a predictor with its loss, optimizer and errors."""

import logging
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from atomeq.data.batching import GraphDataset
from atomeq.data.datamodule import AtomisticDataModule
from atomeq.data.targets import ScalarTarget, known_target
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.convert import Structures
from atomeq.models.base import AtomisticModel
from atomeq.ops.precision import checked_precision
from atomeq.potential.checkpoint import load_predictor
from atomeq.potential.scalar import ScalarPredictor
from atomeq.potential.terms import EnergyTerm
from atomeq.training.callbacks import forget_scores
from atomeq.training.distributed import is_empty_share, joint_counts, joint_structures
from atomeq.training.electrons import Electrons
from atomeq.training.losses import Loss, PotentialLoss, ScalarLoss, loss_of
from atomeq.training.low_rank import LoRA
from atomeq.training.metrics import ErrorMetric, PotentialErrors, ScalarErrors
from atomeq.training.normalisation import PotentialSource, Shift
from atomeq.training.not_finite import not_finite_loss
from atomeq.training.optimizers import refuse_two_averages, save_averages, train_or_eval
from atomeq.training.parameters import Decay, freeze_parts, make_optimizer
from atomeq.training.preparation import predictor_to_train, prepare, with_neighbor_count
from atomeq.training.random_state import get_rng_states, set_own_rng_state
from atomeq.training.recomputed import predicted, refuse_to_recompute
from atomeq.training.schedules import RunSchedule, total_steps
from atomeq.training.stages import Stage, forget_best, forget_moments, stage_of
from atomeq.training.stress_offset import without_offset
from atomeq.typing import Precision, PropertyKey

logger = logging.getLogger(__name__)


class AtomisticTask(LightningModule):
    """Train an interatomic potential on energies, forces and stresses, or a scalar of molecules.

    Args:
        model: The network; by default that of the potential it starts from.
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes the learning-rate schedule from the optimizer; stepped each epoch, or each
            step where it is a :class:`~atomeq.training.schedules.RunSchedule`, or at the end of
            each validation where it is Lightning's ``ReduceLROnPlateau``.
        decay: What the optimizer's weight decay acts on: ``all`` parameters, or ``weights`` but
            neither biases nor normalisations.
        rates: Factor of the learning rate by part of the network, ``layers.0`` or ``*``; 0 freezes
            it, and of several that name a parameter the last one counts.
        lora: Low-rank updates that are trained in place of the potential that is started from.
        heads: Names of several heads on one network, levels of theory or tasks; ``data.train``
            then has the files of each by name.
        loss: Coefficients and kind of the loss of a potential.
        stages: Losses from later epochs or steps on. A stage begins anew to look for the best
            weights, for its ``val/loss`` is another one.
        stress_offset: Pressure in the stress labels that is no derivative of the energies, eV/Å³:
            it is taken from their diagonal.
        scalar_loss: Kind of the loss of a target.
        target: A scalar to learn in place of a potential, by name (``gap``, ``alpha``, ...) or
            spelled out with its unit and readout.
        references: Shift per element: fitted to the training labels by ``least_squares``, read
            from a file of isolated atoms, given by element symbol, ``none``, or, for a known
            target, the published ``atoms``. By default least squares, and for a mean none. Of a
            potential that is started from, least squares of what it misses move its references to
            the energies of the data; ``none`` keeps them.
        scale: eV per unit of the network's output: ``forces`` is the rms of the training force
            components, ``energy`` the rms per atom of what the shift leaves of the energies, a
            number is taken as it is. By default the forces; a target is scaled by its own spread.
        offset: eV of every structure, whatever its size: the mean of OC20's energies, by which its
            models are normalised. Not extensive, so zero for any other data.
        train_references: Train the shift of the elements with the network.
        train_scale: Train the scale as well, from then on one of each element.
        avg_num_neighbors: ``auto``: the network divides by the mean number of neighbours in the
            training structures, which is saved with it. ValueError beside ``start_from``.
        terms: Known physics added to the network, which learns what it leaves of the labels:
            ``zbl``, ``d3`` (of PBE), or any by ``class_path``.
        metrics: What validation and tests report; by default :class:`PotentialErrors`, or
            :class:`ScalarErrors` of a target.
        start_from: Name or folder of a potential with the same model, whose weights, references and
            terms training starts from (fine-tuning); its scale and offset stay. Validation errors
            before the first step are told and kept beside those after the last.
        conservative: Of a potential with heads for forces or stress that is started from, train
            the network without them: its forces and stress are derivatives of the energy.
        precision: How coarse the operands of tensor products may be on a GPU: ``highest`` (fp32),
            ``high`` (TF32), ``medium`` (bfloat16). The trained potential recommends it. Gradients
            of weights, and what is plain torch, follow torch's own setting.
        electrons: Total charges and multiplicities that the model is told of, or ignores;
            structures that carry others are refused.
        recompute: Structures whose activations are held at once; those of the others in a batch
            are computed again for the gradient, which takes less memory and more time.

    Example:
        >>> task = AtomisticTask(model, optimizer=torch.optim.AdamW)  # doctest: +SKIP
        >>> trainer.fit(task, datamodule=data)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: AtomisticModel | None = None,
        *,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        decay: Decay = "all",
        rates: dict[str, float] | None = None,
        lora: LoRA | None = None,
        heads: list[str] | None = None,
        target: str | ScalarTarget | None = None,
        loss: PotentialLoss | None = None,
        stages: list[Stage] | None = None,
        stress_offset: float = 0.0,
        scalar_loss: ScalarLoss | None = None,
        references: Shift | None = None,
        scale: float | Literal["forces", "energy"] | None = None,
        offset: float = 0.0,
        train_references: bool = False,
        train_scale: bool = False,
        avg_num_neighbors: Literal["auto"] | None = None,
        terms: list[Literal["zbl", "d3"] | EnergyTerm] | None = None,
        metrics: ErrorMetric | None = None,
        start_from: PotentialSource | None = None,
        conservative: bool = False,
        precision: Precision | None = None,
        electrons: Electrons | None = None,
        recompute: int | None = None,
    ) -> None:
        super().__init__()
        self.target = known_target(target) if target is not None else None
        self.start_from = start_from
        self.trained_references = ["shift"] * train_references + ["scale"] * train_scale
        self.potential = predictor_to_train(  # here, before the averaged weights are copied
            *(model, self.target, start_from, conservative),
            terms=terms or (),
            lora=lora,
            heads=heads,
            trained=self.trained_references,
            electrons=electrons,
        )
        self.measure_neighbors = avg_num_neighbors == "auto"
        if self.measure_neighbors and start_from is not None:
            raise ValueError("avg_num_neighbors is that of the potential that is started from")
        freeze_parts(self.potential, rates or {})
        refuse_to_recompute(self.potential, recompute)
        self.rates, self.recompute = rates, recompute
        self.potential.precision = checked_precision(precision) or self.potential.precision
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.decay: Decay = decay
        self.loss = loss_of(self.target, loss, scalar_loss, staged=bool(stages))
        self.stages = stages or []
        self.losses: list[Loss] = [self.loss, *(stage.loss for stage in self.stages)]
        self.stress_offset = stress_offset
        self.reference_source = references
        self.scale_source: float | Literal["forces", "energy"] | None = scale
        self.offset = offset
        self.metrics = metrics or (ScalarErrors(self.target) if self.target else PotentialErrors())
        self._begin()

    def _begin(self) -> None:
        """Know nothing yet of the run."""
        self.errors = nn.ModuleDict({"val": self.metrics.clone()})
        self.val_loss = MeanMetric()
        self.test_results: dict[str, dict[str, float]] = {}
        self.val_results: dict[str, float] = {}
        self.start_results: dict[str, float] = {}
        self.old_results: dict[str, float] = {}
        self.old_start_results: dict[str, float] = {}
        self._stage = 0
        self._plateau: ReduceLROnPlateau | None = None
        self._plateau_state: dict[str, Any] | None = None
        self._properties: dict[str, tuple[PropertyKey, ...]] = {}
        self._rng_state: Any = None
        self._loaded = False
        self.neighbor_count: float | None = None

    def use(self, name: str | Path) -> None:
        """Take a saved predictor, and the stress offset it was trained with, to test or predict by.

        Args:
            name: As of :func:`~atomeq.potential.checkpoint.load_predictor`.

        Raises:
            ValueError: It predicts something else than this task trains.
        """
        predictor = load_predictor(name)
        if isinstance(predictor, ScalarPredictor) != (self.target is not None):
            trained = self.target.name if self.target else "energies"
            raise ValueError(f"{name} does not predict what this experiment trains, {trained}")
        self.potential, self._loaded = predictor, True

    def build_graph(self, structures: Structures) -> AtomGraph:
        """Return graphs for this potential, on the CPU; its elements are not known yet."""
        return self.potential.model.graph_builder()(structures)

    def setup(self, stage: str) -> None:
        """Check the labels and, before a fit, set the references from the training structures."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, AtomisticDataModule):
            raise TypeError("AtomisticTask is trained with an AtomisticDataModule as datamodule")
        if stage == "fit":
            prepare(self, data)  # a checkpoint, loaded after this, replaces what is fitted there
        sets = {**data.val_sets, **{f"test/{n}": s for n, s in data.test_sets.items()}}
        for name, dataset in sets.items():
            self._properties[name] = self._evaluated(dataset)
        self.errors.update({_key(name): self.metrics.clone() for name in sets if name != "val"})

    def training_step(self, batch: AtomGraph, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        self._enter_stage()
        prediction = predicted(self.potential, batch, self.loss.properties, self.recompute)
        batch = without_offset(batch, self.stress_offset)
        with joint_counts():
            terms = self.loss(prediction, batch)
            n_structures = joint_structures(batch)
        if not bool(torch.isfinite(terms["loss"])):  # here, before the weights are lost as well
            self._stop_at(batch)
        self.log_dict(
            {f"train/{name}": term.detach() for name, term in terms.items()},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=n_structures,
        )
        return terms["loss"]

    def _enter_stage(self) -> None:
        """Minimise the loss of the stage that is on."""
        trainer: Any = self.trainer
        stage = stage_of(self.stages, trainer.current_epoch, trainer.global_step)
        if stage == self._stage:
            return
        forget_best(trainer.callbacks, self._stage + 1, rename=trainer.is_global_zero)
        forget_moments(trainer.optimizers)
        if self._plateau is not None:
            self._plateau._reset()
        self._take_stage(stage)
        logger.info("stage %d: %s", stage + 1, self.loss)

    def _take_stage(self, stage: int) -> None:
        self._stage, self.loss = stage, self.losses[stage]

    def set_neighbor_count(self, count: float) -> None:
        """Let the network divide sums over neighbours by another count; its weights stay."""
        self.potential.model = with_neighbor_count(self.potential.model, count)
        self.neighbor_count = count

    def _stop_at(self, batch: AtomGraph) -> NoReturn:
        """Raise what is known of a loss that is NaN or infinite, with its structures written."""
        trainer: Any = self.trainer
        raise not_finite_loss(
            self.potential,
            self.loss,
            batch,
            step=trainer.global_step,
            place=trainer.datamodule.train_set.place,
            path=Path(trainer.default_root_dir) / f"not_finite_{trainer.global_rank}.extxyz",
        )

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiate by what is trained, not by the positions that forces are derivatives by."""
        loss.backward(*args, inputs=[p for p in self.parameters() if p.requires_grad], **kwargs)

    def validation_step(self, batch: AtomGraph, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the validation errors, those of new or of old data."""
        name = list(self.trainer.datamodule.val_sets)[dataloader_idx]  # pyright: ignore
        batch = without_offset(batch, self.stress_offset)
        prediction = self._evaluate(batch, name)
        labelled = set(self.loss.labels) <= set(prediction) and not is_empty_share(batch)
        if name == "val" and labelled:
            loss = self.loss(prediction, batch)["loss"].detach()
            self.val_loss.update(loss, weight=batch.n_graphs)

    def on_validation_epoch_end(self) -> None:
        """Log the errors of the validation set, and tell them to a plateau schedule."""
        if "old" in self.trainer.datamodule.val_sets:  # pyright: ignore
            self.old_results = self._told("old")
            self.log_dict({f"old/{name}": value for name, value in self.old_results.items()})
        results = self._results("val")
        if self.val_loss.update_called:
            results["loss"] = self.val_loss.compute()
            self.val_loss.reset()
        for name, value in results.items():
            main = ("loss", "energy_per_atom_mae", "forces_mae", "dipole_mae")
            shown = name in main or self.target is not None
            self.log(f"val/{name}", value, prog_bar=shown)
        self.val_results = {name: float(value) for name, value in results.items()}
        if self._plateau is not None and self.trainer.state.fn == "fit":
            self._step_plateau(self._plateau)

    def _step_plateau(self, schedule: ReduceLROnPlateau) -> None:
        """Step here, before the checkpoint is written: Lightning leaves it out after a resume."""
        name = schedule.monitor.removeprefix("val/")
        if name not in self.val_results:
            known = ", ".join(f"val/{key}" for key in self.val_results)
            raise ValueError(f"the schedule watches {schedule.monitor!r}; there is {known}")
        if not self.trainer.sanity_checking:
            schedule.step(self.val_results[name])

    def test_step(self, batch: AtomGraph, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the errors of its test set."""
        batch = without_offset(batch, self.stress_offset)
        self._evaluate(batch, self._test_set_name(dataloader_idx))

    def on_test_epoch_end(self) -> None:
        """Keep and log the errors of each test set under its name."""
        for index in range(len(self.trainer.datamodule.test_names)):  # pyright: ignore
            name = self._test_set_name(index)
            results = self._results(name)
            self.log_dict({f"{name}/{key}": value for key, value in results.items()})
            self.test_results[name.removeprefix("test/")] = {
                key: float(value) for key, value in results.items()
            }

    def predict_step(
        self, batch: AtomGraph, batch_idx: int, dataloader_idx: int = 0
    ) -> tuple[AtomGraph, dict[PropertyKey, Tensor]]:
        """Return a batch and its energies, forces and moments, or its scalar."""
        derived = ("stress", "born_effective_charges")
        properties = tuple(key for key in self.potential.learnable if key not in derived)
        with torch.enable_grad():
            prediction = self.potential(batch, properties, create_graph=False)
        return batch, prediction

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer and its schedule."""
        optimizer = make_optimizer(self.optimizer, self, self.decay, self.rates)
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            self._plateau = scheduler
            if self._plateau_state is not None:
                scheduler.load_state_dict(self._plateau_state)
            return optimizer
        per_step = isinstance(scheduler, RunSchedule)
        if per_step:
            data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
            scheduler.set_total_steps(total_steps(self.trainer, data.n_training_batches()))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "interval": "step" if per_step else "epoch",
            },
        }

    def on_validation_start(self) -> None:
        """Refuse a trainer under which forces cannot be derived."""
        self._refuse_inference_mode()
        train_or_eval(self.trainer.optimizers, train=False)

    def on_validation_end(self) -> None:
        """Train on, after callbacks have saved what was validated."""
        if self.trainer.state.fn == "fit":
            train_or_eval(self.trainer.optimizers, train=True)

    def on_train_end(self) -> None:
        """Leave the weights that are validated."""
        train_or_eval(self.trainer.optimizers, train=False)

    def on_test_start(self) -> None:
        """Refuse a trainer under which forces cannot be derived, and untrained weights."""
        self._refuse_inference_mode()
        self._refuse_untrained()

    def on_predict_start(self) -> None:
        """Refuse a trainer under which forces cannot be derived, and untrained weights."""
        self._refuse_inference_mode()
        self._refuse_untrained()

    def on_train_start(self) -> None:
        """Measure what is started from, and restore the random state of a run that goes on."""
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        refuse_two_averages(self.trainer.optimizers, self.trainer.callbacks)  # pyright: ignore
        train_or_eval(self.trainer.optimizers, train=True)
        if self.start_from is not None and not self._loaded:
            self.start_results = self._errors_before_training("val", data)
            self.old_start_results = self._errors_before_training("old", data)
        if self._rng_state is not None:
            set_own_rng_state(self._rng_state, self.global_rank)
            self._rng_state = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the random state, the loss and the validation errors of these weights."""
        checkpoint["rng_state"] = get_rng_states()
        save_averages(checkpoint, self.trainer)
        checkpoint["loss"], checkpoint["stage"] = self.loss_text(), self._stage
        checkpoint["avg_num_neighbors"] = self.neighbor_count
        checkpoint["validation"] = dict(self.val_results)
        checkpoint["validation_before"] = dict(self.start_results)
        checkpoint["old_data"] = dict(self.old_results)
        checkpoint["old_data_before"] = dict(self.old_start_results)
        if self._plateau is not None:
            checkpoint["plateau"] = self._plateau.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take what is restored when there are optimizers and training starts."""
        self._loaded = True
        for name in ("value", "n_steps"):  # buffers that a fitted offset once had
            checkpoint["state_dict"].pop(f"stress_offset.{name}", None)
        if (count := checkpoint.get("avg_num_neighbors")) is not None:
            self.set_neighbor_count(count)
        # Checkpoints of before this was written down say nothing, and are taken as they are.
        if checkpoint.get("loss", self.loss_text()) != self.loss_text():
            logger.info("the loss is another one: the lowest val/loss so far no longer counts")
            forget_scores(checkpoint)
        self._take_stage(min(checkpoint.get("stage", 0), len(self.stages)))
        self.start_results = checkpoint.get("validation_before", {})
        self.old_start_results = checkpoint.get("old_data_before", {})
        self._rng_state = checkpoint.get("rng_state")
        self._plateau_state = checkpoint.get("plateau")

    def loss_text(self) -> str:
        """Return the loss and those of later stages in words."""
        return ", ".join(map(repr, [self.losses[0], *self.stages]))

    def evaluated(self, name: str) -> tuple[PropertyKey, ...]:
        """Return what is computed of a set, ``val`` or ``test/...``, once it is set up."""
        return self._properties[name]

    def _evaluate(self, batch: AtomGraph, name: str) -> dict[PropertyKey, Tensor]:
        with torch.enable_grad():
            prediction = self.potential(batch, self._properties[name], create_graph=False)
        errors = self.errors[_key(name)]
        assert isinstance(errors, ErrorMetric)
        errors.update(prediction, batch)
        return prediction

    def _results(self, name: str) -> dict[str, Tensor]:
        errors = self.errors[_key(name)]
        assert isinstance(errors, ErrorMetric)
        results = errors.compute()
        errors.reset()
        # float32, for Lightning keeps epoch values in the trainer's default dtype on some devices.
        return {key: value.to(torch.float32) for key, value in results.items()}

    def _told(self, name: str) -> dict[str, float]:
        return {key: float(value) for key, value in self._results(name).items()}

    def _test_set_name(self, index: int) -> str:
        return f"test/{self.trainer.datamodule.test_names[index]}"  # pyright: ignore

    def _evaluated(self, dataset: GraphDataset) -> tuple[PropertyKey, ...]:
        """Return what is computed for a set: what it has labels for and the potential gives."""
        asked = {*dataset.labels, *({"orientation"} & set(self.loss.properties))}
        if self.target is not None:
            return ("scalar",)
        return tuple(key for key in (*self.potential.learnable, "orientation") if key in asked)

    def _errors_before_training(self, name: str, data: AtomisticDataModule) -> dict[str, float]:
        if name not in data.val_sets:
            return {}
        self.eval()
        for batch in data.eval_loader(data.val_sets[name]):
            self._evaluate(batch.to(self.device), name)
        self.train()
        results = self._told(name)
        units = {name: unit for name, (_, unit) in self.metrics.columns.items()}
        shown = ", ".join(f"{k} {v:.4g} {units[k]}" for k, v in results.items() if k in units)
        logger.info("before training%s: %s", ", on old data" if name == "old" else "", shown)
        return results

    def _refuse_inference_mode(self) -> None:
        if torch.is_inference_mode_enabled() and self.potential.conservative:
            raise ValueError(
                "forces are derivatives and cannot be computed in inference mode; "
                "set trainer.inference_mode to false"
            )

    def _refuse_untrained(self) -> None:
        if not self._loaded and not self.trainer.fit_loop.epoch_progress.total.completed:
            raise ValueError(
                "these weights were never trained; give the checkpoint of a fit with --ckpt_path"
            )


def _key(name: str) -> str:
    # Module names may not hold dots.
    return name.replace(".", "_")
