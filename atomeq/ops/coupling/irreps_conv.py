"""The Clebsch-Gordan convolution of several tensors, each with its own degree and channels, in one.

    F(x, y, w, z) = sum over edges, paths and channels of w z (x . y)

as in :mod:`~atomeq.ops.coupling.registered`, where x and z are lists of tensors and each path reads
one x and writes to channels of its own in one z. So features whose degrees have different numbers
of channels are neither padded nor cut, and the sums lie as a linear map takes them. The C kernels
do it in one pass, with weights that may be read off a table at the edge's length, never stored;
elsewhere it is one :func:`~atomeq.ops.coupling.operations.cg_conv` for each x.
"""

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from atomeq.ops.coupling.clebsch_gordan import Form
from atomeq.ops.coupling.cpu import kernels as cg
from atomeq.ops.coupling.operations import cg_conv
from atomeq.ops.coupling.weight_table import WeightTable
from atomeq.ops.dispatch import serving, size_of
from atomeq.ops.edge.frame import checked_edges
from atomeq.ops.paths import Path
from atomeq.ops.registration import contiguous, registered
from atomeq.typing import EdgeIndex

Route = tuple[Path, int, int]  # a path, which x it reads, which sum it goes to
_NAMES = ("x", "y", "weights", "z")


def irreps_conv(
    x: Sequence[Tensor],
    y: Tensor,
    weights: Tensor | WeightTable,
    edge_index: EdgeIndex,
    n_atoms: int,
    routes: Sequence[Route],
) -> list[Tensor]:
    """Gather each x on the sources, couple it with y by the edge's weights, sum on the targets.

    Args:
        x: Features, each of one degree, (n_sources, 2 l1 + 1, channels).
        y: Spherical harmonics of the edges, (n_edges, n_sph).
        weights: Of each edge, path after path, each as many as its x has channels; or a table.
        edge_index: Row 0 is the source, row 1 the target, (2, n_edges).
        n_atoms: Number of targets.
        routes: The paths, those of one x after those of the one before.

    Returns:
        The sums, each of one degree, (n_atoms, 2 l3 + 1, channels): the channels of all paths that
        go there, one path after the other. They are normalised like stacked paths of ``cg_conv``.

    Raises:
        IndexError: An end of an edge is no atom.
        ValueError: Shapes do not fit together.
    """
    code = _code(tuple(routes))
    layout = _layout(code, tuple(one.shape[-1] for one in x))
    n_weights = layout.places[-1].weight + layout.places[-1].channels
    given = weights.polynomials if isinstance(weights, WeightTable) else weights
    if given.shape[-1] != n_weights or edge_index.shape != (2, y.shape[0]):
        raise ValueError(
            f"{tuple(given.shape)} weights, {y.shape[0]} harmonics and edge_index "
            f"{tuple(edge_index.shape)} are not those of edges with {n_weights} weights"
        )
    # Autocast mixes dtypes, of which C would read one as the other.
    mixed = any(tensor.dtype != y.dtype for tensor in (*x, given))
    if mixed or not reads_tables(y):
        return _one_by_one(x, y, weights, edge_index, n_atoms, layout)
    edge_index = checked_edges(edge_index, x[0].shape[0], n_atoms)
    edges = (None, *weights) if isinstance(weights, WeightTable) else (weights, None, None)
    ends = [end.contiguous() for end in edge_index]
    return cg_irreps_partials(list(x), y, *edges, [], ends, n_atoms, "z", code)


def reads_tables(y: Tensor) -> bool:
    """Whether a convolution with these harmonics is one pass, in kernels that read tables."""
    return serving("cg_conv", size_of(y, 1)) == "cpu"


def _one_by_one(
    x: Sequence[Tensor],
    y: Tensor,
    weights: Tensor | WeightTable,
    edge_index: Tensor,
    n_atoms: int,
    layout: "_Layout",
) -> list[Tensor]:
    """Return the sums by one convolution for each x."""
    if isinstance(weights, WeightTable):
        weights = weights.weights()[0]
    parts: list[list[Tensor]] = [[] for _ in layout.shapes]
    for number, one in enumerate(x):
        mine = [k for k, place in enumerate(layout.places) if place.x.tensor == number]
        if not mine:
            continue
        first, last = layout.places[mine[0]], layout.places[mine[-1]]
        own = weights[:, first.weight : last.weight + last.channels].unflatten(1, (len(mine), -1))
        paths = [layout.form.paths[k] for k in mine]
        below = paths[0].l1 ** 2  # degrees below are not read
        rows = torch.nn.functional.pad(one, (0, 0, below, 0))
        sums = cg_conv(rows, y, own, edge_index, n_atoms, paths, output="paths")
        sizes = [2 * path.l3 + 1 for path in paths]
        for k, part in zip(mine, sums.split(sizes, dim=1), strict=True):
            parts[layout.places[k].z.tensor].append(part)
    return [torch.cat(some, dim=-1) for some in parts]


class _Layout(NamedTuple):
    """Where each path reads and writes, and the rows and channels of the sums."""

    form: Form
    places: tuple[cg.PathPlaces, ...]
    shapes: tuple[tuple[int, int], ...]


@functools.cache
def _code(routes: tuple[Route, ...]) -> str:
    """Return routes as a string, which is what an operation of a traced graph can carry."""
    return " ".join(f"{l1}-{l2}-{l3}-{x}-{z}" for (l1, l2, l3), x, z in routes)


@functools.cache
def _layout(code: str, channels: tuple[int, ...]) -> _Layout:
    numbers = [tuple(map(int, route.split("-"))) for route in code.split()]
    routes = [(Path(l1, l2, l3), x, z) for l1, l2, l3, x, z in numbers]
    totals, rows = dict.fromkeys((z for *_, z in routes), 0), {}
    starts = []
    for path, x, z in routes:
        if rows.setdefault(z, 2 * path.l3 + 1) != 2 * path.l3 + 1:
            raise ValueError(f"path {path} goes to sum {z}, which has {rows[z]} rows")
        starts.append(totals[z])
        totals[z] += channels[x]
    places, weight = [], 0
    for (_, x, z), start in zip(routes, starts, strict=True):
        c = channels[x]
        ends = (cg.Place(x, 0, c), cg.Place(z, start, totals[z]))
        places.append(cg.PathPlaces(*ends, c, weight))
        weight += c
    shapes = tuple((rows[z], totals[z]) for z in range(len(totals)))
    return _Layout(Form(tuple(path for path, _, _ in routes), "uvu", True), tuple(places), shapes)


def _layout_of(x: list[Tensor], code: str) -> _Layout:
    return _layout(code, tuple(one.shape[-1] for one in x))


def _fake_partials(call: SimpleNamespace) -> list[Tensor]:
    layout = _layout_of(call.x, call.routes)
    made = {
        "x": call.x,
        "y": [call.y],
        "weights": [call.weights],
        "lengths": [call.lengths],
        "z": [call.y.new_empty(call.n_targets, *shape) for shape in layout.shapes],
    }
    return [torch.empty_like(one) for name in call.arguments.split() for one in made[name]]


def _partials_gradient(
    saved: SimpleNamespace, wanted: set[str], grads: Sequence[Tensor | None]
) -> dict[str, Tensor | list[Tensor]]:
    fixed = (saved.ends, saved.n_targets)
    if saved.lengths is not None:
        assert saved.arguments == "z", "with a table only the convolution itself is differentiated"
        return _gradient_by_length(saved, wanted, grads)
    shapes = [(saved.n_targets, *shape) for shape in _layout_of(saved.x, saved.routes).shapes]
    found: dict[str, list[Tensor]] = {}
    remaining = list(grads)
    for place in saved.arguments.split():
        given = {"x": saved.x, "y": [saved.y], "weights": [saved.weights], "z": saved.z}
        sizes = shapes if place == "z" else [one.shape for one in given[place]]
        mine, remaining = remaining[: len(sizes)], remaining[len(sizes) :]
        if all(grad is None for grad in mine):
            continue
        given[place] = [
            saved.y.new_zeros(size) if grad is None else grad
            for grad, size in zip(mine, sizes, strict=True)
        ]
        others = [name for name in _NAMES if name in wanted and name != place and given[name]]
        if not others:
            continue
        (y,), (weights,) = given["y"], given["weights"]
        partials = cg_irreps_partials(
            given["x"], y, weights, None, None, given["z"], *fixed, " ".join(others), saved.routes
        )
        for name in others:
            some, partials = partials[: len(given[name])], partials[len(given[name]) :]
            before = found.get(name)
            found[name] = (
                some if before is None else [a + b for a, b in zip(before, some, strict=True)]
            )
    return {name: some if name in ("x", "z") else some[0] for name, some in found.items()}


def _gradient_by_length(
    saved: SimpleNamespace, wanted: set[str], grads: Sequence[Tensor | None]
) -> dict[str, Tensor | list[Tensor]]:
    layout = _layout_of(saved.x, saved.routes)
    z = [
        saved.y.new_zeros(saved.n_targets, *shape) if grad is None else grad
        for grad, shape in zip(grads, layout.shapes, strict=True)
    ]
    names = [name for name in ("x", "y", "lengths") if name in wanted]
    fixed = (z, saved.ends, saved.n_targets)
    if torch.is_grad_enabled():  # what can be differentiated once more has its weights made
        weights, slopes = WeightTable(saved.lengths, saved.polynomials).weights()
        edges, by = (weights, None, None), ["weights" if n == "lengths" else n for n in names]
        *partials, last = cg_irreps_partials(
            saved.x, saved.y, *edges, *fixed, " ".join(by), saved.routes
        )
        partials.append((last * slopes).sum(1) if "lengths" in names else last)
    else:
        edges = (None, saved.lengths, saved.polynomials)
        partials = cg_irreps_partials(
            saved.x, saved.y, *edges, *fixed, " ".join(names), saved.routes
        )
    found: dict[str, Tensor | list[Tensor]] = {}
    if "x" in names:
        found["x"], partials = partials[: len(saved.x)], partials[len(saved.x) :]
    return found | dict(zip([name for name in names if name != "x"], partials, strict=True))


@registered(outputs=_fake_partials, gradient=_partials_gradient)
def cg_irreps_partials(
    x: list[Tensor],
    y: Tensor,
    weights: Tensor | None,
    lengths: Tensor | None,
    polynomials: Tensor | None,
    z: list[Tensor],
    ends: list[Tensor],
    n_targets: int,
    arguments: str,
    routes: str,
) -> list[Tensor]:
    """Return the partial derivatives of F by the named arguments, in the shapes of these.

    The weights are given, or there are ``lengths`` and ``polynomials`` of a table instead. ``z``
    may be empty where only its own derivative is asked for.
    """
    layout = _layout_of(x, routes)
    wanted = arguments.split()
    x, y, z = contiguous(x), contiguous(y), contiguous(z)
    given = weights
    if lengths is not None and polynomials is not None:
        given = WeightTable(contiguous(lengths), contiguous(polynomials))
    elif weights is not None:
        given = contiguous(weights)[:, None]  # one axis more, as the kernel tells weights of edges
    shapes = [(n_targets, *shape) for shape in layout.shapes]
    found = cg.block_partials(
        x, y, given, z or None, shapes, ends, wanted, layout.form, layout.places
    )
    if "weights" in found:
        found["weights"] = [found["weights"][0][:, 0]]
    return [part for name in wanted for part in found[name]]
