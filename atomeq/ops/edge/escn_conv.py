"""The whole eSCN edge layer as one operation, differentiable twice, that keeps next to nothing.

Forward, gradient and gradient of the gradient are three registered operations, over
:mod:`atomeq.ops.edge.layer` and :mod:`atomeq.ops.edge.second_gradient`. A third derivative is
refused; the single operations rotate_to_edge, so2_linear and rotate_from_edge have derivatives of
any order.

The three share their arguments:

    inputs   those of ``INPUTS`` that are given, in that order
    weights  of the first map, one for each order, and then of the second
    edges    wigner, source, target, and where the kernels want them the sorted edges
    given    which of ``INPUTS`` are

A gradient has a place of its own: that of its input or, behind these, of its weight.

What a gradient feels of the layer's insides, the outputs y and u of both maps, goes through these:
in a backward pass over a gradient they are inputs like others, and the layer's own backward pass,
which comes last, takes the gradient with respect to them along. Each map is multiplied once then.
"""

from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from atomeq.ops.edge import layer as escn_layer
from atomeq.ops.edge.frame import EdgeFrame
from atomeq.ops.edge.layer import EdgeLayer, layer_shapes
from atomeq.ops.edge.rotation import turn_gradient
from atomeq.ops.edge.second_gradient import second_gradient
from atomeq.ops.edge.so2_map import Gradients
from atomeq.ops.edge.so2_shape import views
from atomeq.ops.registration import WANT_SEGMENTS, kernels_of, registered

INPUTS = (
    *("x", "vectors", "radial", "radial_weight", "radial_bias", "envelope"),
    *("first_bias", "second_bias"),
)
_OTHERS = ("grad", "y", "u")  # what the second gradient can be of besides


def conv(
    x: Tensor,
    frame: EdgeFrame,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    *,
    radial: Tensor | None = None,
    radial_map: tuple[Tensor, Tensor | None] | None = None,
    envelope: Tensor | None = None,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    recompute: bool = False,
    kernels: str,
) -> Tensor:
    """Return the whole edge layer as one operation of some kernels."""
    mapped = [*((None, None) if radial_map is None else radial_map), *biases]
    weights = [*first, *second]
    if any([leaf is not None and leaf.requires_grad for leaf in (*weights, *mapped)]):
        weights = views(weights)
        mapped = [leaf if leaf is None else views([leaf])[0] for leaf in mapped]
    inputs = [x, frame.vectors, radial, *mapped[:2], envelope, *mapped[2:]]
    present = [tensor for tensor in inputs if tensor is not None]
    given = [tensor is not None for tensor in inputs]
    keep = torch.is_grad_enabled() and not recompute
    keep = keep and any([tensor.requires_grad for tensor in (*present, *weights)])
    edges = [frame.wigner, frame.source, frame.target]
    if kernels in WANT_SEGMENTS:
        edges += frame.segments_for(edges[1:])
    total, _, _ = escn_conv(present, weights, edges, given, keep, kernels)
    return total


def _layer(
    inputs: list[Tensor],
    weights: list[Tensor],
    edges: list[Tensor],
    given: list[bool],
    kernels: str,
) -> EdgeLayer:
    wigner, source, target, *segments = edges
    tensors = {"wigner": wigner, "source": source, "target": target}
    tensors |= zip(_names(given, weights), inputs, strict=False)  # weights have names too
    del tensors["vectors"]  # what is made of them is the Wigner matrices
    for name, tensor in tensors.items():
        tensors[name] = tensor.detach().contiguous()
    return EdgeLayer(kernels_of("edge", kernels), tensors, weights, segments)


@cache
def _names_of(given: tuple[bool, ...], n_maps: int) -> tuple[str, ...]:
    inputs = [name for name, there in zip(INPUTS, given, strict=True) if there]
    return (*inputs, *(f"{name}.{m}" for name in ("first", "second") for m in range(n_maps)))


def _names(given: list[bool], weights: list[Tensor]) -> tuple[str, ...]:
    """Return the names of what has a gradient, in the order of the gradients."""
    return _names_of(tuple(given), len(weights) // 2)


def _rows(call: SimpleNamespace, widths: list[int]) -> list[Tensor]:
    """Return rows of the edges as a trace sees them, none unless they are kept."""
    n_kept = call.edges[0].shape[0] if call.keep else 0
    return [call.inputs[0].new_empty(n_kept, width) for width in widths]


def _size_of_total(call: SimpleNamespace) -> tuple[int, int, int]:
    n_atoms, n_sph, _ = call.inputs[0].shape
    return n_atoms, n_sph, layer_shapes(call.inputs[0], call.weights)[1].c_out


def _fake_value(call: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    first, second = layer_shapes(call.inputs[0], call.weights)
    y, u = _rows(call, [first.width, second.width])
    return call.inputs[0].new_empty(_size_of_total(call)), y, u


def _value_gradient(
    saved: SimpleNamespace, wanted: set[str], grad: Tensor | None, *also: Tensor | None
) -> Gradients:
    names, places = _names(saved.given, saved.weights), _places(saved, wanted)
    # a gradient that is made with a graph is there to be differentiated
    inward = bool(_whole(names, places) & escn_layer.INWARD)
    keep = saved.keep and torch.is_grad_enabled() and inward
    if grad is None:
        grad = saved.inputs[0].new_zeros(_size_of_total(saved))
    *found, _, _ = escn_conv_gradient(
        *(grad, saved.inputs, saved.weights, saved.edges, saved.given),
        *(saved.outputs if saved.keep else [], [part for part in also if part is not None]),
        *(places, keep, saved.kernels),
    )
    return _by_argument(saved, places, found)


@registered(outputs=_fake_value, gradient=_value_gradient, keeps=(1, 2))
def escn_conv(
    inputs: list[Tensor],
    weights: list[Tensor],
    edges: list[Tensor],
    given: list[bool],
    keep: bool,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums on the atoms, and the outputs of both maps if they are to be kept."""
    return escn_layer.value(_layer(inputs, weights, edges, given, kernels), keep=keep)


def _fake_gradient(call: SimpleNamespace) -> list[Tensor]:
    first, second = layer_shapes(call.inputs[0], call.weights)
    return [*_fake_gradients(call), *_rows(call, [second.width_in, first.width_in])]


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
    places, n_inputs = _places(saved, wanted), len(cotangents) - 2
    call, kept = (saved.inputs, saved.weights, saved.edges, saved.given), saved.kept
    if not kept:
        _, *kept = escn_conv(*call, True, saved.kernels)
    insides = not saved.kept or "kept" in wanted
    others = [n for n, want in enumerate(("grad" in wanted, insides, insides), n_inputs) if want]
    found = escn_conv_second_gradient(
        *(saved.grad, *call, [*kept, *saved.outputs], list(along.values()), list(along)),
        *([*places, *others], saved.kernels),
    )
    own, grad, also = found[:n_inputs], found[n_inputs], found[n_inputs + 1 :]
    if not saved.kept:  # what goes through y and u ends here
        zero = torch.zeros_like(saved.grad)
        more = escn_conv_gradient(zero, *call, kept, also, places, False, saved.kernels)
        own = [one + other for one, other in zip(own, more[:n_inputs], strict=True)]
    others = {"grad": grad} if "grad" in wanted else {}
    others |= {"kept": also} if "kept" in wanted else {}
    return _by_argument(saved, places, own) | others


@registered(outputs=_fake_gradient, gradient=_gradient_gradient, keeps=(-2, -1))
def escn_conv_gradient(
    grad: Tensor,
    inputs: list[Tensor],
    weights: list[Tensor],
    edges: list[Tensor],
    given: list[bool],
    kept: list[Tensor],
    also: list[Tensor],
    wanted: list[int],
    keep: bool,
    kernels: str,
) -> list[Tensor]:
    """Return the gradients at the places ``wanted``, empty tensors at the others.

    The one of ``vectors`` is that with respect to a turn of each edge, (n_edges, 3). The last two
    are what the gradient of this wants kept. ``kept`` is empty or has y and u, ``also`` is empty or
    has the gradients with respect to them.
    """
    names = _names(given, weights)
    maps = _whole(names, wanted)
    layer = _layer(inputs, weights, edges, given, kernels)
    also = [rows.contiguous() for rows in also]
    found, *rows = escn_layer.gradient(layer, grad.contiguous(), kept, also, maps, keep=keep)
    return [*(found.get(name, grad.new_empty(0)) for name in names), *rows]


def _fake_second(call: SimpleNamespace) -> list[Tensor]:
    return _fake_gradients(call, call.grad, *call.kept[:2])


@registered(outputs=_fake_second)
def escn_conv_second_gradient(
    grad: Tensor,
    inputs: list[Tensor],
    weights: list[Tensor],
    edges: list[Tensor],
    given: list[bool],
    kept: list[Tensor],
    directions: list[Tensor],
    along: list[int],
    wanted: list[int],
    kernels: str,
) -> list[Tensor]:
    """Return the gradients of <directions, gradients at the places ``along``>.

    The last three are those of ``grad`` and of the kept y and u.
    """
    names = (*_names(given, weights), *_OTHERS)
    named = {names[place]: d.contiguous() for place, d in zip(along, directions, strict=True)}
    found = second_gradient(
        _layer(inputs, weights, edges, given, kernels),
        *(grad.contiguous(), kept, named, _whole(names, wanted)),
    )
    return [found.get(name, grad.new_empty(0)) for name in names]


def _whole(names: tuple[str, ...], places: list[int]) -> set[str]:
    """Return the names at some places, a map's weights by that of the map."""
    return {names[place].partition(".")[0] for place in places}


def _places(saved: SimpleNamespace, wanted: set[str]) -> list[int]:
    """Return the places of the wanted gradients; of a map's weights all or none."""
    n_inputs, n_maps = len(saved.inputs), len(saved.weights) // 2
    places = [n for n in range(n_inputs) if f"inputs.{n}" in wanted]
    for some in (range(n_maps), range(n_maps, 2 * n_maps)):
        if any(f"weights.{n}" in wanted for n in some):
            places += [n_inputs + n for n in some]
    return places


def _fake_gradients(call: SimpleNamespace, *others: Tensor) -> list[Tensor]:
    return [
        torch.empty_like(t) if place in call.wanted else t.new_empty(0)
        for place, t in enumerate([*call.inputs, *call.weights, *others])
    ]


def _by_argument(saved: SimpleNamespace, places: list[int], found: list[Tensor]) -> Gradients:
    """Return the gradients by the arguments; that by a turn becomes one by ``vectors``."""
    own = [grad if place in places else None for place, grad in enumerate(found)]
    turned = INPUTS.index("vectors")  # the first two are always given
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
    n_inputs, n_maps = len(saved.inputs), len(saved.weights) // 2
    for some in (range(n_maps), range(n_maps, 2 * n_maps)):
        if any(n_inputs + n in made for n in some):
            for n in some:
                made.setdefault(n_inputs + n, torch.zeros_like(saved.weights[n]))
    return made
