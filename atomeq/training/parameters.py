"""Which parameters an optimizer trains, how fast, and which of them its weight decay acts on."""

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from atomeq.nn.message_norms import GraphNorm
from atomeq.nn.norms import EquivariantLayerNorm, EquivariantRMSNorm, SeparableLayerNorm
from atomeq.potential.references import AtomicReferences

#: ``all`` parameters decay, or the ``weights`` alone: neither biases nor those of normalisations.
Decay = Literal["all", "weights"]

_NORMS = (
    nn.LayerNorm,
    nn.modules.batchnorm._BatchNorm,
    GraphNorm,
    EquivariantLayerNorm,
    EquivariantRMSNorm,
    SeparableLayerNorm,
)


def parameter_groups(
    module: nn.Module, decay: Decay = "all", rates: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Return the groups an optimizer is made of; frozen parameters are left out.

    EquiformerV2's published runs decay ``weights``: those of linear maps, of attention logits and
    of element embeddings.

    Args:
        module: What is trained.
        decay: Which parameters decay.
        rates: Factor of the learning rate by part of the network; the last that names a parameter
            counts.

    Returns:
        Groups of one ``rate`` each, the factor; those that do not decay have ``weight_decay`` 0.

    Raises:
        ValueError: ``decay`` is unknown.
    """
    if decay not in ("all", "weights"):
        raise ValueError(f"decay is all or weights, not {decay!r}")
    kept = {
        id(parameter)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        # Energies of elements are no weights: pulled to zero they would be others.
        if isinstance(part, AtomicReferences)
        or (decay == "weights" and (isinstance(part, _NORMS) or name == "bias"))
    }
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            free, rate = id(parameter) in kept, _rate(name, rates or {})
            group = groups.setdefault((free, rate), {"params": [], "rate": rate})
            group["params"].append(parameter)
            if free:
                group["weight_decay"] = 0.0
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def make_optimizer(
    make: Callable[[Any], Optimizer],
    module: nn.Module,
    decay: Decay,
    rates: Mapping[str, float] | None,
) -> Optimizer:
    """Return the optimizer of a network, whose groups have their own learning rates."""
    optimizer = make(parameter_groups(module, decay, rates))
    for group in optimizer.param_groups:
        group["lr"] *= group.pop("rate")
    return optimizer


def freeze_parts(predictor: nn.Module, rates: Mapping[str, float]) -> None:
    """Freeze the parts of a network whose learning rate is zero.

    Args:
        predictor: Or its network alone; changed in place.
        rates: Factor of the learning rate by part.

    Raises:
        ValueError: A factor is negative, there is no such part, or nothing is left to train.
    """
    names = [_in_network(name) for name, _ in predictor.named_parameters()]
    for part, rate in rates.items():
        if not rate >= 0:
            raise ValueError(f"the rate of {part} is {rate}; a factor of the learning rate is >= 0")
        if not any(is_part(name, part) for name in names):
            parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise ValueError(f"the network has no part {part!r}; it has {parts}")
    for name, parameter in predictor.named_parameters():
        if _rate(name, rates) == 0:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in predictor.parameters()):
        raise ValueError(f"rates {dict(rates)} leave nothing to train")


def is_part(name: str, part: str) -> bool:
    """Whether a name in a network is in a part: ``layers.0``, or ``*`` for anything."""
    return fnmatchcase(name, part) or fnmatchcase(name, f"{part}.*")


def _rate(name: str, rates: Mapping[str, float]) -> float:
    inside = _in_network(name)
    return next(
        (rate for part, rate in reversed(list(rates.items())) if is_part(inside, part)), 1.0
    )


def _in_network(name: str) -> str:
    """Return the name in the network, of a task's, a predictor's or a head's parameter."""
    return re.sub(r"^(potential\.)?(heads\.[^.]+\.)?(model\.)?", "", name)
