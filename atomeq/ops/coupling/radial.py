"""The Clebsch-Gordan convolution with the last radial layer inside, as one registered operation.

    F(x, y, h, A, b, z) = sum over edges, paths and channels of w z (x . y),  w = A h + b.

The weights w of all edges are the largest tensor of such a convolution, paths times channels for
each edge. Here they are made for some edges at a time, and made again for the gradients: nothing of
that size is kept, or ever there at once. F is linear in x, y and z as before, in h and A, and in b;
its derivatives are values of F with a cotangent in the place of an argument, without b where that
is h or A, and without h and A where it is b.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from atomeq.ops.coupling.clebsch_gordan import Form, form_from
from atomeq.ops.coupling.registered import (
    FIXED,
    gradient_of_partials,
    sorted_edges,
)
from atomeq.ops.edge.frame import segments_of
from atomeq.ops.registration import WANT_SEGMENTS, contiguous, kernels_of, registered

_ARGUMENTS = ("x", "y", "radial", "weight", "bias", "z")
_OF_WEIGHTS = ("radial", "weight", "bias")
_ABSENT = {"radial": ("bias",), "weight": ("bias",), "bias": ("radial", "weight")}
_AT_ONCE = {"cpu": 2**22, "cuda": 2**28}  # numbers of w: 16 MB and 1 GB in single precision


def couple_radially(
    x: Tensor,
    y: Tensor,
    radial: Tensor,
    radial_map: tuple[Tensor, Tensor | None],
    ends: tuple[Tensor, Tensor],
    n_targets: int,
    form: Form,
    kernels: str,
) -> Tensor:
    """Return dF/dz, the convolution, (n_targets, rows, channels).

    Args:
        x: (n_sources, n1, U).
        y: (n_edges, n2), or (n_edges, n2, channels).
        radial: h, (n_edges, k).
        radial_map: A (n_paths, ..., k) and b (n_paths, ...), with the axes of an edge's weights.
        ends: Source and target of each edge.
        n_targets: Number of targets.
        form: What is coupled.
        kernels: Name of the kernels.
    """
    edges = sorted_edges(x, ends, n_targets, kernels)
    layer = [part for part in radial_map if part is not None]
    (product,) = cg_radial_partials(
        *(x, y, radial, layer, None, edges, n_targets, "z", form.code, kernels)
    )
    return product


def _named(radial: Tensor | None, layer: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Return A and b: beside h there are A and maybe b, without it b alone."""
    if radial is None:
        return None, layer[0]
    return layer[0], layer[1] if len(layer) > 1 else None


def _fake_partials(call: SimpleNamespace) -> list[Tensor]:
    return [_Call(call).zeros(argument) for argument in call.arguments.split()]


def _partials(
    x: Tensor,
    y: Tensor,
    radial: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    **rest: Any,
) -> list[Tensor]:
    layer = [part for part in (weight, bias) if part is not None]
    return cg_radial_partials(x=x, y=y, radial=radial, layer=layer, z=z, **rest)


def _partials_gradient(
    saved: SimpleNamespace, wanted: set[str], grads: list[Tensor | None]
) -> dict[str, Tensor | list[Tensor | None] | None]:
    saved.weight, saved.bias = _named(saved.radial, saved.layer)
    names = [name for name in ("weight", "bias") if getattr(saved, name) is not None]
    for number, name in enumerate(names):
        if f"layer.{number}" in wanted:
            wanted = wanted | {name}
    found = gradient_of_partials(_partials, _ARGUMENTS, _ABSENT, saved, wanted, grads)
    layer = [found.pop(name, None) for name in names]
    return {**found, "layer": layer}


@registered(outputs=_fake_partials, gradient=_partials_gradient)
def cg_radial_partials(
    x: Tensor,
    y: Tensor,
    radial: Tensor | None,
    layer: list[Tensor],
    z: Tensor | None,
    edges: list[Tensor],
    n_targets: int,
    arguments: str,
    form: str,
    kernels: str,
) -> list[Tensor]:
    """Return the partial derivatives of F by the named arguments, in the shapes of these.

    The names are x, y, radial, weight, bias and z. ``layer`` is A and b, or A alone; where
    ``radial`` is missing it is b alone, and so are the terms of w. ``z`` may be missing where only
    its own derivative is asked for.
    """
    call = SimpleNamespace(x=x, y=y, radial=radial, layer=layer, z=z, edges=edges)
    call.n_targets, call.form, call.kernels = n_targets, form, kernels
    return _Call(call).partials(arguments.split())


class _Call:
    """One evaluation of derivatives of F, some edges at a time."""

    weight: Any  # one of the two may be missing, see _named
    bias: Any

    def __init__(self, call: SimpleNamespace) -> None:
        self.x, self.y, self.radial, self.z = map(contiguous, (call.x, call.y, call.radial, call.z))
        self.edges, self.n_targets, self.form, self.kernels = (
            getattr(call, name) for name in FIXED
        )
        self.weight, self.bias = _named(call.radial, call.layer)

    def partials(self, wanted: list[str]) -> list[Tensor]:
        """Return dF/ds for each argument s that is wanted."""
        inner = [name for name in wanted if name not in _OF_WEIGHTS]
        if set(wanted) & set(_OF_WEIGHTS):
            inner.append("weights")
        whole: dict[str, Tensor] = {}
        for part in self._parts():
            for name, partial in zip(inner, self._inner(part, " ".join(inner)), strict=True):
                if name == "weights":
                    for own in set(wanted) & set(_OF_WEIGHTS):
                        self._add(whole, own, part, self._through(own, part, partial))
                else:
                    self._add(whole, name, part, partial)
        return [whole[name] if name in whole else self.zeros(name) for name in wanted]

    def zeros(self, name: str) -> Tensor:
        """Return zeros like the derivative by an argument."""
        if name != "z":
            return torch.zeros_like(getattr(self, name))
        form, channels = form_from(self.form), self.x.shape[-1]
        if form.mode == "uvw":
            channels = self.weight.shape[-2] if self.weight is not None else self.bias.shape[-1]
        return self.x.new_zeros(self.n_targets, form.n_rows, channels)

    def _parts(self) -> Iterator[slice]:
        """Cut the edges where the weights of all would be too many to be there at once."""
        n_edges = len(self.y)
        numbers = self.weight.shape[:-1].numel() if self.weight is not None else 1
        step = max(1, _AT_ONCE["cuda" if self.y.is_cuda else "cpu"] // max(1, numbers))
        for start in range(0, n_edges, step):
            yield slice(start, min(start + step, n_edges))

    def _weights(self, part: slice) -> Tensor:
        """Return w of some edges, or that of all where it is the bias alone."""
        if self.radial is None:
            return self.bias.contiguous()
        bias = None if self.bias is None else self.bias.flatten()
        flat = torch.nn.functional.linear(self.radial[part], self.weight.flatten(0, -2), bias)
        return flat.unflatten(1, self.weight.shape[:-1])

    def _inner(self, part: slice, arguments: str) -> list[Tensor]:
        call = SimpleNamespace(x=self.x, y=self.y[part], z=self.z, n_targets=self.n_targets)
        call.weights, call.edges = self._weights(part), self._edges(part)
        call.arguments, call.form = arguments, self.form
        return kernels_of("coupling", self.kernels).cg_partials(call)

    def _edges(self, part: slice) -> list[Tensor]:
        if part == slice(0, len(self.y)):
            return self.edges
        ends = [end[part] for end in self.edges[:2]]
        if self.kernels not in WANT_SEGMENTS:
            return ends
        return [*ends, *segments_of(ends[1], self.n_targets), *segments_of(ends[0], len(self.x))]

    def _through(self, name: str, part: slice, partial: Tensor) -> Tensor:
        """Return the derivative by what the weights are made of, from that by the weights."""
        if self.radial is None:
            return partial
        if name == "bias":
            return partial.sum(0)
        flat = partial.flatten(1)
        if name == "radial":
            return flat @ self.weight.flatten(0, -2)
        return (flat.T @ self.radial[part]).view(self.weight.shape)

    def _add(self, whole: dict[str, Tensor], name: str, part: slice, partial: Tensor) -> None:
        if part == slice(0, len(self.y)):
            whole[name] = partial
        elif name in ("y", "radial"):
            whole.setdefault(name, self.zeros(name))[part] = partial
        else:
            whole[name] = whole[name].add_(partial) if name in whole else partial
