"""Replay of old data beside new ones: labels for them, with the zeros of energy of the new."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from atomeq.data.ase_files import DataError
from atomeq.data.batching import GraphDataset
from atomeq.data.datamodule import AtomisticDataModule
from atomeq.graph.atom_graph import AtomGraph
from atomeq.potential.potential import Potential
from atomeq.training.normalisation import shift_of_missed, stride
from atomeq.typing import PropertyKey

logger = logging.getLogger(__name__)

#: eV/atom by which zeros of energy may lie apart and still count as those of one level of theory.
_AGREE = 0.05


def replay_old_data(
    potential: Potential, moved: Tensor, labels: Sequence[PropertyKey], data: AtomisticDataModule
) -> None:
    """Give old data their labels and add them to what is trained on.

    Args:
        potential: That training starts from, its references moved to the new data already.
        moved: By how much, eV by atomic number, (119,).
        labels: What the loss trains on.
        data: With old data that were read; changed in place.

    Raises:
        DataError: Old data lack energies, or have zeros of energy that are not the potential's.
        ValueError: They hold elements that the potential does not know.
    """
    replay, train, val = data.replay, data.old_train_set, data.old_val_set
    if replay is None or train is None or val is None:
        return
    for dataset in (train, val):
        for graph in dataset.graphs:
            potential.check_elements(graph)
    if replay.labels == "potential":
        keys: list[PropertyKey] = [
            key for key in labels if key != "stress" or potential.gives_stress
        ]
        both = [[_asked(potential, graph, keys) for graph in part.graphs] for part in (train, val)]
    else:
        both = [[_moved(graph, moved) for graph in part.graphs] for part in (train, val)]
        _refuse_other_zeros(potential, GraphDataset([*both[0], *both[1]]))
    data.replay_labelled(*both)
    logger.info("old data: %d structures replayed, %d held out", len(both[0]), len(both[1]))


def _asked(potential: Potential, graph: AtomGraph, keys: Sequence[PropertyKey]) -> AtomGraph:
    """Return a structure with what the potential says of it as labels."""
    if float(graph.volume().min()) == 0:
        keys = [key for key in keys if key != "stress"]
    with torch.enable_grad():
        found = potential(graph.to(potential.device), tuple(keys), create_graph=False)
    bare = graph.replace(energy=None, forces=None, stress=None)
    like = {key: torch.float64 if key == "energy" else graph.pos.dtype for key in keys}
    return bare.replace(**{key: found[key].detach().cpu().to(like[key]) for key in keys})


def _moved(graph: AtomGraph, moved: Tensor) -> AtomGraph:
    if graph.get("energy") is None:
        return graph
    return graph.replace(energy=graph.energy + moved.cpu()[graph.atomic_numbers].sum())


def _refuse_other_zeros(potential: Potential, old: GraphDataset) -> None:
    graphs = [g for g in old.graphs if g.get("energy") is not None and g.energy.isfinite().all()]
    if not graphs:
        raise DataError(
            "the old data have no energies: set replay.labels to 'potential', which labels them"
        )
    chosen = graphs[:: stride(graphs, 100)]
    shift = shift_of_missed(potential, chosen)
    apart = torch.tensor(
        [
            sum(shift[z] for z in numbers) / len(numbers)
            for numbers in (g.atomic_numbers.tolist() for g in chosen)
        ]
    )
    # A tenth may: errors of what is rare are no zeros.
    if float(apart.abs().quantile(0.9)) > _AGREE:
        raise DataError(
            f"the energies of the old data lie {float(apart.median()):+.3f} eV/atom (median) from "
            f"those of {potential.name}: they have other zeros, or are of another level of theory; "
            "set replay.labels to 'potential', which labels them anew"
        )
