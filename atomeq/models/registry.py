"""Which models and propagators there are, by name: those of this folder and other distributions'.

A file of this folder is all that a new model needs; outside of the package it is a class and a line
of the distribution's pyproject.toml: ``[project.entry-points."atomeq.models"]``, ``PaiNN =
"my_package.painn:PaiNN"``.
"""

from typing import Any, TypeVar

from torch import Tensor, nn

from atomeq.arguments import refuse_wrong_types
from atomeq.models.base import AtomisticModel, ConfiguredModule, Propagator
from atomeq.registry import Registry, RegistryError

T = TypeVar("T")

MODELS = Registry("model", AtomisticModel, package="atomeq.models", group="atomeq.models")
PROPAGATORS = Registry(
    "propagator", Propagator, package="atomeq.models", group="atomeq.propagators"
)


# What constructors of networks raise, torch's included, when given what makes no sense.
_REFUSALS = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError)


def build(
    node: Any, registry: Registry[T], weights: dict[str, Tensor] | None = None, prefix: str = ""
) -> T:
    """Build what a node describes, ``{"class_path": ..., "init_args": {...}}``.

    Args:
        node: As ``config()`` returns it; a model inside it is a node as well.
        registry: Where its class has to stand.
        weights: Saved with the node; where the class has changed since, they follow in place.
        prefix: What their names begin with.

    Raises:
        RegistryError: A class that is not registered, arguments that it does not take, or a
            ``checkpoint_version`` that it cannot read.
    """
    if not isinstance(node, dict):
        raise RegistryError(
            f"the {registry.kind} {node!r} is no node with class_path and init_args"
        )
    found = registry.find(node.get("class_path"))
    arguments = node.get("init_args") or {}
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise RegistryError(f"{found.__name__}, init_args are no arguments by name")
    arguments = dict(arguments)
    version = node.get("checkpoint_version", 1)
    if issubclass(found, ConfiguredModule) and version != found.checkpoint_version:
        arguments = _upgrade(found, version, arguments, {} if weights is None else weights, prefix)
    for key, value in arguments.items():
        if isinstance(value, dict) and "class_path" in value:
            arguments[key] = build(value, MODELS, weights, f"{prefix}{key}.")
    try:
        refuse_wrong_types(found.__init__, arguments)
        return found(**arguments)
    except _REFUSALS as error:
        raise RegistryError(f"{found.__name__}, init_args: {error}") from error


def _upgrade(
    found: type[ConfiguredModule],
    version: Any,
    arguments: dict[str, Any],
    weights: dict[str, Tensor],
    prefix: str,
) -> dict[str, Any]:
    """Return the arguments as the class takes them today, and bring its weights there."""
    if not isinstance(version, int) or not 1 <= version < found.checkpoint_version:
        raise RegistryError(
            f"saved with version {version!r} of {found.__name__}, whose installed version reads up "
            f"to {found.checkpoint_version}; update {found.__module__.partition('.')[0]}"
        )
    own = {name: weights.pop(name) for name in list(weights) if name.startswith(prefix)}
    own = {name.removeprefix(prefix): tensor for name, tensor in own.items()}
    try:
        arguments, own = found.upgrade(version, arguments, own)
    except (LookupError, TypeError, ValueError) as error:
        raise RegistryError(f"{found.__name__}, from version {version}: {error}") from error
    weights.update({prefix + name: tensor for name, tensor in own.items()})
    return arguments


def refuse_unregistered(module: nn.Module, registry: Registry[Any] = MODELS) -> None:
    """Raise :class:`RegistryError` where a module, or a model it holds, is none a file may name."""
    registry.refuse_unregistered(module)
    for inside in module.children():
        if isinstance(inside, AtomisticModel):
            refuse_unregistered(inside)
