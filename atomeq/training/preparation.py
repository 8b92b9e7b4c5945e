"""What a fit begins with: weights and, found in its data, references, distances, old labels."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from atomeq.data.ase_files import DataError, expand_data_path
from atomeq.data.batching import GraphDataset
from atomeq.data.datamodule import AtomisticDataModule
from atomeq.data.targets import ScalarTarget
from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import AtomisticModel
from atomeq.ops.segment.operations import segment_sum
from atomeq.potential.checkpoint import build_model, load_predictor
from atomeq.potential.derivatives import energy_and_derivatives
from atomeq.potential.dispersion import DispersionD3
from atomeq.potential.distances import KnownDistances, shortest_distances
from atomeq.potential.heads import HeadedPotential
from atomeq.potential.mean import MeanPotential
from atomeq.potential.potential import ELECTRIC, Potential
from atomeq.potential.predictor import Predictor
from atomeq.potential.references import AtomicReferences
from atomeq.potential.repulsion import ZBL
from atomeq.potential.scalar import ScalarPredictor
from atomeq.potential.terms import EnergyTerm
from atomeq.training.electrons import Electrons
from atomeq.training.low_rank import LoRA, add_low_rank_updates
from atomeq.training.normalisation import (
    PotentialSource,
    conservative_form,
    fit_references,
    fit_scalar_references,
    fit_shift,
    take_weights,
)
from atomeq.training.replay import replay_old_data
from atomeq.typing import PropertyKey

logger = logging.getLogger(__name__)

#: Terms by the short names of configurations.
TERMS: dict[str, type[EnergyTerm]] = {"zbl": ZBL, "d3": DispersionD3}

if TYPE_CHECKING:
    from atomeq.training.task import AtomisticTask


def predictor_to_train(
    model: AtomisticModel | None,
    target: ScalarTarget | None,
    start_from: PotentialSource | None,
    conservative: bool = False,
    *,
    terms: Sequence[str | EnergyTerm] = (),
    lora: LoRA | None = None,
    heads: Sequence[str] | None = None,
    trained: Sequence[str] = (),
    electrons: Electrons | None = None,
) -> Predictor:
    """Return what a task trains, with the weights of a potential that is started from.

    Args:
        model: The network; None for that of the potential.
        target: A scalar to learn in place of a potential.
        start_from: Name or folder of the potential.
        conservative: Whether its heads for forces and stress stay behind.
        terms: Known physics that is added, ``zbl``, ``d3`` or spelled out.
        lora: Updates that are trained in place of its weights.
        heads: Names of several heads on the network.
        trained: Whether shift or scale of the elements are trained with the network.
        electrons: Charges and multiplicities that the network is told of, or ignores.

    Raises:
        ValueError: There is no network, nothing that could be updated, or no such heads.
        DataError: The potential has another network.
    """
    start = load_predictor(expand_data_path(start_from)) if start_from is not None else None
    if isinstance(start, MeanPotential):
        raise ValueError(f"start_from {start_from} is a committee; name a member, a folder in it")
    model = _network(model, start, conservative)
    model = electrons.told_to(model) if electrons is not None else model
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
    if isinstance(predictor, Potential):
        added = [TERMS[term]() if isinstance(term, str) else term for term in terms]
        twice = {type(term) for term in added} & {type(term) for term in predictor.terms}
        if twice:
            raise ValueError(f"{predictor.name} has a {twice.pop().__name__} already")
        predictor.add_terms(added)
        predictor = predictor if heads is None else HeadedPotential(predictor, heads)
    elif heads or terms:
        raise ValueError("heads and terms are of potentials; a target has none")
    if "scale" in trained and "scalar" in model.outputs:
        raise ValueError("train_scale is of atoms, and this network gives one number of them all")
    train_elements(predictor, trained)
    predictor.ignore(electrons.ignore if electrons is not None else ())
    return predictor


def _network(
    model: AtomisticModel | None, start: Predictor | None, conservative: bool
) -> AtomisticModel:
    if model is not None:
        if conservative:
            raise ValueError("conservative makes its model from start_from; leave model out")
        return model
    if start is None:
        raise ValueError("there is neither a model nor a potential to start_from")
    # A new one, for it says which parameters are never trained.
    node = conservative_form(start.model) if conservative else start.model.config()
    return build_model(node).to(start.dtype)


def train_elements(predictor: nn.Module, trained: Sequence[str]) -> None:
    """Make shift or scale of the elements parameters, those of each head."""
    for part in predictor.modules():
        if isinstance(part, AtomicReferences):
            part.train_elements(*trained)


def with_neighbor_count(model: AtomisticModel, count: float) -> AtomisticModel:
    """Return a network with the same weights that divides sums over neighbours by another count.

    Args:
        model: Any with an ``avg_num_neighbors`` or an ``avg_degree``.
        count: Mean number of neighbours.

    Raises:
        ValueError: The network has no such number.
    """
    node = model.config()
    names = {"avg_num_neighbors", "avg_degree"} & set(node["init_args"])
    if not names:
        raise ValueError(
            f"{type(model).__name__} divides by no number of neighbours: leave out "
            "avg_num_neighbors"
        )
    node["init_args"] |= dict.fromkeys(names, count)
    other = build_model(node).to(device=model.device, dtype=model.dtype)
    for (name, weight), own in zip(other.named_parameters(), model.parameters(), strict=True):
        assert weight.shape == own.shape, name
        weight.data = own.detach().clone()
        weight.requires_grad_(own.requires_grad)
    return other.train(model.training)


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
    refuse_compiled(task)
    if task.measure_neighbors:
        some = data.train_set.sample()
        count = sum(graph.n_edges for graph in some) / sum(graph.n_atoms for graph in some)
        logger.info("avg_num_neighbors: %.2f, measured on the training structures", count)
        task.set_neighbor_count(count)
    if isinstance(task.potential, Potential):
        found = shortest_distances(data.train_set.sample())
        started = task.start_from is not None
        known = task.potential.distances
        task.potential.distances = known.widened(found) if started else KnownDistances(found)
    if isinstance(task.potential, HeadedPotential):
        _set_references_of_heads(task, task.potential, data)
    else:
        _set_references(task, data.train_set)
    refuse_precision(task, data.train_set)
    if data.replay is not None:
        _replay(task, data)


def refuse_compiled(task: "AtomisticTask") -> None:
    """Refuse, before the first step, a compiled network whose forces are to be learnt.

    Raises:
        ValueError: What torch.compile makes has no backward pass of its backward pass.
    """
    compiled = [one for one in task.modules() if getattr(one, "_compiled_call_impl", None)]
    compiled += [task] if getattr(task, "_compiler_ctx", None) else []
    derived = {"forces", "stress"} - task.potential.model.outputs
    if compiled and derived & {key for loss in task.losses for key in loss.properties}:
        raise ValueError(
            f"{type(compiled[0]).__name__} is compiled, and torch.compile gives no second "
            "derivative, which the gradient of forces is; train it as it is, and compile what "
            "comes of it with `atomeq export`"
        )


def refuse_precision(task: "AtomisticTask", dataset: GraphDataset) -> None:
    """Refuse, before the first step, a ``trainer.precision`` that potentials are not trained in.

    Raises:
        ValueError: It rounds the weights, or the network takes no mixed precision.
    """
    precision = task.trainer.precision
    if precision in ("32-true", "64-true"):
        return
    way = (
        "leave trainer.precision at 32-true; model.precision, high (TF32) or medium (bfloat16), "
        "rounds what tensor products multiply on a GPU"
    )
    if precision != "bf16-mixed":
        why = {"16-mixed": "forces are derivatives, which no scale of the loss keeps in its range"}
        rest = "weights are trained and saved in 32 or 64 bits"
        raise ValueError(f"trainer.precision {precision}: {why.get(str(precision), rest)}; {way}")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            task.potential(dataset.sample()[0], task.loss.properties, create_graph=False)
    except TypeError as error:
        raise ValueError(
            f"{type(task.potential.model).__name__} takes no mixed precision ({error}); {way}"
        ) from error


def _set_references(task: "AtomisticTask", dataset: GraphDataset) -> None:
    known = task.potential.elements
    unknown = [z for z in dataset.elements if z not in known] if task.start_from else []
    if unknown:
        raise DataError(
            f"the training structures hold Z={unknown[0]}, which {task.potential.name} does not "
            "know"
        )
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
    train_elements(task.potential.references, task.trained_references)


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
        potential = task.potential
        assert isinstance(potential, Potential)
        if not potential.gives_energies:
            return AtomicReferences(dict.fromkeys(dataset.elements, 0.0))
        return fit_references(
            without_terms(potential, dataset),
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


def without_terms(potential: Potential, dataset: GraphDataset) -> GraphDataset:
    """Return structures with what a potential's terms leave of their labels to the network."""
    if not potential.terms:
        return dataset

    def of_terms(graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        energies = torch.stack([term(graph) for term in potential.terms]).sum(dim=0)
        return {"energy": segment_sum(energies, graph.batch, graph.n_graphs)}

    left = []
    for graph in dataset.sample():
        found = energy_and_derivatives(of_terms, graph, forces=True, stress=False)
        known = {key: graph[key] - found[key].detach() for key in found if key in graph}
        left.append(graph.replace(**known))
    return GraphDataset(left, name=dataset.name)


def _replay(task: "AtomisticTask", data: AtomisticDataModule) -> None:
    if not isinstance(task.potential, Potential) or task.start_from is None:
        raise DataError(
            "data.replay is of a potential that is started from: name it in model.start_from, or "
            "train on all files alike in data.train"
        )
    start = load_predictor(expand_data_path(task.start_from)).references
    moved = task.potential.references.shift.detach() - start.shift
    task.potential.eval()
    replay_old_data(task.potential, moved, task.loss.labels, data)
    task.potential.train()


def _refuse_untrained(potential: Potential, wanted: set[PropertyKey]) -> None:
    """Refuse a loss of what there is not, or one that leaves energies as they were drawn."""
    potential.refuse_missing(tuple(wanted))
    if potential.gives_energies and wanted <= set(ELECTRIC):
        raise DataError(
            f"the loss is of {', '.join(wanted)} alone, and the potential would give energies that "
            "were never trained; say energies: false of its Electric model"
        )


def _refuse_missing_labels(task: "AtomisticTask", dataset: GraphDataset) -> None:
    wanted: dict[PropertyKey, None] = dict.fromkeys(
        key for loss in task.losses for key in loss.labels
    )
    missing = [key for key in wanted if key not in dataset.labels]
    if isinstance(task.potential, Potential):
        _refuse_untrained(task.potential, set(wanted))
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
