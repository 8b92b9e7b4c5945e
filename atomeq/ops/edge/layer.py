"""The eSCN edge layer in raw functions: value, gradient and gradient of the gradient.

For each edge, with G the gather of both atoms, W the rotation into its frame, S the sum on the
target atoms,

    r = W G x,  z = s r,  y = M_1 z,  a = gate(y),  u = M_2 a,  out = S f W^T u.

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
from atomeq.ops.edge.rotation import turning
from atomeq.ops.edge.so2_shape import SO2Shape

Named = dict[str, Tensor]
RADIAL = {"radial", "radial_weight", "radial_bias"}
INWARD = {"first", "x", "vectors", *RADIAL}  # what a gradient must pass the first map for


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
            (n_scales, k) and radial_bias (n_scales,); envelope (n_edges,). All are contiguous.
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
        block.second.forward(block.first.gated(rows, own_y, keep=keep), own_u)
        block.target.back(own_u, total, factor=block.envelope)
    return total, y, u


def gradient(
    layer: EdgeLayer, grad: Tensor, kept: list[Tensor], wanted: set[str], *, keep: bool
) -> tuple[Named, Tensor, Tensor]:
    """Return dE/de of the wanted inputs, and dE/da and dE/dz if they are to be kept.

    ``grad`` is dE/d(out). Of the results, ``vectors`` means dE/dt, (n_edges, 3). ``kept`` has y and
    u, both empty if they were not kept. To keep something, one of ``INWARD`` must be wanted.
    """
    n_kept, (width, _, hidden, _) = layer.n_edges if keep else 0, layer.widths
    sizes = [(n_kept, width), (n_kept, hidden)]
    gz, ga = [layer.by.empty(size, grad) if keep else grad.new_empty(size) for size in sizes]
    found = empty_gradients(layer, wanted)
    if not keep and layer.by.layer_gradient(layer, grad, kept, found):
        return found, ga, gz
    for block in layer.blocks():
        into = (ga[block.part], gz[block.part]) if keep else None
        _block_gradient(block, grad, kept, found, into)
    return found, ga, gz


def _block_gradient(
    block: EdgeBlock,
    grad: Tensor,
    kept: list[Tensor],
    found: Named,
    into: tuple[Tensor, Tensor] | None,
) -> None:
    part, envelope, layer = block.part, block.envelope, block.layer
    y, u = (values[part] if len(values) else None for values in kept)
    if y is None:
        y = block.first.forward(block.both.into(block.x, scale=block.scale))
    gate = layer.by.Gate(y, block.first.shape)
    q = block.target.into(grad)
    ga = block.second.transposed(q, None if into is None else into[0])
    a = gate.value() if {"envelope", "second", "vectors"} & found.keys() else None
    if envelope is not None:
        if a is not None and "envelope" in found:
            torch.linalg.vecdot(ga, a, out=found["envelope"][part])
        ga.mul_(envelope[:, None])
    if a is not None and "vectors" in found:
        turn = block.target.torque(grad, block.second.forward(a) if u is None else u)
        found["vectors"][part] -= turn if envelope is None else turn * envelope[:, None]
    if a is not None and "second" in found:
        q = q if envelope is None else q.mul_(envelope[:, None])
        block.add_weight_gradients(a, q, found, "second")
    if INWARD & found.keys():
        gy = gate.gradient(ga)
        if "first" in found:
            rows = block.both.into(block.x, scale=block.scale)
            block.add_weight_gradients(rows, gy, found, "first")
        gz = block.first.transposed(gy)
        if into is not None:
            into[1].copy_(gz)
        _block_inputs(block, gz, found)


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


def second_gradient(
    layer: EdgeLayer, grad: Tensor, kept: list[Tensor], along: Named, wanted: set[str]
) -> Named:
    """Return the gradients of sum over e of <along[e], dE/de>, for ``grad`` and every input.

    ``kept`` has y, u, dE/da and dE/dz, empty where they were not kept.
    ``along`` has tensors like the inputs, and ``vectors`` for t; of ``first.0``, ``second.1`` and
    so on, all of a map are given or none.
    """
    found = empty_gradients(layer, wanted)
    if "grad" in wanted:
        found["grad"] = torch.zeros_like(grad)
    others = {
        name: layer.by.SO2Map([along[f"{name}.{m}"] for m in range(len(own.weights))], own.shape)
        for name, own in layer.maps.items()
        if f"{name}.0" in along
    }
    for block in layer.blocks():
        _Second(block, grad, kept, along, others, found).run()
    return found


class _Second:
    """One block of the gradient of the gradient, the gradient of dE/de along a direction.

    That is (x', t, s', f', ...), one for each input e: a step forward along the direction and back
    again. A prime is a derivative along it, which a name has as ``moved``. t turns the edge:
    W' = -W T(t), see :mod:`atomeq.ops.edge.rotation`.
    """

    def __init__(
        self,
        block: EdgeBlock,
        grad: Tensor,
        kept: list[Tensor],
        along: Named,
        others: dict[str, Any],
        found: Named,
    ) -> None:
        self.block, self.grad, self.along, self.found = block, grad, along, found
        self.layer, self.part, self.others = block.layer, block.part, others
        self.x, self.scale, self.envelope = block.x, block.scale, block.envelope
        self.y, self.u, self.ga, self.gz = (
            values[block.part] if len(values) else None for values in kept
        )
        self.turn = along["vectors"][self.part] if "vectors" in along else None
        self.turned = None
        if self.turn is not None:
            self.turned = torch.bmm(block.both.wigner, turning(self.turn, self.x.shape[1]))

    def run(self) -> None:
        """Go forward along the direction, then back."""
        block, by, shape = self.block, self.layer.by, self.block.first.shape
        r, moved_r = self._rows()
        moved_scale = self._moved_scale()
        z, moved_z = r, moved_r
        if self.scale is not None:
            z, moved_z = by.scaled(r, moved_r, self.scale, moved_scale, shape)
        y = block.first.forward(z) if self.y is None else self.y
        moved_y = block.first.forward(moved_z)
        if "first" in self.others:
            moved_y += self.others["first"].forward(z)
        gate = by.Gate(y, shape)
        p, moved_p = self._weighted_targets()
        ga = block.second.transposed(p) if self.ga is None else self.ga
        moved_a, curved = gate.second(moved_y, ga)
        self._outputs(gate.value(), moved_a, p, moved_p)
        moved_ga = None if moved_p is None else block.second.transposed(moved_p)
        if "second" in self.others:
            through = self.others["second"].transposed(p)
            moved_ga = through if moved_ga is None else moved_ga.add_(through)
        gy = gate.gradient(ga)
        if moved_ga is not None:
            curved += gate.gradient(moved_ga)
        if "first" in self.found:
            block.add_weight_gradients(moved_z, gy, self.found, "first")
            block.add_weight_gradients(z, curved, self.found, "first")
        if self.found.keys() & {"x", "vectors", *RADIAL}:
            # _inputs changes it
            gz = block.first.transposed(gy) if self.gz is None else self.gz.clone()
            moved_gz = block.first.transposed(curved)
            if "first" in self.others:
                moved_gz += self.others["first"].transposed(gy)
            self._inputs(r, moved_r, gz, moved_gz, moved_scale)

    def _rows(self) -> tuple[Tensor, Tensor]:
        both = self.block.both
        r = both.into(self.x)
        moved = both.into(self.along["x"]) if "x" in self.along else torch.zeros_like(r)
        if self.turned is not None:
            moved -= both.into(self.x, self.turned)
        return r, moved

    def _moved_scale(self) -> Tensor | None:
        """Return the derivative of s = h A^T + b, or of s itself, along the direction."""
        radial = self.along["radial"][self.part] if "radial" in self.along else None
        weight = self.layer.tensors.get("radial_weight")
        if weight is None:
            return radial
        moved = None if radial is None else radial @ weight.T
        own = self.block.edges("radial")
        if "radial_weight" in self.along and own is not None:
            through = own @ self.along["radial_weight"].T
            moved = through if moved is None else moved + through
        if "radial_bias" in self.along:
            bias = self.along["radial_bias"].expand(self.block.n, -1)
            moved = bias if moved is None else moved + bias
        return moved

    def _weighted_targets(self) -> tuple[Tensor, Tensor | None]:
        """Return p = f q and its derivative, q = W G grad."""
        self.q = self.block.target.into(self.grad)
        self.moved_q = None
        p, moved = self.q, None
        if self.turned is not None:
            self.moved_q = moved = self.block.target.into(self.grad, self.turned).neg_()
        if self.envelope is not None:
            p = p * self.envelope[:, None]
            moved = None if moved is None else moved * self.envelope[:, None]
        if "envelope" in self.along:
            through = self.q * self.along["envelope"][self.part, None]
            moved = through if moved is None else moved.add_(through)
        return p, moved

    def _outputs(self, a: Tensor, moved_a: Tensor, p: Tensor, moved_p: Tensor | None) -> None:
        """Add the gradients that stem from the second map and the way back."""
        block, found, part = self.block, self.found, self.part
        if "second" in found:
            block.add_weight_gradients(moved_a, p, found, "second")
            if moved_p is not None:
                block.add_weight_gradients(a, moved_p, found, "second")
        if not found.keys() & {"grad", "envelope", "vectors"}:
            return
        u = block.second.forward(a) if self.u is None else self.u.clone()  # _leave changes it
        moved_u = block.second.forward(moved_a)
        if "second" in self.others:
            moved_u += self.others["second"].forward(a)
        if "envelope" in found:
            found["envelope"][part] += torch.linalg.vecdot(self.q, moved_u)
            if self.moved_q is not None:
                found["envelope"][part] += torch.linalg.vecdot(self.moved_q, u)
        self._leave(u, moved_u)

    def _leave(self, u: Tensor, moved_u: Tensor) -> None:
        """Add the gradients of the rotation back, <f u, ...> and its derivative; both change."""
        target, found, part = self.block.target, self.found, self.part
        if self.envelope is not None:
            moved_u *= self.envelope[:, None]
        if "envelope" in self.along:
            moved_u += u * self.along["envelope"][part, None]
        if self.envelope is not None:
            u *= self.envelope[:, None]
        if "grad" in found:
            target.back(moved_u, found["grad"])
            if self.turned is not None:
                target.back(u.neg(), found["grad"], self.turned)
        if "vectors" in found:
            turn = target.torque(self.grad, moved_u)
            if self.turn is not None and self.turned is not None:
                turn -= target.turned_torque(self.grad, u, self.turned, self.turn)
            found["vectors"][part] -= turn

    def _inputs(
        self, r: Tensor, moved_r: Tensor, gz: Tensor, moved_gz: Tensor, moved_scale: Tensor | None
    ) -> None:
        """Add the gradients that stem from the way in; dE/dz and its derivative become dE/dr's."""
        block, found, both = self.block, self.found, self.block.both
        if self.scale is not None:
            scales = (self.scale, moved_scale, block.first.shape)
            through, moved = self.layer.by.scaled_second_(r, moved_r, gz, moved_gz, *scales)
            if found.keys() & RADIAL:
                block.add_radial_gradients(moved, (through, self.along), found)
        if "x" in found:
            both.back(moved_gz, found["x"])
            if self.turned is not None:
                both.back(gz.neg(), found["x"], self.turned)
        if "vectors" in found:
            turn = both.torque(self.x, moved_gz)
            if "x" in self.along:
                turn += both.torque(self.along["x"], gz)
            if self.turn is not None and self.turned is not None:
                turn -= both.turned_torque(self.x, gz, self.turned, self.turn)
            found["vectors"][self.part] -= turn
