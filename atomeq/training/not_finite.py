"""A loss that is NaN or infinite: which structure it is of, before a step spoils every weight."""

from collections.abc import Callable
from pathlib import Path

import torch

from atomeq.data.ase_files import write_graph
from atomeq.graph.atom_graph import AtomGraph
from atomeq.potential.predictor import Predictor
from atomeq.training.losses import Loss

_NAMED = 5


class NotFiniteLossError(ValueError):
    """The loss of a batch is NaN or infinite; the message names the structures and the file."""


def not_finite_loss(
    predictor: Predictor,
    loss: Loss,
    batch: AtomGraph,
    *,
    step: int,
    place: Callable[[int], str],
    path: Path,
) -> NotFiniteLossError:
    """Return an error that names the structures a loss is not finite of, and write them.

    Args:
        predictor: With the weights that gave the loss.
        loss: Computed anew for each structure alone.
        batch: With ``dataset_index``.
        step: Optimizer steps that were done.
        place: Where the structure of an index came from.
        path: Where to write the structures, extended XYZ.
    """
    singles = batch.to_list()
    bad = [graph for graph in singles if not _is_finite(predictor, loss, graph)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_graph(path, AtomGraph.concatenate(bad or singles))
    named = ", ".join(place(int(graph["dataset_index"])) for graph in (bad or singles)[:_NAMED])
    lost = [name for name, one in predictor.named_parameters() if not torch.isfinite(one).all()]
    if lost:
        reason = (
            f"the weights are not finite ({lost[0]}), spoilt by an earlier step: lower the "
            "learning rate, or set trainer.gradient_clip_val"
        )
    elif len(bad) == len(singles):
        reason = (
            "it is so of every structure of the batch: the weights have run away; lower the "
            "learning rate, or set trainer.gradient_clip_val"
        )
    elif bad:
        reason = f"it is so of {named}; look at its positions and labels, or leave it out"
    else:
        reason = f"of each structure alone it is finite; the batch is {named}"
    return NotFiniteLossError(
        f"the loss is NaN or infinite in step {step}: {reason}. The structures are in {path}"
    )


def _is_finite(predictor: Predictor, loss: Loss, graph: AtomGraph) -> bool:
    prediction = predictor(graph, loss.properties, create_graph=True)
    return bool(torch.isfinite(loss(prediction, graph)["loss"]))
