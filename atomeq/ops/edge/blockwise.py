"""The eSCN edge layer a block of edges at a time: value, gradient, and the gradient of that.

What lies between the steps is in memory, so any map, rotation and gate that kernels have do.
Kernels that have the layer whole call this where that does not serve. Equations are those of
:mod:`atomeq.ops.edge.escn_conv`.
"""

import math
from collections.abc import Iterator
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atomeq.ops.edge.along import Ends, Found, Moved, Radial
from atomeq.ops.edge.escn_conv import INWARD, RADIAL, EdgeLayer, Named, flat, grouped
from atomeq.ops.edge.frame import segments_of
from atomeq.ops.edge.rotation import turning

_OF_EDGES = {"vectors", "radial", "envelope", "y", "u"}
_ONES = 8  # columns


class WayIn(NamedTuple):
    """Where the gradients of the way in, <grad, s W G x>, go; None where one is not wanted.

    Attributes:
        scale: Is written, (n_edges, n_scales).
        x: Is added to, (n_atoms, n_sph, C).
        turn: Of each edge; is lessened by the torque, (n_edges, 3).
    """

    scale: Tensor | None = None
    x: Tensor | None = None
    turn: Tensor | None = None


def value(call: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`~atomeq.ops.edge.escn_conv.escn_conv` does."""
    layer = EdgeLayer(call)
    x, by, (first, second) = layer.tensors["x"], layer.by, layer.shapes
    total = None
    y, u = layer.kept(call.n_kept, first.width, second.width, messages=True)
    for block in blocks(layer):
        rows = block.both.operand(x, *block.factors)
        own_y = y[block.part] if call.n_kept else None
        size = block.n, second.width
        own_u = u[block.part] if call.n_kept == 2 else by.empty(size, x, passing=True)
        gated = block.first.gated(rows, block.biases[0], own_y)
        block.second.forward(gated, own_u, block.biases[1])
        total = block.target.back(own_u, len(x), total, factor=block.envelope)
    return x.new_zeros(*x.shape[:2], second.c_out) if total is None else total, y, u


def gradient(call: SimpleNamespace) -> list[Tensor]:
    """Return what :func:`~atomeq.ops.edge.escn_conv.escn_conv_gradient` does."""
    layer = EdgeLayer(call)
    first, second = layer.shapes
    found = layer.gradients(call.wanted)
    ga, gz = layer.kept(call.n_kept, second.width_in, first.width_in)
    inside = {"ga": ga, "gz": gz} if call.n_kept else {}
    inside |= zip(("y", "u"), call.kept, strict=False)  # or nothing
    inside |= zip(("also_y", "also_u"), call.also, strict=False)
    for block in blocks(layer):
        own = {name: values[block.part] for name, values in inside.items()}
        _block_gradient(block, call.grad, own, found)
    return [*flat(call.wanted, found), ga, gz]


def second_gradient(call: SimpleNamespace) -> list[Tensor]:
    """Return what :func:`~atomeq.ops.edge.escn_conv.escn_conv_second_gradient` does."""
    layer = EdgeLayer(call)
    along = grouped(call.along, call.directions)
    found, inside = second_gradients(call, layer)
    others = {
        name: layer.by.SO2Map(along[name], shape)
        for name, shape in zip(layer.weights, layer.shapes, strict=True)
        if name in along
    }
    for block in blocks(layer):
        _Second(block, call.grad, inside, along, others, found).run()
    return flat(call.wanted, found)


def second_gradients(call: SimpleNamespace, layer: EdgeLayer) -> tuple[Named, Named]:
    """Return memory for what a second gradient is wanted of, and what of an edge was kept."""
    found, kept = layer.gradients(call.wanted), [rows for rows in call.kept if len(rows)]
    inside: Named = dict(zip(("y", "u", "ga", "gz"), kept, strict=False))
    if "grad" in call.wanted.split():
        found["grad"] = torch.zeros_like(call.grad)
    for name, rows in zip(("y", "u"), call.kept[:2], strict=True):
        inside.setdefault(name, rows)  # of no edges
        if name in call.wanted.split():
            found[name] = layer.by.empty(rows.shape, rows)
    return found, inside


def blocks(layer: EdgeLayer) -> Iterator["EdgeBlock"]:
    """Cut the edges into blocks of about equal size: a small last one would be slow."""
    maps = {
        name: layer.by.SO2Map(layer.weights[name], shape)
        for name, shape in zip(layer.weights, layer.shapes, strict=True)
    }
    n_blocks = math.ceil(layer.n_edges / layer.by.edges_at_once(layer.shapes[0]))
    step = math.ceil(layer.n_edges / max(1, n_blocks))
    for start in range(0, layer.n_edges, max(1, step)):
        yield EdgeBlock(layer, maps, slice(start, min(start + step, layer.n_edges)))


class EdgeBlock:
    """Some edges of a layer and the steps of the computation on them."""

    def __init__(self, layer: EdgeLayer, maps: dict[str, Any], part: slice) -> None:
        self.layer, self.maps, self.part, self.n = layer, maps, part, part.stop - part.start
        self.x, by = layer.tensors["x"], layer.by
        self.first, self.second = maps["first"], maps["second"]
        indices = [layer.tensors["source"][part], layer.tensors["target"][part]]
        segments = layer.segments
        if segments and self.n != layer.n_edges:
            segments = [own for index in indices for own in segments_of(index, len(self.x))]
        self.biases = [layer.tensors.get(f"{name}_bias") for name in maps]
        self.both = Ends(by, layer.tensors["wigner"][part], indices, segments)
        self.target = self.both._replace(indices=indices[1:], segments=segments[2:])
        self.envelope = self.edges("envelope")
        # s (n, n_scales), or what gives it
        self.factors: tuple[Tensor | None, Radial | None] = self.edges("radial"), None
        if self.factors[0] is not None and "radial_weight" in layer.tensors:
            weight, bias = layer.tensors["radial_weight"], layer.tensors.get("radial_bias")
            self.factors = None, (self.factors[0], weight, bias)

    @cached_property
    def scale(self) -> Tensor | None:
        """Factors s of the rows, (n, n_scales)."""
        scale, radial = self.factors
        return scale if radial is None else torch.nn.functional.linear(*radial)

    def edges(self, name: str) -> Tensor | None:
        """Return the block's part of an input of the edges."""
        value = self.layer.tensors.get(name)
        return None if value is None else value[self.part]

    def add_weight_gradients(self, rows: Tensor, grad: Tensor, found: Named, name: str) -> None:
        """Add the gradients of <grad, M rows> to those of the ``first`` or ``second`` map."""
        self.layer.by.add_weight_gradients(rows, grad, found[name], self.maps[name].shape)

    def add_radial_gradients(
        self, through: Tensor, moved: tuple[Tensor | None, Named] | None, found: Named
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
        if own is not None and found.keys() & {"radial_weight", "radial_bias"}:
            # ones beside them: the bias comes of the same product, in whole lines of memory
            product = through.T @ torch.nn.functional.pad(own, (0, _ONES), value=1.0)
            if "radial_weight" in found:
                found["radial_weight"] += product[:, :-_ONES]
            if "radial_bias" in found:
                found["radial_bias"] += product[:, -1]
        if "radial_weight" in found and grad is not None and "radial" in along:
            found["radial_weight"].addmm_(grad.T, along["radial"][part])


def _block_gradient(block: EdgeBlock, grad: Tensor, inside: Named, found: Named) -> None:
    y, u, part = inside.get("y"), inside.get("u"), block.part
    if y is None:
        rows = block.both.operand(block.x, *block.factors)
        y = block.first.forward(rows, None, block.biases[0])
    gate = block.layer.by.Gate(y, block.first.shape)
    leaving = [found[name][part] if name in found else None for name in ("envelope", "vectors")]
    left = any([part is not None for part in leaving])
    if left and u is None:
        u = block.second.forward(gate.value(), None, block.biases[1])
    read = {"second", "second_bias"} & found.keys()  # not by the next product alone
    p = block.target.leave(
        grad, u, block.envelope, *leaving, also=inside.get("also_u"), operand=not read
    )
    _add_bias_gradient(p, found, "second_bias")
    inward = bool(INWARD & found.keys())
    value = None  # of the gate, for the gradient of the second map
    if "second" in found:
        size = block.n, block.second.shape.width_in
        value = block.layer.by.empty(size, y) if inward else gate.value()
    if inward:
        given = p, inside.get("ga"), inside.get("also_y"), value
        read = {"first", "first_bias"} & found.keys()
        gy = block.second.transposed_through(gate, *given, operand=not read)
        _add_bias_gradient(gy, found, "first_bias")
        _block_inputs(block, gy, block.first.transposed(gy, inside.get("gz")), found)
    if value is not None:
        block.add_weight_gradients(value, p, found, "second")


def _add_bias_gradient(grad: Tensor, found: Named, name: str) -> None:
    if name in found:
        found[name] += grad[:, : len(found[name])].sum(0)


def _block_inputs(block: EdgeBlock, gy: Tensor, gz: Tensor, found: Named) -> None:
    """Add the gradients that stem from the way in."""
    layer, part, scale = block.layer, block.part, block.scale
    to_scale, mapped = None, "radial_weight" in layer.tensors
    if scale is not None and RADIAL & found.keys():
        to_scale = layer.by.empty(scale.shape, gz) if mapped else found["radial"][part]
    into = WayIn(to_scale, found.get("x"), found["vectors"][part] if "vectors" in found else None)
    z = layer.by.empty(gz.shape, gz) if "first" in found else None
    if any([where is not None for where in (*into, z)]):
        _, *given = block.both
        layer.by.gather_gradient(block.x, *given, gz, scale, block.first.shape, into, z)
    if z is not None:
        block.add_weight_gradients(z, gy, found, "first")
    if to_scale is not None and mapped:
        block.add_radial_gradients(to_scale, None, found)


class _Second:
    """One block of the gradient of the gradient, the gradient of dE/de along a direction.

    That is (x', t, s', f', ...), one for each input e: a step forward along the direction. A prime
    is a derivative along it, which a name has as ``moved``. t turns the edge: W' = -W T(t), see
    :mod:`atomeq.ops.edge.along`.
    """

    def __init__(
        self,
        block: EdgeBlock,
        grad: Tensor,
        inside: Named,
        along: Named,
        others: dict[str, Any],
        found: Named,
    ) -> None:
        self.block, self.grad, self.along, self.found = block, grad, along, found
        self.layer, self.others = block.layer, others
        own = {name: rows[block.part] for name, rows in inside.items() if len(rows)}
        self.y, self.u, self.ga, self.gz = (own.get(name) for name in ("y", "u", "ga", "gz"))
        self.part = {name: found[name][block.part] for name in _OF_EDGES & found.keys()}
        moved = {name: along[name][block.part] for name in _OF_EDGES & along.keys()}
        turn, wigner = moved.get("vectors"), None
        if turn is not None:
            wigner = torch.bmm(block.both.wigner, turning(-turn, block.x.shape[1]))
        self.moved_in = Moved(along.get("x"), wigner, turn, self._moved_scale(moved.get("radial")))
        self.moved_out = Moved(None, wigner, turn, None, moved.get("envelope"))

    def run(self) -> None:
        """Go forward along the direction."""
        block, by, shape = self.block, self.layer.by, self.block.first.shape
        moved_z = by.rotate_along(block.x, block.both, block.scale, self.moved_in, shape)
        moved_y = block.first.forward(moved_z)
        if "first" in self.others:
            z = block.both.into(block.x, scale=block.scale)
            moved_y += self.others["first"].forward(z)
        if "first_bias" in self.along:
            moved_y[:, : len(self.along["first_bias"])] += self.along["first_bias"]
        gate = by.Gate(self.y, shape)
        p = block.target.leave(self.grad, None, block.envelope)
        ga = block.second.transposed(p) if self.ga is None else self.ga
        moved_a, to_y, gy = gate.second(moved_y, ga, self.part.get("y"))
        self._outputs(gate, moved_a, p)
        if "second" in self.others:
            to_y += gate.gradient(self.others["second"].transposed(p))
        if {"first", "x", "vectors", *RADIAL} & self.found.keys():
            self._inputs(gy, moved_z)

    def _moved_scale(self, radial: Tensor | None) -> Tensor | None:
        """Return the derivative of s = h A^T + b, or of s itself, along the direction."""
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

    def _outputs(self, gate: Any, moved_a: Tensor, p: Tensor) -> None:
        """Add the gradients that stem from the second map and the way back."""
        block, by, found, part = self.block, self.layer.by, self.found, self.part
        if "second" in found:
            block.add_weight_gradients(moved_a, p, found, "second")
        moved = self.moved_out
        if {"grad", "envelope", "vectors"} & found.keys():
            moved_u = block.second.forward(moved_a)
            if "second" in self.others:
                moved_u += self.others["second"].forward(gate.value())
            if "second_bias" in self.along:
                moved_u[:, : len(self.along["second_bias"])] += self.along["second_bias"]
            moved = moved._replace(rows=moved_u)
        leaving = self.u, None, block.envelope, moved, block.second.shape
        into = Found(None, None, part.get("u"), part.get("envelope"), part.get("vectors"))
        by.gradient_along(self.grad, block.target, *leaving, into)
        if "grad" in found:
            by.scatter_along(block.target, *leaving, found["grad"])

    def _inputs(self, gy: Tensor, moved_z: Tensor) -> None:
        """Add the gradients that stem from the way in, of <dE/dz, s' r + s r'> that is."""
        block, by, found = self.block, self.layer.by, self.found
        if "first" in found:
            block.add_weight_gradients(moved_z, gy, found, "first")
        if not found.keys() & {"x", "vectors", *RADIAL}:
            return
        gz = block.first.transposed(gy) if self.gz is None else self.gz
        moved = self.moved_in
        if "first" in self.others:
            moved = moved._replace(rows=self.others["first"].transposed(gy))
        entering = gz, block.scale, None, moved, block.first.shape
        through, moved_through, mapped = None, None, "radial_weight" in self.layer.tensors
        if block.scale is not None and found.keys() & RADIAL:
            moved_through = by.empty(block.scale.shape, gz) if mapped else self.part["radial"]
            if mapped and self.along.keys() & {"radial", "radial_weight"}:
                through = by.empty(block.scale.shape, gz)
        into = Found(through, moved_through, None, None, self.part.get("vectors"))
        by.gradient_along(block.x, block.both, *entering, into)
        if "x" in found:
            by.scatter_along(block.both, *entering, found["x"])
        if moved_through is not None and mapped:
            block.add_radial_gradients(moved_through, (through, self.along), found)
