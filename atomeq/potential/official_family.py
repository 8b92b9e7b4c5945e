"""What is said of a family of published networks, once, so that its files can be read.

What a published configuration or file says that is not known here is refused by its name: a model
built from half of its options would compute something else in silence.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from atomeq.models.base import AtomisticModel


class OfficialError(ValueError):
    """A published configuration or file says something that is not known here."""


# Names of parameters: patterns are tried in turn and all that match are applied, in this order.
Rules = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]


class Options:
    """The options of a configuration, each of which somebody must have asked for.

    Args:
        model: Whose they are, for messages.
        options: As published; None is an option that was left out.
        module: Registered name or class of a head.
    """

    def __init__(self, model: str, options: Mapping[str, Any], module: str = "") -> None:
        self.model = model
        self.module = module
        self.options = dict(options)

    def __call__(self, name: str, default: Any) -> Any:
        """Take an option, or the published default."""
        value = self.options.pop(name, default)
        return default if value is None else value

    def only(self, name: str, *known: Any) -> Any:
        """Take an option of which not every value is known; the first is the default."""
        value = self(name, known[0])
        if value not in known:
            allowed = " and ".join(repr(one) for one in known)
            raise OfficialError(f"{self.model} with {name}={value!r} is not known, only {allowed}")
        return value

    def single(self, name: str, default: int) -> int:
        """Take an option that lists one number for each resolution, of which there is one."""
        values = self(name, [default])
        if len(values) != 1:
            raise OfficialError(f"{self.model} has one resolution, not {name}={values!r}")
        return int(values[0])

    def refuse_the_rest(self) -> None:
        """Raise :class:`OfficialError` naming the options that nobody took."""
        if self.options:
            rest = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
            raise OfficialError(f"options of {self.model} that are not known: {rest}")


def _as_they_are(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(weights)


def _accept(model: AtomisticModel, weights: Mapping[str, Tensor]) -> None:
    pass


@dataclass(frozen=True)
class Family:
    """A published architecture: what it is called, how it is built, how its weights are named.

    Attributes:
        title: For messages.
        names: What configurations call it, whole or as a backbone: registered names and classes.
        heads: Which of ``energy``, ``forces`` and ``stress`` each of its heads computes, by
            registered name and class.
        model: The class of ours that it becomes.
        build: Makes one, from the constructor arguments of the published one. Of a model in parts
            ``heads`` is among them: by what a head computes, its options.
        rules: From published names of parameters to ours.
        derives: Whether published forces and stresses are derivatives, where there is no head.
        scales_parts: Whether trace and rest of a stress head are put to scale each by itself.
        unused: Pattern of parameters without effect on the result, which are left out.
        fold: Brings weights, by published names, to a form that ``model`` has.
        refuse: Raises :class:`OfficialError` where buffers of a file are not what we make.
    """

    title: str
    names: frozenset[str]
    heads: Mapping[str, str]
    model: type[AtomisticModel]
    build: Callable[[Options], AtomisticModel]
    rules: Rules
    derives: bool = False
    scales_parts: bool = False
    unused: str = r"^$"
    fold: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = _as_they_are
    refuse: Callable[[AtomisticModel, Mapping[str, Tensor]], None] = _accept

    def our_name(self, official: str) -> str:
        """Return our name of a parameter."""
        for pattern, replacement in self.rules:
            official = re.sub(pattern, replacement, official)
        return official
