"""The eSCN edge layer in raw functions: value and gradient.

For each edge, with G the gather of both atoms, W the rotation into its frame, S the sum on the
target atoms,

    r = W G x,  z = s r,  y = M_1 z + b_1,  a = gate(y),  u = M_2 a + b_2,  out = S f W^T u.

Edges are worked on a block at a time, and between the passes nothing of an edge is kept but y and
u, and for a second derivative dE/da and dE/dz, or not even these.
"""

import math
from collections.abc import Iterator
from functools import cache, cached_property
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atomeq.ops.edge.frame import segments_of
from atomeq.ops.edge.so2_shape import SO2Shape

Named = dict[str, Tensor]
RADIAL = {"radial", "radial_weight", "radial_bias"}
# what a gradient must pass the first map for
INWARD = {"first", "first_bias", "x", "vectors", *RADIAL}


class WayIn(NamedTuple):
    """Where the gradients of the way in, <grad, s W G x>, go; None where one is not wanted.

    Attributes:
        scale: Is written, (n_edges, n_scales).
        x: Is added to, (n_atoms, n_sph, C).
        turn: Of each edge; is written, (n_edges, 3).
    """

    scale: Tensor | None = None
    x: Tensor | None = None
    turn: Tensor | None = None


def layer_shapes(x: Tensor, weights: list[Tensor]) -> tuple[SO2Shape, SO2Shape]:
    """Return the sizes of the two maps: both atoms to the hidden channels and gates, and on."""
    lmax, n_maps = math.isqrt(int(x.shape[1])) - 1, len(weights) // 2
    c_out, hidden = weights[n_maps].shape
    c_out, hidden = c_out // (lmax + 1), hidden // (lmax + 1)
    return (
        SO2Shape(lmax, n_maps - 1, 2 * x.shape[2], hidden, lmax * hidden),
        SO2Shape(lmax, n_maps - 1, hidden, c_out, 0),
    )


@cache
def _widths(first: SO2Shape, second: SO2Shape) -> tuple[int, int, int, int]:
    """Return the numbers of an edge that each map is given and gives."""
    return first.width_in, first.width, second.width_in, second.width


class EdgeLayer:
    """The inputs of the layer, and what is made of them block by block.

    Args:
        by: The kernels.
        tensors: x (n_atoms, n_sph, C); wigner (n_edges, n_rows, n_sph); source and target
            (n_edges,); where given, radial (n_edges, n_scales), or (n_edges, k) with radial_weight
            (n_scales, k) and radial_bias (n_scales,); envelope (n_edges,); first_bias and
            second_bias, of the outputs of m = 0. All are contiguous.
        weights: One for each order of M_1, whose extra outputs are the gates, and then of M_2.
        segments: Of the source and the target, or empty.
    """

    def __init__(
        self, by: ModuleType, tensors: Named, weights: list[Tensor], segments: list[Tensor]
    ) -> None:
        self.by = by
        self.tensors = tensors
        self.segments = segments
        self.shapes = layer_shapes(tensors["x"], weights)
        self.widths = _widths(*self.shapes)
        n_maps = len(weights) // 2
        self.weights = {"first": weights[:n_maps], "second": weights[n_maps:]}
        self.n_edges = tensors["wigner"].shape[0]

    @cached_property
    def maps(self) -> dict[str, Any]:
        """M_1 and M_2, prepared for every block."""
        return {
            name: self.by.SO2Map(self.weights[name], shape)
            for name, shape in zip(self.weights, self.shapes, strict=True)
        }

    def blocks(self) -> Iterator["EdgeBlock"]:
        """Cut the edges into blocks of about equal size: a small last one would be slow."""
        n_blocks = math.ceil(self.n_edges / self.by.edges_at_once(self.shapes[0]))
        step = math.ceil(self.n_edges / max(1, n_blocks))
        for start in range(0, self.n_edges, max(1, step)):
            yield EdgeBlock(self, slice(start, min(start + step, self.n_edges)))


class Ends(NamedTuple):
    """The rotation of some atoms of edges into their frames, and back; rows are flat."""

    by: ModuleType
    wigner: Tensor
    indices: list[Tensor]
    segments: list[Tensor]

    def into(
        self,
        x: Tensor,
        wigner: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        operand: bool = False,
    ) -> Tensor:
        """Return scale * W G x, (n, n_rows * S * C); an operand is read by a map alone."""
        wigner = self.wigner if wigner is None else wigner
        rows = self.by.gather_rotate(x, wigner, self.indices, scale=scale, operand=operand)
        return rows.flatten(1)

    def back(
        self,
        rows: Tensor,
        total: Tensor,
        wigner: Tensor | None = None,
        *,
        factor: Tensor | None = None,
    ) -> None:
        """Add G^T W^T (factor * rows) to the features of the atoms."""
        wigner = self.wigner if wigner is None else wigner
        given = (rows.unflatten(1, (wigner.shape[1], -1)), wigner, self.indices, self.segments)
        self.by.rotate_scatter(*given, len(total), factor=factor, total=total)

    def torque(self, x: Tensor, rows: Tensor, wigner: Tensor | None = None) -> Tensor:
        """Return <W^T rows, X_k G x>, (n, 3)."""
        wigner = self.wigner if wigner is None else wigner
        rows = rows.unflatten(1, (wigner.shape[1], -1))
        return self.by.torque(x, rows, wigner, self.indices)

    def turned_torque(self, x: Tensor, rows: Tensor, turned: Tensor, turn: Tensor) -> Tensor:
        """Return <W^T rows, X_k T G x>, by X_k T = T X_k + (t x X)_k."""
        return self.torque(x, rows, turned) + torch.linalg.cross(turn, self.torque(x, rows))


class EdgeBlock:
    """Some edges of a layer and the steps of the computation on them."""

    def __init__(self, layer: EdgeLayer, part: slice) -> None:
        self.layer, self.part, self.n = layer, part, part.stop - part.start
        self.x, by = layer.tensors["x"], layer.by
        self.first, self.second = layer.maps["first"], layer.maps["second"]
        indices = [layer.tensors["source"][part], layer.tensors["target"][part]]
        segments = layer.segments
        if segments and self.n != layer.n_edges:
            segments = [own for index in indices for own in segments_of(index, len(self.x))]
        self.biases = [layer.tensors.get(f"{name}_bias") for name in layer.maps]
        self.both = Ends(by, layer.tensors["wigner"][part], indices, segments)
        self.target = self.both._replace(indices=indices[1:], segments=segments[2:])
        self.envelope = self.edges("envelope")
        self.scale = self.edges("radial")  # s, (n, n_scales)
        if self.scale is not None and "radial_weight" in layer.tensors:
            weight, bias = layer.tensors["radial_weight"], layer.tensors.get("radial_bias")
            self.scale = torch.nn.functional.linear(self.scale, weight, bias)

    def edges(self, name: str) -> Tensor | None:
        """Return the block's part of an input of the edges."""
        value = self.layer.tensors.get(name)
        return None if value is None else value[self.part]

    def add_weight_gradients(self, rows: Tensor, grad: Tensor, found: Named, name: str) -> None:
        """Add the gradients of <grad, M rows> to those of the ``first`` or ``second`` map."""
        shape = self.layer.maps[name].shape
        into = [found[f"{name}.{m}"] for m in range(shape.mmax + 1)]
        self.layer.by.add_weight_gradients(rows, grad, into, shape)

    def outputs(self, a: Tensor, out: Tensor | None = None) -> Tensor:
        """Return u from a."""
        return self.second.forward(a, out, self.biases[1])

    def add_radial_gradients(
        self, through: Tensor, moved: tuple[Tensor, Named] | None, found: Named
    ) -> None:
        """Add the gradients of s = h A^T + b, from that of s and, along a direction, that of s'."""
        part, weight = self.part, self.layer.tensors.get("radial_weight")
        if weight is None:
            found["radial"][part] = through
            return
        own = self.edges("radial")
        grad, along = moved if moved is not None else (None, {})
        if "radial" in found:
            torch.mm(through, weight, out=found["radial"][part])
            if grad is not None and "radial_weight" in along:
                found["radial"][part] += grad @ along["radial_weight"]
        if "radial_weight" in found and own is not None:
            found["radial_weight"].addmm_(through.T, own)
            if grad is not None and "radial" in along:
                found["radial_weight"].addmm_(grad.T, along["radial"][part])
        if "radial_bias" in found:
            found["radial_bias"] += through.sum(0)


def value(layer: EdgeLayer, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums on the atoms, (n_atoms, n_sph, C), and y and u if they are to be kept."""
    whole = layer.by.layer_value(layer, keep=keep)
    if whole is not None:
        return whole
    x, by, (first, second) = layer.tensors["x"], layer.by, layer.shapes
    total = x.new_zeros(x.shape[0], x.shape[1], second.c_out)
    n_kept = layer.n_edges if keep else 0
    y, u = by.empty((n_kept, first.width), x), by.empty((n_kept, second.width), x)
    for block in layer.blocks():
        rows = block.both.into(x, scale=block.scale, operand=True)
        own_y, own_u = (
            kept[block.part] if keep else by.empty((block.n, kept.shape[1]), x) for kept in (y, u)
        )
        gated = block.first.gated(rows, own_y, block.biases[0], keep=keep)
        block.outputs(gated, own_u)
        block.target.back(own_u, total, factor=block.envelope)
    return total, y, u


def gradient(
    layer: EdgeLayer,
    grad: Tensor,
    kept: list[Tensor],
    also: list[Tensor],
    wanted: set[str],
    *,
    keep: bool,
) -> tuple[Named, Tensor, Tensor]:
    """Return dE/de of the wanted inputs, and dE/da and dE/dz if they are to be kept.

    ``grad`` is dE/d(out), ``also`` what E feels of y and u beside that, or nothing. ``kept`` has y
    and u, or nothing. Of the results, ``vectors`` means dE/dt, (n_edges, 3). To keep something,
    one of ``INWARD`` must be wanted.
    """
    n_kept, (width, _, hidden, _) = layer.n_edges if keep else 0, layer.widths
    sizes = [(n_kept, width), (n_kept, hidden)]
    gz, ga = [layer.by.empty(size, grad) if keep else grad.new_empty(size) for size in sizes]
    found = empty_gradients(layer, wanted)
    inside = {"ga": ga, "gz": gz} if keep else {}
    inside |= zip(("y", "u"), kept, strict=False)  # or nothing
    inside |= zip(("also_y", "also_u"), also, strict=False)
    if layer.by.layer_gradient(layer, grad, inside, found):
        return found, ga, gz
    for block in layer.blocks():
        own = {name: values[block.part] for name, values in inside.items()}
        _block_gradient(block, grad, own, found)
    return found, ga, gz


def _block_gradient(block: EdgeBlock, grad: Tensor, inside: Named, found: Named) -> None:
    y, u, envelope = inside.get("y"), inside.get("u"), block.envelope
    if y is None:
        rows = block.both.into(block.x, scale=block.scale)
        y = block.first.forward(rows, None, block.biases[0])
    gate = block.layer.by.Gate(y, block.first.shape)
    q = block.target.into(grad)
    leaving = {"envelope", "vectors"} & found.keys()
    a = gate.value() if "second" in found or (leaving and u is None) else None
    if leaving:
        _leave_gradient(block, grad, q, block.outputs(a) if u is None else u, found)
    p = q if envelope is None else q.mul_(envelope[:, None])
    if "also_u" in inside:
        p += inside["also_u"]
    _add_bias_gradient(p, found, "second_bias")
    if a is not None and "second" in found:
        block.add_weight_gradients(a, p, found, "second")
    if not INWARD & found.keys():
        return
    gy = gate.gradient(block.second.transposed(p, inside.get("ga")))
    if "also_y" in inside:
        gy += inside["also_y"]
    _add_bias_gradient(gy, found, "first_bias")
    if "first" in found:
        rows = block.both.into(block.x, scale=block.scale)
        block.add_weight_gradients(rows, gy, found, "first")
    gz = block.first.transposed(gy)
    if "gz" in inside:
        inside["gz"].copy_(gz)
    _block_inputs(block, gz, found)


def _add_bias_gradient(grad: Tensor, found: Named, name: str) -> None:
    if name in found:
        found[name] += grad[:, : len(found[name])].sum(0)


def _leave_gradient(block: EdgeBlock, grad: Tensor, q: Tensor, u: Tensor, found: Named) -> None:
    """Add the gradients of the envelope and of the rotation back."""
    if "envelope" in found:
        torch.linalg.vecdot(q, u, out=found["envelope"][block.part])
    if "vectors" in found:
        turn = block.target.torque(grad, u)
        envelope = block.envelope
        found["vectors"][block.part] -= turn if envelope is None else turn * envelope[:, None]


def _block_inputs(block: EdgeBlock, gz: Tensor, found: Named) -> None:
    """Add the gradients that stem from the way in; dE/dz changes."""
    layer, part, scale = block.layer, block.part, block.scale
    to_scale, to_turn = None, None
    mapped = "radial_weight" in layer.tensors
    if scale is not None and RADIAL & found.keys():
        to_scale = layer.by.empty(scale.shape, gz) if mapped else found["radial"][part]
    if "vectors" in found:
        to_turn = gz.new_empty(block.n, 3)
    _, *given = block.both
    layer.by.gather_gradient(
        *(block.x, *given, gz, scale, block.first.shape, WayIn(to_scale, found.get("x"), to_turn))
    )
    if to_turn is not None:
        found["vectors"][part] -= to_turn
    if to_scale is not None and mapped:
        block.add_radial_gradients(to_scale, None, found)


def empty_gradients(layer: EdgeLayer, wanted: set[str]) -> Named:
    """Return zeros for what is wanted; ``first`` stands for all weights of the first map.

    Edges have ``radial`` to themselves, and its memory is as it is.
    """
    tensors, by, found = layer.tensors, layer.by, {}
    for name in wanted & tensors.keys():
        found[name] = by.empty(tensors[name].shape, tensors[name])
        if name != "radial":
            found[name].zero_()
    if "vectors" in wanted:
        found["vectors"] = tensors["x"].new_zeros(layer.n_edges, 3)
    for name in wanted & layer.weights.keys():
        weights = layer.weights[name]
        found[name] = weights[0].new_empty(0)
        found |= {f"{name}.{m}": by.empty(w.shape, w).zero_() for m, w in enumerate(weights)}
    return found
