"""The Clebsch-Gordan convolution with the last radial layer inside, as one registered operation.

    F(x, y, h, A, b, z) = sum over edges, paths and channels of w z (x . y),  w = A h + b.

The weights w of all edges are the largest tensor of such a convolution, paths times channels for
each edge. Here they are made for some edges at a time, and made again for the gradients: nothing of
that size is kept, or ever there at once. F is linear in x, y and z as before, in h and A, and in b;
its derivatives are values of F with a cotangent in the place of an argument, without b where that
is h or A, and without h and A where it is b.
"""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from atomeq.ops.coupling.clebsch_gordan import Form
from atomeq.ops.coupling.registered import (
    form_from,
    gradient_of_partials,
    segments_for,
    wants_segments,
)
from atomeq.ops.edge.frame import segments_of
from atomeq.ops.registration import kernels_of, registered

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
        kernels: Name of the kernel set.
    """
    indices = [end.contiguous() for end in ends]
    numbers = [l for path in form.paths for l in path]
    (product,) = cg_radial_partials(
        *(x, y, radial, *radial_map, None, indices, segments_for(x, indices, n_targets, kernels)),
        *(n_targets, "z", numbers, form.mode, form.stacked, kernels),
    )
    return product


def _fake_partials(call: SimpleNamespace) -> list[Tensor]:
    given = {name: getattr(call, name) for name in _ARGUMENTS if name != "z"}
    shapes = {name: value.shape for name, value in given.items() if value is not None}
    channels = call.x.shape[-1]
    if call.mode == "uvw":
        channels = call.weight.shape[-2] if call.weight is not None else shapes["bias"][-1]
    n_rows = form_from(call.paths, call.mode, call.stacked).n_rows
    shapes["z"] = torch.Size((call.n_targets, n_rows, channels))
    return [call.x.new_empty(shapes[argument]) for argument in call.arguments.split()]


def _partials_gradient(
    saved: SimpleNamespace, wanted: set[str], grads: list[Tensor | None]
) -> dict[str, Tensor]:
    return gradient_of_partials(cg_radial_partials, _ARGUMENTS, _ABSENT, saved, wanted, grads)


@registered(outputs=_fake_partials, gradient=_partials_gradient)
def cg_radial_partials(
    x: Tensor,
    y: Tensor,
    radial: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    ends: list[Tensor],
    segments: list[Tensor],
    n_targets: int,
    arguments: str,
    paths: Sequence[int],
    mode: str,
    stacked: bool,
    kernels: str,
) -> list[Tensor]:
    """Return the partial derivatives of F by the named arguments, in the shapes of these.

    ``z`` may be missing where only its own derivative is asked for; radial and weight, or the bias,
    may be missing, and then so are their terms of w.
    """
    call = _Call(**{name: value for name, value in locals().items() if name != "arguments"})
    return call.partials(arguments.split())


class _Call(SimpleNamespace):
    """One evaluation of derivatives of F, some edges at a time."""

    def partials(self, wanted: list[str]) -> list[Tensor]:
        """Return dF/ds for each argument s that is wanted."""
        inner = [name for name in wanted if name not in _OF_WEIGHTS]
        if set(wanted) & set(_OF_WEIGHTS):
            inner.append("weights")
        whole: dict[str, Tensor] = {}
        for part in self._parts():
            for name, partial in zip(inner, self._inner(part, tuple(inner)), strict=True):
                if name == "weights":
                    for own in set(wanted) & set(_OF_WEIGHTS):
                        self._add(whole, own, part, self._through(own, part, partial))
                else:
                    self._add(whole, name, part, partial)
        return [whole[name] if name in whole else self._zeros(name) for name in wanted]

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

    def _inner(self, part: slice, wanted: tuple[str, ...]) -> list[Tensor]:
        form = form_from(self.paths, self.mode, self.stacked)
        ends = [end[part] for end in self.ends]
        return kernels_of("coupling", self.kernels).partials(
            *(self.x, self.y[part], self._weights(part), self.z, ends),
            *(self._segments(part, ends), self.n_targets, wanted, form),
        )

    def _segments(self, part: slice, ends: list[Tensor]) -> list[Tensor]:
        if part == slice(0, len(self.y)) or not wants_segments(self.kernels):
            return self.segments
        sides = [segments_of(ends[1], self.n_targets), segments_of(ends[0], len(self.x))]
        return [member for side in sides for member in side]

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
            whole.setdefault(name, self._zeros(name))[part] = partial
        else:
            whole[name] = whole[name].add_(partial) if name in whole else partial

    def _zeros(self, name: str) -> Tensor:
        if name != "z":
            return torch.zeros_like(getattr(self, name))
        channels = self.x.shape[-1]
        if self.mode == "uvw":
            channels = self.weight.shape[-2] if self.weight is not None else self.bias.shape[-1]
        rows = form_from(self.paths, self.mode, self.stacked).n_rows
        return self.x.new_zeros(self.n_targets, rows, channels)
