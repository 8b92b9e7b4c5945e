"""Activations of a few structures at a time: those of a batch are computed again for its gradient.

Forces are derivatives of an energy, and the gradient of their error needs the activations of both
passes. Checkpoints inside a network would not spare them: the derivative by positions makes them
again, and keeps them for the derivative by weights. So what is made again is the whole prediction.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.potential.derivatives import pulled_back
from atomeq.potential.predictor import Predictor
from atomeq.typing import PropertyKey


def predicted(
    predictor: Predictor, graph: AtomGraph, properties: Sequence[PropertyKey], at_once: int | None
) -> dict[PropertyKey, Tensor]:
    """Return what a loss is made of, differentiable by the weights.

    Args:
        predictor: In training.
        graph: A batch.
        properties: What the loss needs.
        at_once: Structures whose activations are held; None holds those of all.
    """
    if at_once is None:
        return predictor(graph, properties, create_graph=True)
    trained = [weight for weight in predictor.parameters() if weight.requires_grad]
    parts = torch.arange(graph.n_graphs, device=graph.batch.device).split(at_once)
    found = [
        _Recomputed.apply(predictor, graph.take(part), tuple(properties), *trained)
        for part in parts
    ]
    return {
        key: torch.cat(values)
        for key, values in zip(properties, zip(*found, strict=True), strict=True)
    }


def refuse_to_recompute(network: nn.Module, at_once: int | None) -> None:
    """Raise ``ValueError`` where a part of a batch would be predicted otherwise than in it."""
    if at_once is None:
        return
    if at_once < 1:
        raise ValueError(f"recompute is a number of structures, 1 or more, not {at_once}")
    for module in network.modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm or getattr(module, "normalisation", None) == "batch":
            raise ValueError(
                f"{type(module).__name__} normalises over the batch, which recompute takes apart; "
                "leave recompute out, or normalise each structure"
            )


class _Recomputed(torch.autograd.Function):
    """A prediction that keeps its inputs alone."""

    @staticmethod
    def forward(
        ctx: Any, predictor: Predictor, graph: AtomGraph, keys: tuple[PropertyKey, ...], *_: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.predictor, ctx.graph, ctx.keys = predictor, graph, keys
        ctx.chance = _Chance(predictor)
        device = graph.pos.device.type
        ctx.mixed = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        found = predictor(graph, keys, create_graph=False)
        return tuple(found[key].detach() for key in keys)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        enabled, dtype = ctx.mixed
        mixed = torch.autocast(ctx.graph.pos.device.type, dtype=dtype, enabled=enabled)
        trained = [weight for weight in ctx.predictor.parameters() if weight.requires_grad]
        with torch.enable_grad(), ctx.chance, mixed:
            found = ctx.predictor(ctx.graph, ctx.keys, create_graph=True)
            pairs = [(found[key], g) for key, g in zip(ctx.keys, gradients, strict=True)]
            known = [(value.double() * g).sum() for value, g in pairs if g is not None]
            by_weight = pulled_back(torch.stack(known).sum(), trained)
        return (None, None, None, *by_weight)


class _Chance:
    """Random numbers as they were drawn before, within a ``with`` block; those after go on."""

    def __init__(self, network: nn.Module) -> None:
        own = [value for part in network.modules() for value in vars(part).values()]
        self._generators = [torch.default_generator]
        if torch.cuda.is_available():
            self._generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
        self._generators += [one for one in own if isinstance(one, torch.Generator)]
        self._then = [one.get_state() for one in self._generators]
        self._now: list[Tensor] = []

    def __enter__(self) -> None:
        self._now = [one.get_state() for one in self._generators]
        self._set(self._then)

    def __exit__(self, *_: object) -> None:
        self._set(self._now)

    def _set(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)
