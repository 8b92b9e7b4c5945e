"""The whole eSCN edge layer as one operation, differentiable twice, that keeps next to nothing.

Forward, gradient and gradient of the gradient are three registered operations, over
:mod:`atomeq.ops.registered.escn_layer` and :mod:`atomeq.ops.registered.escn_second`. A third
derivative is refused by torch; the single operations rotate_to_edge, so2_linear and
rotate_from_edge have derivatives of any order.
"""

from types import SimpleNamespace

import torch
from torch import Tensor

from atomeq.ops.registered import escn_layer, escn_second
from atomeq.ops.registered.edge_rotation import turn_gradient
from atomeq.ops.registered.kernel_sets import edge_kernels
from atomeq.ops.registered.registration import registered
from atomeq.ops.registered.so2_shape import SO2Shape

_TENSORS = ("x", "vectors", "radial", "radial_weight", "radial_bias", "envelope")


def layer_shapes(
    channels: int, second: list[Tensor], lmax: int, mmax: int
) -> tuple[SO2Shape, SO2Shape]:
    """Return the sizes of the two maps: both atoms to the hidden channels and gates, and on."""
    c_out, hidden = (size // (lmax + 1) for size in second[0].shape)
    return (
        SO2Shape(lmax, mmax, 2 * channels, hidden, lmax * hidden),
        SO2Shape(lmax, mmax, hidden, c_out, 0),
    )


def _layer(given: SimpleNamespace) -> escn_layer.EdgeLayer:
    names = (*_TENSORS, "wigner", "source", "target")
    tensors = {name: value for name in names if (value := getattr(given, name)) is not None}
    shapes = layer_shapes(given.x.shape[2], given.second, given.lmax, given.mmax)
    return escn_layer.EdgeLayer(
        edge_kernels(given.kernels),
        *shapes,
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        (list(given.first), list(given.second)),
        list(given.segments),
    )


def _fake_value(call: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    x, shapes = call.x, layer_shapes(call.x.shape[2], call.second, call.lmax, call.mmax)
    n_kept = call.wigner.shape[0] if call.keep else 0
    y, u = (x.new_empty(n_kept, shape.width) for shape in shapes)
    return x.new_empty(*x.shape[:2], shapes[1].c_out), y, u


def _value_gradient(
    saved: SimpleNamespace, wanted: set[str], grad: Tensor | None, *_: Tensor | None
) -> dict[str, Tensor | list[Tensor] | None]:
    # a gradient that is made with a graph is there to be differentiated
    keep = saved.keep and torch.is_grad_enabled() and bool(wanted & escn_layer.INWARD)
    found = escn_conv_gradient(
        grad,
        *(getattr(saved, name) for name in _TENSORS),
        *(saved.wigner, saved.first, saved.second, saved.source, saved.target, saved.segments),
        *(saved.outputs, saved.lmax, saved.mmax, ",".join(sorted(wanted)), keep, saved.kernels),
    )
    return _named(saved, wanted, list(found[:-2]), saved.vectors)


@registered(outputs=_fake_value, gradient=_value_gradient, keeps=(1, 2))
def escn_conv(
    x: Tensor,
    vectors: Tensor,
    wigner: Tensor,
    radial: Tensor | None,
    radial_weight: Tensor | None,
    radial_bias: Tensor | None,
    envelope: Tensor | None,
    first: list[Tensor],
    second: list[Tensor],
    source: Tensor,
    target: Tensor,
    segments: list[Tensor],
    lmax: int,
    mmax: int,
    keep: bool,
    kernels: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums on the atoms, and the outputs of both maps if they are to be kept."""
    return escn_layer.value(_layer(SimpleNamespace(**locals())), keep=keep)


def _fake_gradient(call: SimpleNamespace) -> list[Tensor]:
    n_kept = call.wigner.shape[0] if call.keep else 0
    shapes = layer_shapes(call.x.shape[2], call.second, call.lmax, call.mmax)
    rows = [call.x.new_empty(n_kept, shape.n_rows * shape.c_in) for shape in reversed(shapes)]
    return [*_fake_list(call, _TENSORS), *rows]


def _gradient_gradient(
    saved: SimpleNamespace, wanted: set[str], cotangents: list[Tensor | None]
) -> dict[str, Tensor | list[Tensor] | None]:
    along = _along(saved, cotangents[:-2])
    if not along:
        return {}
    found = escn_conv_second_gradient(
        saved.grad,
        *(getattr(saved, name) for name in _TENSORS),
        *(saved.wigner, saved.first, saved.second, saved.source, saved.target, saved.segments),
        *([*saved.kept, *saved.outputs], ",".join(along), list(along.values())),
        *(saved.lmax, saved.mmax, ",".join(sorted(wanted)), saved.kernels),
    )
    found = list(found)
    named = _named(saved, wanted, found[1:], saved.vectors)
    return named | {"grad": found[0] if "grad" in wanted else None}


@registered(outputs=_fake_gradient, gradient=_gradient_gradient, keeps=(-2, -1))
def escn_conv_gradient(
    grad: Tensor,
    x: Tensor,
    vectors: Tensor,
    radial: Tensor | None,
    radial_weight: Tensor | None,
    radial_bias: Tensor | None,
    envelope: Tensor | None,
    wigner: Tensor,
    first: list[Tensor],
    second: list[Tensor],
    source: Tensor,
    target: Tensor,
    segments: list[Tensor],
    kept: list[Tensor],
    lmax: int,
    mmax: int,
    wanted: str,
    keep: bool,
    kernels: str,
) -> list[Tensor]:
    """Return the gradients of the inputs named in ``wanted``, empty tensors for the others.

    The one of ``vectors`` is that with respect to a turn of each edge, (n_edges, 3). The last two
    are what the gradient of this wants kept.
    """
    given = SimpleNamespace(**locals())
    found, *rows = escn_layer.gradient(
        _layer(given), grad.contiguous(), kept, _set(wanted), keep=keep
    )
    return [*_listed(given, found, _TENSORS), *rows]


def _fake_second(call: SimpleNamespace) -> list[Tensor]:
    return _fake_list(call, ("grad", *_TENSORS))


@registered(outputs=_fake_second)
def escn_conv_second_gradient(
    grad: Tensor,
    x: Tensor,
    vectors: Tensor,
    radial: Tensor | None,
    radial_weight: Tensor | None,
    radial_bias: Tensor | None,
    envelope: Tensor | None,
    wigner: Tensor,
    first: list[Tensor],
    second: list[Tensor],
    source: Tensor,
    target: Tensor,
    segments: list[Tensor],
    kept: list[Tensor],
    along: str,
    directions: list[Tensor],
    lmax: int,
    mmax: int,
    wanted: str,
    kernels: str,
) -> list[Tensor]:
    """Return the gradients of <directions, gradients>, of ``grad`` first.

    ``along`` names the inputs whose gradients the directions belong to.
    """
    given = SimpleNamespace(**locals())
    named = dict(zip(along.split(","), (d.contiguous() for d in directions), strict=True))
    found = escn_second.second_gradient(_layer(given), grad.contiguous(), kept, named, _set(wanted))
    return _listed(given, found, ("grad", *_TENSORS))


def _set(wanted: str) -> set[str]:
    return set(wanted.split(","))


def _weight_names(given: SimpleNamespace) -> list[str]:
    return [f"{name}.{m}" for name in ("first", "second") for m in range(given.mmax + 1)]


def _listed(
    given: SimpleNamespace, found: dict[str, Tensor], tensors: tuple[str, ...]
) -> list[Tensor]:
    """Put gradients into the order of the arguments, weights last, empty tensors for none."""
    return [
        found[name] if name in found else given.x.new_empty(0)
        for name in (*tensors, *_weight_names(given))
    ]


def _fake_list(given: SimpleNamespace, tensors: tuple[str, ...]) -> list[Tensor]:
    wanted, found = _set(given.wanted), {}
    for name in wanted & set(tensors):
        found[name] = torch.empty_like(getattr(given, name))
    for name in wanted & {"first", "second"}:
        weights = getattr(given, name)
        found |= {f"{name}.{m}": torch.empty_like(weight) for m, weight in enumerate(weights)}
    return _listed(given, found, tensors)


def _named(
    saved: SimpleNamespace, wanted: set[str], found: list[Tensor], vectors: Tensor
) -> dict[str, Tensor | list[Tensor] | None]:
    """Return the gradients by the names of the arguments; a turn becomes one of the vectors."""
    names = (*_TENSORS, *_weight_names(saved))
    by_name = dict(zip(names, found, strict=True))
    result: dict[str, Tensor | list[Tensor] | None] = {
        name: by_name[name] for name in _TENSORS if name in wanted
    }
    if "vectors" in wanted:
        result["vectors"] = turn_gradient(by_name["vectors"], vectors)
    for name in wanted & {"first", "second"}:
        result[name] = [by_name[f"{name}.{m}"] for m in range(saved.mmax + 1)]
    return result


def _along(saved: SimpleNamespace, cotangents: list[Tensor | None]) -> dict[str, Tensor]:
    """Return the directions by name; of a map's weights all or none."""
    names = (*_TENSORS, *_weight_names(saved))
    made = _set(saved.wanted)
    along = {
        name: tangent
        for name, tangent in zip(names, cotangents, strict=True)
        if tangent is not None and name.partition(".")[0] in made
    }
    for name in ("first", "second"):
        weights = getattr(saved, name)
        if any(f"{name}.{m}" in along for m in range(len(weights))):
            along |= {
                f"{name}.{m}": along.get(f"{name}.{m}", torch.zeros_like(weight))
                for m, weight in enumerate(weights)
            }
    return along
