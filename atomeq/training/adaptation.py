"""Equivariant adaptation: a potential trained in one orientation, made invariant as it is.

Mondal, Panigrahi, Kaba, Rajeswar and Ravanbakhsh, Equivariant Adaptation of Large Pretrained
Models, NeurIPS 2023, arXiv:2310.01647. A small network turns each structure before the potential
sees it (:class:`~atomeq.models.frame_averaged.Canonicalized`). A prior asks it to leave training
structures as they lie, for so the potential knows them; ``model.rates: {"model.model": 0.1}`` of a
fit trains the potential inside slower, 0 not at all.
"""

import copy
import logging
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.frame_averaged import Canonicalized
from atomeq.potential.potential import Potential

logger = logging.getLogger(__name__)


def adapted(potential: Potential, **options: Any) -> Potential:
    """Return a copy of a potential behind a canonicalizer that is yet to be trained.

    Args:
        potential: With any model that is not invariant by itself; its references, scale and terms
            stay.
        options: Of :class:`~atomeq.models.frame_averaged.Canonicalized`.
    """
    behind = copy.deepcopy(potential)
    model = Canonicalized(behind.model, **options)
    behind.model = model.to(device=behind.model.device, dtype=behind.model.dtype)
    return behind


def orientation_prior(model: Canonicalized, graph: AtomGraph) -> Tensor:
    """Return the mean square of R - 1, R the canonical frames of structures as they lie.

    Structures without a canonical frame do not count.
    """
    frames, degenerate = model.orientations(graph)
    squared = ((frames - torch.eye(3).to(frames)) ** 2).mean(dim=(1, 2))
    return (squared * ~degenerate).sum() / (~degenerate).sum().clamp(min=1)


def mean_turn(model: Canonicalized, graphs: Iterable[AtomGraph]) -> float:
    """Return by how much structures are turned from how they lie, degrees, on average.

    One that is mirrored counts as 180.
    """
    turns = []
    with torch.no_grad():
        for graph in graphs:
            frames, degenerate = model.orientations(graph)
            traces = frames.diagonal(dim1=1, dim2=2).sum(dim=1)
            angles = torch.rad2deg(torch.arccos(((traces - 1) / 2).clamp(-1, 1)))
            angles = torch.where(torch.linalg.det(frames) > 0, angles, 180.0)
            turns.append(angles[~degenerate])
    return float(torch.cat(turns).mean()) if turns else float("nan")


class OrientationPrior(Callback):
    """Adds the prior to the loss of a fit, and tells how far structures are turned.

    Args:
        weight: Of the prior, in units of the loss.

    Attributes:
        turns: Degrees before and after the fit, on the validation set.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.turns: list[float] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the losses of the task.

        Raises:
            ValueError: The model is not canonicalized.
        """
        task: Any = pl_module
        model = task.potential.model
        if not isinstance(model, Canonicalized):
            raise ValueError(
                f"OrientationPrior is for a Canonicalized model, and this is a "
                f"{type(model).__name__}; save adapted(potential) and start from that"
            )

        task.losses = [_WithPrior(loss, task, self.weight) for loss in task.losses]
        task.loss = task.losses[0]
        self._measure(trainer, model)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the losses as they were."""
        task: Any = pl_module
        task.losses = [loss.inner for loss in task.losses]
        task.loss = task.loss.inner
        self._measure(trainer, task.potential.model)
        logger.info("structures are turned by %.1f° before and %.1f° after the fit", *self.turns)

    def _measure(self, trainer: Trainer, model: Any) -> None:
        datamodule: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        graphs = datamodule.val_sets["val"]
        batch = AtomGraph.concatenate([graphs[k] for k in range(len(graphs))])
        self.turns.append(mean_turn(model, [batch.to(model.device)]))


class _WithPrior:
    """A loss with the prior among its terms while a task trains."""

    def __init__(self, inner: Any, task: Any, weight: float) -> None:
        self.inner, self.task, self.weight = inner, task, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, prediction: Any, batch: AtomGraph) -> dict[str, Tensor]:
        terms = self.inner(prediction, batch)
        if not self.task.training:
            return terms
        prior = orientation_prior(self.task.potential.model, batch)
        return {**terms, "prior": prior, "loss": terms["loss"] + self.weight * prior}
