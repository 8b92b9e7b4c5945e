"""The whole eSCN edge layer as one operation, differentiable twice, that keeps next to nothing.

For each edge, with G the gather of both atoms, W the rotation into its frame, S the sum on the
target atoms,

    r = W G x,  z = s r,  y = M_1 z + b_1,  a = gate(y),  u = M_2 a + b_2,  out = S f W^T u.

Between the passes nothing of an edge is kept but y and u, and for a second derivative dE/da and
dE/dz, or not even these; within :func:`differentiated_once` y alone, of which u is made again.
Forward, gradient and gradient of the gradient are three registered operations, which kernels have
by the same names. They share their arguments:

    inputs   those of ``INPUTS`` that are given
    names    of these, in their order
    weights  of the first map, one for each order, and then of the second
    edges    wigner, source, target, and where the kernels want them the sorted edges

A map's name, ``first`` or ``second``, stands for all of its weights, ``first.0`` for those of an
order. A third derivative is refused; the single operations rotate_to_edge, so2_linear and
rotate_from_edge have derivatives of any order.

What a gradient feels of the layer's insides, the outputs y and u of both maps, goes through these:
in a backward pass over a gradient they are inputs like others, and the layer's own backward pass,
which comes last, takes the gradient with respect to them along. Each map is multiplied once then.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from atomeq.ops.edge.frame import EdgeFrame
from atomeq.ops.edge.rotation import turn_gradient
from atomeq.ops.edge.so2_map import Gradients, SO2Shape, views
from atomeq.ops.precision import operand_dtype
from atomeq.ops.registration import WANT_SEGMENTS, kernel, kernels_of

INPUTS = (
    *("x", "vectors", "radial", "radial_weight", "radial_bias", "envelope"),
    *("first_bias", "second_bias"),
)
MAPS = ("first", "second")
RADIAL = {"radial", "radial_weight", "radial_bias"}
# what a gradient must pass the first map for
INWARD = {"first", "first_bias", "x", "vectors", *RADIAL}
Named = dict[str, Any]  # tensors, or the weights of a map, by the names of arguments


class _Once(threading.local):
    on: bool = False


_once = _Once()


@contextmanager
def differentiated_once(on: bool = True) -> Iterator[None]:
    """Keep less for the backward pass inside the ``with`` block, in this thread.

    What is computed there is expected to be differentiated once. It can be twice, for the price of
    another forward pass.

    Args:
        on: Whether to.
    """
    before, _once.on = _once.on, on
    try:
        yield
    finally:
        _once.on = before


def conv(
    x: Tensor,
    frame: EdgeFrame,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    radial: Tensor | None,
    radial_map: tuple[Tensor, Tensor | None] | None,
    envelope: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],
    recompute: bool,
    kernels: str,
) -> Tensor:
    """Return the whole edge layer as one operation of some kernels."""
    mapped = [*((None, None) if radial_map is None else radial_map), *biases]
    weights = [*first, *second]
    if any([leaf is not None and leaf.requires_grad for leaf in (*weights, *mapped)]):
        weights = views(weights)
        mapped = [leaf if leaf is None else views([leaf])[0] for leaf in mapped]
    given = (x, frame.vectors, radial, *mapped[:2], envelope, *mapped[2:])
    named = zip(INPUTS, given, strict=True)
    inputs = {name: tensor for name, tensor in named if tensor is not None}
    keep = torch.is_grad_enabled() and not recompute
    keep = keep and any([tensor.requires_grad for tensor in (*inputs.values(), *weights)])
    n_kept = (1 if _once.on and kernels == "cpu" else 2) if keep else 0
    edges = [frame.wigner, frame.source, frame.target]
    if kernels in WANT_SEGMENTS:
        edges += frame.segments_for(edges[1:])
    total, _, _ = escn_conv(
        list(inputs.values()), " ".join(inputs), weights, edges, n_kept, kernels
    )
    return total


def layer_shapes(x: Tensor, weights: list[Tensor]) -> tuple[SO2Shape, SO2Shape]:
    """Return the sizes of the two maps: both atoms to the hidden channels and gates, and on."""
    lmax, n_maps = math.isqrt(int(x.shape[1])) - 1, len(weights) // 2
    c_out, hidden = weights[n_maps].shape
    c_out, hidden = c_out // (lmax + 1), hidden // (lmax + 1)
    return (
        SO2Shape(lmax, n_maps - 1, 2 * x.shape[2], hidden, lmax * hidden),
        SO2Shape(lmax, n_maps - 1, hidden, c_out, 0),
    )


class EdgeLayer:
    """What a call of one of the three operations is given, as kernels take it.

    Attributes:
        by: The kernels.
        tensors: x (n_atoms, n_sph, C); wigner (n_edges, n_rows, n_sph); source and target
            (n_edges,); where given, radial (n_edges, n_scales), or (n_edges, k) with radial_weight
            (n_scales, k) and radial_bias (n_scales,); envelope (n_edges,); first_bias and
            second_bias, of the outputs of m = 0. All are contiguous.
        segments: Of the source and the target, or empty.
        weights: One for each order of M_1, whose extra outputs are the gates, and of M_2.
        shapes: Of the two maps.
        n_edges: Number of edges.
    """

    def __init__(self, call: SimpleNamespace) -> None:
        self.by = kernels_of("edge", call.kernels)
        wigner, source, target, *self.segments = call.edges
        self.tensors: Named = dict(zip(call.names.split(), call.inputs, strict=True))
        del self.tensors["vectors"]  # what is made of them is the Wigner matrices
        self.tensors |= {"wigner": wigner, "source": source, "target": target}
        n_maps = len(call.weights) // 2
        self.weights = {"first": call.weights[:n_maps], "second": call.weights[n_maps:]}
        self.shapes = layer_shapes(self.tensors["x"], call.weights)
        self.n_edges = wigner.shape[0]

    def kept(self, n_kept: int, *widths: int, messages: bool = False) -> list[Tensor]:
        """Return memory for numbers of every edge, of none behind those that are kept.

        If the last are messages, they may have the precision of operands.
        """
        x, found = self.tensors["x"], []
        for k, width in enumerate(widths):
            size = self.n_edges if k < n_kept else 0, width
            passing = messages and k == len(widths) - 1
            found.append(self.by.empty(size, x, passing=passing))
        return found

    def gradients(self, wanted: str) -> Named:
        """Return zeros like what is wanted.

        Edges have ``radial`` to themselves, and its memory is as it is. That of ``vectors`` is with
        respect to a turn of each edge, (n_edges, 3).
        """
        found: Named = {}
        for name in wanted.split():
            if name in MAPS:
                found[name] = [self.by.empty(w.shape, w).zero_() for w in self.weights[name]]
            elif name == "vectors":
                found[name] = self.tensors["x"].new_zeros(self.n_edges, 3)
            elif name in self.tensors:
                found[name] = self.by.empty(self.tensors[name].shape, self.tensors[name])
                if name != "radial":
                    found[name].zero_()
        return found


@cache
def _expanded(names: str, n_maps: int) -> tuple[str, ...]:
    """Return names, for that of a map those of its weights."""
    found = []
    for name in names.split():
        found += [f"{name}.{m}" for m in range(n_maps)] if name in MAPS else [name]
    return tuple(found)


def _named(call: SimpleNamespace) -> dict[str, Tensor]:
    """Return what a call is given, the weights of each order apart."""
    names = _expanded(f"{call.names} first second", len(call.weights) // 2)
    return dict(zip(names, [*call.inputs, *call.weights], strict=True))


def _fake_rows(call: SimpleNamespace, *widths: int) -> list[Tensor]:
    """Return rows of the edges as a trace sees them, none behind those that are kept."""
    n_edges, x = call.edges[0].shape[0], call.inputs[0]
    return [x.new_empty(n_edges if k < call.n_kept else 0, n) for k, n in enumerate(widths)]


def _size_of_total(call: SimpleNamespace) -> tuple[int, int, int]:
    n_atoms, n_sph, _ = call.inputs[0].shape
    return n_atoms, n_sph, layer_shapes(call.inputs[0], call.weights)[1].c_out


def _fake_value(call: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    first, second = layer_shapes(call.inputs[0], call.weights)
    y, u = _fake_rows(call, first.width, second.width)
    if call.kernels == "triton":
        u = u.to(operand_dtype(call.inputs[0]))
    return call.inputs[0].new_empty(_size_of_total(call)), y, u


def _value_gradient(
    saved: SimpleNamespace, wanted: set[str], grad: Tensor | None, *also: Tensor | None
) -> Gradients:
    names = _wanted(saved, wanted)
    # a gradient that is made with a graph is there to be differentiated
    twice = saved.n_kept == 2 and torch.is_grad_enabled()
    n_kept = 2 if twice and not INWARD.isdisjoint(names.split()) else 0
    if grad is None:
        grad = saved.inputs[0].new_zeros(_size_of_total(saved))
    *found, _, _ = escn_conv_gradient(
        *(grad, saved.inputs, saved.names, saved.weights, saved.edges),
        *(saved.outputs[: saved.n_kept], [part for part in also if part is not None]),
        *(names, n_kept, saved.kernels),
    )
    return _by_argument(saved, names, found)


@kernel(outputs=_fake_value, gradient=_value_gradient, keeps=(1, 2))
def escn_conv(
    inputs: list[Tensor],
    names: str,
    weights: list[Tensor],
    edges: list[Tensor],
    n_kept: int,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums on the atoms, and of the outputs of both maps as many as are to be kept."""
    ...


def _fake_gradients(call: SimpleNamespace, **others: Tensor) -> list[Tensor]:
    tensors = _named(call) | others
    wanted = _expanded(call.wanted, len(call.weights) // 2)
    return [torch.empty_like(tensors[name]) for name in wanted]


def _fake_gradient(call: SimpleNamespace) -> list[Tensor]:
    first, second = layer_shapes(call.inputs[0], call.weights)
    return [*_fake_gradients(call), *_fake_rows(call, second.width_in, first.width_in)]


def _gradient_gradient(
    saved: SimpleNamespace, wanted: set[str], cotangents: list[Tensor | None]
) -> Gradients:
    along = _along(saved, cotangents[:-2])
    if not along:
        return {}
    if saved.also:  # the gradient of a second one
        raise NotImplementedError(
            "escn_conv has no third derivative; with use_backend('reference') it is plain torch"
        )
    names, call = _wanted(saved, wanted), (saved.inputs, saved.names, saved.weights, saved.edges)
    kept, complete = saved.kept, len(saved.kept) == 2
    if not complete:
        _, *kept = escn_conv(*call, 2, saved.kernels)
    insides = not complete or "kept" in wanted
    others = ["grad"] * ("grad" in wanted) + ["y", "u"] * insides
    found = escn_conv_second_gradient(
        *(saved.grad, *call, [*kept, *saved.outputs], list(along.values()), " ".join(along)),
        *(" ".join([names, *others]), saved.kernels),
    )
    n_own = len(found) - len(others)
    own, rest = found[:n_own], dict(zip(others, found[n_own:], strict=True))
    also = [rest[name] for name in ("y", "u") if name in rest]
    if not complete:  # what goes through y and u ends here
        zero = torch.zeros_like(saved.grad)
        more = escn_conv_gradient(zero, *call, kept, also, names, 0, saved.kernels)
        own = [one + other for one, other in zip(own, more[:n_own], strict=True)]
    results = _by_argument(saved, names, own)
    if "grad" in wanted:
        results["grad"] = rest["grad"]
    if complete and "kept" in wanted:
        results["kept"] = also
    return results


@kernel(outputs=_fake_gradient, gradient=_gradient_gradient, keeps=(-2, -1))
def escn_conv_gradient(
    grad: Tensor,
    inputs: list[Tensor],
    names: str,
    weights: list[Tensor],
    edges: list[Tensor],
    kept: list[Tensor],
    also: list[Tensor],
    wanted: str,
    n_kept: int,
    kernels: str,
) -> list[Tensor]:
    """Return the gradients of what is ``wanted``.

    The one of ``vectors`` is that with respect to a turn of each edge, (n_edges, 3). The last two,
    dE/da and dE/dz, are what the gradient of this wants kept. ``kept`` has y and u, or less,
    ``also`` is empty or has what is felt of them beside ``grad``.
    """
    ...


def _fake_second(call: SimpleNamespace) -> list[Tensor]:
    return _fake_gradients(call, grad=call.grad, y=call.kept[0], u=call.kept[1])


@kernel(outputs=_fake_second)
def escn_conv_second_gradient(
    grad: Tensor,
    inputs: list[Tensor],
    names: str,
    weights: list[Tensor],
    edges: list[Tensor],
    kept: list[Tensor],
    directions: list[Tensor],
    along: str,
    wanted: str,
    kernels: str,
) -> list[Tensor]:
    """Return the gradients of <directions, gradients ``along`` these names>, as they are wanted.

    Wanted may be ``grad`` and y and u, which are inputs like the others: what goes through them is
    left to the gradient. ``kept`` has both, and dE/da and dE/dz, empty where they were not kept.
    """
    ...


def flat(names: str, found: Named) -> list[Tensor]:
    """Return gradients in the order of names, those of a map's weights one after the other."""
    parts = [found[name] for name in names.split()]
    return [part for some in parts for part in (some if isinstance(some, list) else [some])]


def grouped(names: str, tensors: list[Tensor]) -> Named:
    """Return tensors by names, those of the weights of a map as one list."""
    found: Named = {}
    for name, tensor in zip(names.split(), tensors, strict=True):
        head, dot, _ = name.partition(".")
        if dot:
            found.setdefault(head, []).append(tensor)
        else:
            found[name] = tensor
    return found


def _wanted(saved: SimpleNamespace, wanted: set[str]) -> str:
    """Return the names of the wanted gradients; of a map's weights all or none."""
    names = [name for n, name in enumerate(saved.names.split()) if f"inputs.{n}" in wanted]
    n_maps = len(saved.weights) // 2
    for name, start in zip(MAPS, (0, n_maps), strict=True):
        if any([f"weights.{start + m}" in wanted for m in range(n_maps)]):
            names.append(name)
    return " ".join(names)


def _by_argument(saved: SimpleNamespace, names: str, found: list[Tensor]) -> Gradients:
    """Return the gradients by the arguments; that by a turn becomes one by ``vectors``."""
    own = dict(zip(_expanded(names, len(saved.weights) // 2), found, strict=True))
    if "vectors" in own:
        own["vectors"] = turn_gradient(own["vectors"], saved.inputs[1], saved.kernels)
    by_place = [own.get(name) for name in _named(saved)]
    n_inputs = len(saved.inputs)
    return {"inputs": by_place[:n_inputs], "weights": by_place[n_inputs:]}


def _along(saved: SimpleNamespace, cotangents: list[Tensor | None]) -> dict[str, Tensor]:
    """Return the directions by names; of a map's weights all or none."""
    names, tensors = _expanded(saved.wanted, len(saved.weights) // 2), _named(saved)
    given = dict(zip(names, cotangents, strict=True))
    maps = {name.partition(".")[0] for name in names if "." in name and given[name] is not None}
    found = {}
    for name, direction in given.items():
        if direction is not None:
            found[name] = direction
        elif name.partition(".")[0] in maps:
            found[name] = torch.zeros_like(tensors[name])
    return found
