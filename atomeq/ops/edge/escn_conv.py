"""The whole eSCN edge layer as one operation, differentiable twice, that keeps next to nothing.

Forward, gradient and gradient of the gradient are three registered operations, over
:mod:`atomeq.ops.edge.layer` and :mod:`atomeq.ops.edge.layer_second`. A third
derivative is refused; the single operations rotate_to_edge, so2_linear and rotate_from_edge have
derivatives of any order.

The three share their arguments:

    inputs   those of ``INPUTS`` that are given, in that order
    weights  of the first map, one for each order, and then of the second
    edges    wigner, source, target, and where the kernels want them the sorted edges
    layout   lmax, mmax, and the places in ``INPUTS`` of what ``inputs`` has

A gradient has a place of its own: that of its input or, behind these, of its weight.
"""

from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from atomeq.ops.edge import layer as escn_layer
from atomeq.ops.edge import layer_second as escn_second
from atomeq.ops.edge.kernel_sets import edge_kernels
from atomeq.ops.edge.rotation import turn_gradient
from atomeq.ops.edge.so2_shape import SO2Shape
from atomeq.ops.registration import registered

INPUTS = ("x", "vectors", "radial", "radial_weight", "radial_bias", "envelope")
_GRAD = "grad"  # what the second gradient can be of besides


def layer_arguments(
    inputs: dict[str, Tensor | None], lmax: int, mmax: int
) -> tuple[list[Tensor], list[int]]:
    """Return ``inputs`` and ``layout`` from the inputs by name, None for one that is not given."""
    given = [(place, inputs.get(name)) for place, name in enumerate(INPUTS)]
    present = [(place, value) for place, value in given if value is not None]
    return [value for _, value in present], [lmax, mmax, *(place for place, _ in present)]


def _names(layout: list[int]) -> tuple[str, ...]:
    """Return the names of what has a gradient, in the order of the gradients."""
    return _names_of(tuple(map(int, layout)))  # a trace may have symbols for them


@cache
def _names_of(layout: tuple[int, ...]) -> tuple[str, ...]:
    _, mmax, *given = layout
    weights = [f"{name}.{m}" for name in ("first", "second") for m in range(mmax + 1)]
    return (*(INPUTS[place] for place in given), *weights)


def _shapes(call: SimpleNamespace) -> tuple[SO2Shape, SO2Shape]:
    """Return the sizes of the two maps: both atoms to the hidden channels and gates, and on."""
    lmax, mmax = map(int, call.layout[:2])
    c_out, hidden = (size // (lmax + 1) for size in call.weights[mmax + 1].shape)
    return (
        SO2Shape(lmax, mmax, 2 * call.inputs[0].shape[2], hidden, lmax * hidden),
        SO2Shape(lmax, mmax, hidden, c_out, 0),
    )


def _layer(
    inputs: list[Tensor],
    weights: list[Tensor],
    edges: list[Tensor],
    layout: list[int],
    kernels: str,
) -> escn_layer.EdgeLayer:
    n_maps = layout[1] + 1
    wigner, source, target, *segments = edges
    tensors = dict(zip(_names(layout), inputs, strict=False))
    tensors |= {"wigner": wigner, "source": source, "target": target}
    return escn_layer.EdgeLayer(
        edge_kernels(kernels),
        *_shapes(SimpleNamespace(inputs=inputs, weights=weights, layout=layout)),
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        (weights[:n_maps], weights[n_maps:]),
        segments,
    )


def _rows(call: SimpleNamespace, widths: list[int]) -> list[Tensor]:
    """Return rows of the edges as a trace sees them, none unless they are kept."""
    n_kept = call.edges[0].shape[0] if call.keep else 0
    return [call.inputs[0].new_empty(n_kept, width) for width in widths]


def _fake_value(call: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    shapes, x = _shapes(call), call.inputs[0]
    y, u = _rows(call, [shape.width for shape in shapes])
    return x.new_empty(*x.shape[:2], shapes[1].c_out), y, u


def _value_gradient(
    saved: SimpleNamespace, wanted: set[str], grad: Tensor | None, *_: Tensor | None
) -> dict[str, list[Tensor | None]]:
    names, places = _names(saved.layout), _places(saved, wanted)
    # a gradient that is made with a graph is there to be differentiated
    inward = bool(_whole(names, places) & escn_layer.INWARD)
    keep = saved.keep and torch.is_grad_enabled() and inward
    found = escn_conv_gradient(
        *(grad, saved.inputs, saved.weights, saved.edges, saved.layout),
        *(saved.outputs, places, keep, saved.kernels),
    )
    return _by_argument(saved, places, list(found[:-2]))


@registered(outputs=_fake_value, gradient=_value_gradient, keeps=(1, 2))
def escn_conv(
    inputs: list[Tensor],
    weights: list[Tensor],
    edges: list[Tensor],
    layout: list[int],
    keep: bool,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums on the atoms, and the outputs of both maps if they are to be kept."""
    return escn_layer.value(_layer(inputs, weights, edges, layout, kernels), keep=keep)


def _fake_gradient(call: SimpleNamespace) -> list[Tensor]:
    widths = [shape.n_rows * shape.c_in for shape in reversed(_shapes(call))]
    return [*_fake_gradients(call, call.wanted), *_rows(call, widths)]


def _gradient_gradient(
    saved: SimpleNamespace, wanted: set[str], cotangents: list[Tensor | None]
) -> dict[str, Tensor | list[Tensor | None] | None]:
    along = _along(saved, cotangents[:-2])
    if not along:
        return {}
    places = _places(saved, wanted)
    behind = len(cotangents) - 2  # the place of the gradient of ``grad``
    found = escn_conv_second_gradient(
        *(saved.grad, saved.inputs, saved.weights, saved.edges, saved.layout),
        *([*saved.kept, *saved.outputs], list(along.values()), list(along)),
        *([*places, behind] if _GRAD in wanted else places, saved.kernels),
    )
    *found, to_grad = found
    named: dict[str, Tensor | list[Tensor | None] | None] = {}
    named |= _by_argument(saved, places, found)
    return named | {_GRAD: to_grad if _GRAD in wanted else None}


@registered(outputs=_fake_gradient, gradient=_gradient_gradient, keeps=(-2, -1))
def escn_conv_gradient(
    grad: Tensor,
    inputs: list[Tensor],
    weights: list[Tensor],
    edges: list[Tensor],
    layout: list[int],
    kept: list[Tensor],
    wanted: list[int],
    keep: bool,
    kernels: str,
) -> list[Tensor]:
    """Return the gradients at the places ``wanted``, empty tensors at the others.

    The one of ``vectors`` is that with respect to a turn of each edge, (n_edges, 3). The last two
    are what the gradient of this wants kept.
    """
    layer, names = _layer(inputs, weights, edges, layout, kernels), _names(layout)
    found, *rows = escn_layer.gradient(
        layer, grad.contiguous(), kept, _whole(names, wanted), keep=keep
    )
    return [*(found.get(name, grad.new_empty(0)) for name in names), *rows]


def _fake_second(call: SimpleNamespace) -> list[Tensor]:
    found = _fake_gradients(call, call.wanted)
    to_grad = torch.empty_like(call.grad) if len(found) in call.wanted else call.grad.new_empty(0)
    return [*found, to_grad]


@registered(outputs=_fake_second)
def escn_conv_second_gradient(
    grad: Tensor,
    inputs: list[Tensor],
    weights: list[Tensor],
    edges: list[Tensor],
    layout: list[int],
    kept: list[Tensor],
    directions: list[Tensor],
    along: list[int],
    wanted: list[int],
    kernels: str,
) -> list[Tensor]:
    """Return the gradients of <directions, gradients at the places ``along``>, of ``grad`` last."""
    layer, names = _layer(inputs, weights, edges, layout, kernels), (*_names(layout), _GRAD)
    named = {names[place]: d.contiguous() for place, d in zip(along, directions, strict=True)}
    found = escn_second.second_gradient(
        layer, grad.contiguous(), kept, named, _whole(names, wanted)
    )
    return [found.get(name, grad.new_empty(0)) for name in names]


def _whole(names: tuple[str, ...], places: list[int]) -> set[str]:
    """Return the names at some places, a map's weights by that of the map."""
    return {names[place].partition(".")[0] for place in places}


def _places(saved: SimpleNamespace, wanted: set[str]) -> list[int]:
    """Return the places of the wanted gradients; of a map's weights all or none."""
    n_maps = saved.layout[1] + 1
    places = [n for n in range(len(saved.inputs)) if f"inputs.{n}" in wanted]
    for start in (0, n_maps):
        some = range(start, start + n_maps)
        if any(f"weights.{n}" in wanted for n in some):
            places += [len(saved.inputs) + n for n in some]
    return places


def _fake_gradients(call: SimpleNamespace, places: list[int]) -> list[Tensor]:
    like = [*call.inputs, *call.weights]
    return [
        torch.empty_like(t) if place in places else t.new_empty(0) for place, t in enumerate(like)
    ]


def _by_argument(
    saved: SimpleNamespace, places: list[int], found: list[Tensor]
) -> dict[str, list[Tensor | None]]:
    """Return the gradients by the arguments; that by a turn becomes one by ``vectors``."""
    own = [grad if place in places else None for place, grad in enumerate(found)]
    turned = saved.layout[2:].index(INPUTS.index("vectors"))
    turn = own[turned]
    if turn is not None:
        own[turned] = turn_gradient(turn, saved.inputs[turned])
    n_inputs = len(saved.inputs)
    return {"inputs": own[:n_inputs], "weights": own[n_inputs:]}


def _along(saved: SimpleNamespace, cotangents: list[Tensor | None]) -> dict[int, Tensor]:
    """Return the directions by their places; of a map's weights all or none."""
    made = {
        place: direction
        for place, direction in enumerate(cotangents)
        if direction is not None and place in saved.wanted
    }
    n_inputs, n_maps = len(saved.inputs), saved.layout[1] + 1
    for start in (0, n_maps):
        some = range(start, start + n_maps)
        if any(n_inputs + n in made for n in some):
            for n in some:
                made.setdefault(n_inputs + n, torch.zeros_like(saved.weights[n]))
    return made
