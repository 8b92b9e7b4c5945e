"""What a fit begins with: weights and, found in its data, references, distances, old labels."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from atomeq.data.ase_files import DataError, expand_data_path
from atomeq.data.batching import GraphDataset
from atomeq.data.datamodule import AtomisticDataModule
from atomeq.data.targets import ScalarTarget
from atomeq.models.base import AtomisticModel
from atomeq.potential.checkpoint import build_model, load_predictor
from atomeq.potential.distances import KnownDistances, shortest_distances
from atomeq.potential.heads import HeadedPotential
from atomeq.potential.potential import Potential
from atomeq.potential.predictor import Predictor
from atomeq.potential.references import AtomicReferences
from atomeq.potential.scalar import ScalarPredictor
from atomeq.training.low_rank import LoRA, add_low_rank_updates
from atomeq.training.normalisation import (
    PotentialSource,
    fit_references,
    fit_scalar_references,
    fit_shift,
    take_weights,
)
from atomeq.training.replay import replay_old_data

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from atomeq.training.task import AtomisticTask


def predictor_to_train(
    model: AtomisticModel | None,
    target: ScalarTarget | None,
    start_from: PotentialSource | None,
    lora: LoRA | None = None,
    heads: Sequence[str] | None = None,
) -> Predictor:
    """Return what a task trains, with the weights of a potential that is started from.

    Args:
        model: The network; None for that of the potential.
        target: A scalar to learn in place of a potential.
        start_from: Name or folder of the potential.
        lora: Updates that are trained in place of its weights.
        heads: Names of several heads on the network.

    Raises:
        ValueError: There is no network, nothing that could be updated, or no such heads.
        DataError: The potential has another network.
    """
    start = load_predictor(expand_data_path(start_from)) if start_from is not None else None
    if model is None:
        if start is None:
            raise ValueError("there is neither a model nor a potential to start_from")
        # A new one, for it says which parameters are never trained.
        model = build_model(start.model.config()).to(start.dtype)
    predictor = Potential(model) if target is None else ScalarPredictor(model, target)
    if start is not None:
        predictor.name = start.name
        take_weights(predictor, start)
        predictor.train()  # what was taken over was loaded for inference
        predictor.precision = start.precision
    if lora is not None:
        if start is None:
            raise ValueError("lora updates a potential that is there: name it in start_from")
        add_low_rank_updates(model, lora)
    if heads is None:
        return predictor
    if not isinstance(predictor, Potential):
        raise ValueError("heads are of potentials; a target has none")
    return HeadedPotential(predictor, heads)


def prepare(task: "AtomisticTask", data: AtomisticDataModule) -> None:
    """Set what a task's potential takes from the training structures, and label old ones.

    Args:
        task: Whose potential is changed in place.
        data: Set up for a fit.

    Raises:
        DataError: Labels are missing, or the data do not fit what is started from.
    """
    assert data.train_set is not None
    heads = task.potential.names if isinstance(task.potential, HeadedPotential) else ()
    if heads != data.heads:
        raise DataError(
            f"model.heads are {', '.join(heads) or 'none'}, and data.train has files of "
            f"{', '.join(data.heads) or 'none'}; name the same ones in the same order"
        )
    _refuse_missing_labels(task, data.train_set)
    if isinstance(task.potential, Potential):
        found = shortest_distances(data.train_set.sample())
        started = task.start_from is not None
        known = task.potential.distances
        task.potential.distances = known.widened(found) if started else KnownDistances(found)
    if isinstance(task.potential, HeadedPotential):
        _set_references_of_heads(task, task.potential, data)
    else:
        _set_references(task, data.train_set)
    if data.replay is not None:
        _replay(task, data)


def _set_references(task: "AtomisticTask", dataset: GraphDataset) -> None:
    if task.start_from is None:
        task.potential.references = _fit_references(task, dataset)
    elif task.reference_source not in (None, "least_squares", "none"):
        raise DataError(
            f"references {task.reference_source!r} are of a training from the beginning; with "
            "start_from they are 'least_squares', moved to the data, or 'none', kept"
        )
    elif isinstance(task.potential, Potential) and task.reference_source != "none":
        task.potential.eval()
        task.potential.references = fit_shift(task.potential, dataset)
        task.potential.train()


def _set_references_of_heads(
    task: "AtomisticTask", potential: HeadedPotential, data: AtomisticDataModule
) -> None:
    if data.replay is not None:
        raise DataError("with heads the old data are a head of their own: leave out data.replay")
    assert data.train_set is not None
    graphs = {name: [] for name in potential.names}
    for graph in data.train_set.graphs:
        graphs[potential.names[int(graph["head"])]].append(graph)
    for name, own in graphs.items():
        if not own:
            raise DataError(f"no training structure is of the head {name!r}")
        with potential.using(name):
            _set_references(task, GraphDataset(own, name=name))
            logger.info("these are of the head %s", name)


def _fit_references(task: "AtomisticTask", dataset: GraphDataset) -> AtomicReferences:
    if task.target is None:
        return fit_references(
            dataset,
            shift=task.reference_source or "least_squares",
            scale=task.scale_source or "forces",
            offset=task.offset,
        )
    if isinstance(task.scale_source, str):
        raise DataError(f"scale {task.scale_source!r} is of potentials; leave it out")
    return fit_scalar_references(
        dataset,
        task.target,
        shift=task.reference_source,
        scale=task.scale_source,
        own_readout="scalar" in task.potential.model.outputs,
    )


def _replay(task: "AtomisticTask", data: AtomisticDataModule) -> None:
    if not isinstance(task.potential, Potential) or task.start_from is None:
        raise DataError(
            "data.replay is of a potential that is started from: name it in model.start_from, or "
            "train on all files alike in data.train"
        )
    start = load_predictor(expand_data_path(task.start_from)).references
    moved = task.potential.references.shift - start.shift
    task.potential.eval()
    replay_old_data(task.potential, moved, task.loss.labels, data)
    task.potential.train()


def _refuse_missing_labels(task: "AtomisticTask", dataset: GraphDataset) -> None:
    missing = [key for key in task.loss.labels if key not in dataset.labels]
    if missing and task.target is not None:
        raise DataError(
            f"no training structure has a label for the target {task.target.name!r}; name the "
            "file's key in data.labels.scalar"
        )
    if missing:
        raise DataError(
            f"the loss trains on {missing[0]}, but no training structure has that label; name "
            f"the file's key in data.labels.{missing[0]}, or set model.loss.{missing[0]} to 0"
        )
