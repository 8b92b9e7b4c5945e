"""The eSCN edge layer in raw functions: value, gradient and gradient of the gradient.

For each edge, with G the gather of both atoms, W the rotation into its frame, S the sum on the
target atoms,

    r = W G x,  z = s r,  y = M_1 z,  a = gate(y),  u = M_2 a,  out = S f W^T u.

Edges are worked on a block at a time, and between the passes nothing of an edge is kept but y, or
not even that. The gradient of the gradient is that of dE/de along a direction (x', t, s', f', ...):
a dot below. t turns the edge: W' = -W T(t), see :mod:`atomeq.ops.registered.edge_rotation`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from atomeq.ops.edge_frame import segments_of
from atomeq.ops.registered.edge_rotation import turning
from atomeq.ops.registered.kernel_sets import EdgeKernels
from atomeq.ops.registered.so2_shape import (
    SO2Shape,
    add_scaled_rows_,
    scale_gradient,
    scale_rows_,
)

Named = dict[str, Tensor]


@dataclass
class EdgeLayer:
    """The inputs of the layer, and what is made of them block by block.

    Attributes:
        kernels: The kernel set.
        first: Sizes of M_1, whose extra outputs are the gates.
        second: Sizes of M_2.
        tensors: x (n_atoms, n_sph, C); wigner (n_edges, n_rows, n_sph); source and target
            (n_edges,); where given, radial (n_edges, n_scales), or (n_edges, k) with radial_weight
            (n_scales, k) and radial_bias (n_scales,); envelope (n_edges,).
        weights: Those of M_1 and those of M_2, one for each order.
        segments: Of the source and the target, or empty.
    """

    kernels: EdgeKernels
    first: SO2Shape
    second: SO2Shape
    tensors: Named
    weights: tuple[list[Tensor], list[Tensor]]
    segments: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.maps = (
            self.kernels.so2_map(self.weights[0], self.first),
            self.kernels.so2_map(self.weights[1], self.second),
        )

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return self.tensors["wigner"].shape[0]

    def blocks(self) -> Iterator["EdgeBlock"]:
        """Cut the edges into blocks of about equal size: a small last one would be slow."""
        n_blocks = math.ceil(self.n_edges / self.kernels.edges_at_once(self.first))
        step = math.ceil(self.n_edges / max(1, n_blocks))
        for start in range(0, self.n_edges, max(1, step)):
            yield EdgeBlock(self, slice(start, min(start + step, self.n_edges)))


class EdgeBlock:
    """Some edges of a layer and the steps of the computation on them."""

    def __init__(self, layer: EdgeLayer, part: slice) -> None:
        self.layer = layer
        self.part = part
        self.wigner = layer.tensors["wigner"][part]
        self.indices = [layer.tensors["source"][part], layer.tensors["target"][part]]
        self.n = part.stop - part.start
        whole = self.n == layer.n_edges
        self.segments = layer.segments if whole else self._segments()

    def edges(self, name: str) -> Tensor | None:
        """Return the block's part of an input of the edges."""
        value = self.layer.tensors.get(name)
        return None if value is None else value[self.part]

    def scale(self) -> Tensor | None:
        """Return s, (n, n_scales)."""
        radial, weight = self.edges("radial"), self.layer.tensors.get("radial_weight")
        if radial is None or weight is None:
            return radial
        bias = self.layer.tensors.get("radial_bias")
        return torch.nn.functional.linear(radial, weight, bias)

    def into(
        self,
        x: Tensor,
        wigner: Tensor | None = None,
        *,
        scale: Tensor | None = None,
        operand: bool = False,
    ) -> Tensor:
        """Return scale * W G x of both atoms, (n, n_rows * 2C)."""
        return self._into(x, self.indices, wigner, scale, operand=operand)

    def into_target(self, x: Tensor, wigner: Tensor | None = None) -> Tensor:
        """Return W G x of the target atoms, (n, n_rows * C)."""
        return self._into(x, self.indices[1:], wigner, None)

    def back(self, rows: Tensor, total: Tensor, wigner: Tensor | None = None) -> None:
        """Add G^T W^T rows to the features of both atoms."""
        self._back(rows, total, self.indices, self.segments, wigner, None)

    def back_to_target(
        self,
        rows: Tensor,
        total: Tensor,
        wigner: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> None:
        """Add G^T W^T (factor * rows) to the features of the target atoms."""
        self._back(rows, total, self.indices[1:], self.segments[2:], wigner, factor)

    def torque(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return <W^T rows, X_k G x> of both atoms, (n, 3)."""
        return self._torque(x, rows, self.indices)

    def torque_on_target(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return <W^T rows, X_k G x> of the target atoms, (n, 3)."""
        return self._torque(x, rows, self.indices[1:])

    def turned_torque(self, x: Tensor, rows: Tensor, turn: Tensor, *, both: bool) -> Tensor:
        """Return <W^T rows, X_k T(turn) G x>, (n, 3)."""
        members = [x.index_select(0, i) for i in (self.indices if both else self.indices[1:])]
        lab = turning(turn, x.shape[1]) @ torch.cat(members, dim=-1)
        return self._torque(lab, rows, [])

    def first(self, z: Tensor) -> Tensor:
        """Return M_1 z."""
        return self._forward(0, z)

    def second(self, a: Tensor, *, like: Tensor | None = None) -> Tensor:
        """Return M_2 a, in the dtype of ``like`` if a is an operand."""
        return self._forward(1, a, like)

    def first_back(self, grad: Tensor) -> Tensor:
        """Return M_1^T grad."""
        return self._transposed(0, grad)

    def second_back(self, grad: Tensor) -> Tensor:
        """Return M_2^T grad."""
        return self._transposed(1, grad)

    def _forward(self, number: int, rows: Tensor, like: Tensor | None = None) -> Tensor:
        shape = (self.layer.first, self.layer.second)[number]
        out = (rows if like is None else like).new_empty(self.n, shape.width)
        return self.layer.maps[number].forward(rows, out)

    def _transposed(self, number: int, grad: Tensor) -> Tensor:
        shape = (self.layer.first, self.layer.second)[number]
        rows = grad.new_empty(self.n, shape.n_rows * shape.c_in)
        return self.layer.maps[number].transposed(grad, rows)

    def _into(
        self,
        x: Tensor,
        indices: list[Tensor],
        wigner: Tensor | None,
        scale: Tensor | None,
        *,
        operand: bool = False,
    ) -> Tensor:
        wigner = self.wigner if wigner is None else wigner
        lmax, mmax = self.layer.first[:2]
        rows = self.layer.kernels.gather_rotate(
            x, wigner, indices, lmax=lmax, mmax=mmax, scale=scale, operand=operand
        )
        return rows.flatten(1)

    def _back(
        self,
        rows: Tensor,
        total: Tensor,
        indices: list[Tensor],
        segments: list[Tensor],
        wigner: Tensor | None,
        factor: Tensor | None,
    ) -> None:
        lmax, mmax = self.layer.first[:2]
        self.layer.kernels.rotate_scatter(
            rows.unflatten(1, (self.layer.first.n_rows, -1)),
            self.wigner if wigner is None else wigner,
            indices,
            segments,
            len(total),
            lmax=lmax,
            mmax=mmax,
            factor=factor,
            total=total,
        )

    def _torque(self, x: Tensor, rows: Tensor, indices: list[Tensor]) -> Tensor:
        lmax, mmax = self.layer.first[:2]
        rows = rows.unflatten(1, (self.layer.first.n_rows, -1))
        return self.layer.kernels.torque(x, rows, self.wigner, indices, lmax=lmax, mmax=mmax)

    def _segments(self) -> list[Tensor]:
        if not self.layer.kernels.wants_segments:
            return []
        n_atoms = self.layer.tensors["x"].shape[0]
        return [part for index in self.indices for part in segments_of(index, n_atoms)]


def value(layer: EdgeLayer, *, keep: bool) -> tuple[Tensor, Tensor]:
    """Return the sums on the atoms, (n_atoms, n_sph, C), and y if it is to be kept."""
    x = layer.tensors["x"]
    n_sph, channels = x.shape[1], layer.second.c_out
    total = x.new_zeros(x.shape[0], n_sph, channels)
    kept = x.new_empty(layer.n_edges if keep else 0, layer.first.width)
    for block in layer.blocks():
        rows = block.into(x, scale=block.scale(), operand=True)
        y = kept[block.part] if keep else rows.new_empty(block.n, layer.first.width, dtype=x.dtype)
        u = block.second(layer.maps[0].gated(rows, y, keep=keep), like=x)
        block.back_to_target(u, total, factor=block.edges("envelope"))
    return total, kept


def gradient(layer: EdgeLayer, grad: Tensor, y: Tensor, wanted: set[str]) -> Named:
    """Return dE/de of the wanted inputs from dE/d(out); ``vectors`` means dE/dt, (n_edges, 3)."""
    found = _empty_gradients(layer, wanted)
    for block in layer.blocks():
        _block_gradient(block, grad, y, found)
    return found


def _block_gradient(block: EdgeBlock, grad: Tensor, kept: Tensor, found: Named) -> None:
    part, x = block.part, block.layer.tensors["x"]
    scale, envelope = block.scale(), block.edges("envelope")
    y = kept[part] if len(kept) else block.first(block.into(x, scale=scale))
    gate = _gate(block, y)
    q = block.into_target(grad)
    ga = block.second_back(q)
    a = gate.value() if {"envelope", "second", "vectors"} & found.keys() else None
    if envelope is not None:
        if a is not None and "envelope" in found:
            torch.linalg.vecdot(ga, a, out=found["envelope"][part])
        ga.mul_(envelope[:, None])
    if a is not None and "vectors" in found:
        turn = block.torque_on_target(grad, block.second(a))
        found["vectors"][part] -= turn if envelope is None else turn * envelope[:, None]
    if a is not None and "second" in found:
        q = q if envelope is None else q.mul_(envelope[:, None])
        _add(block, a, q, found, "second")
    if {"first", "x", "vectors", *_RADIAL} & found.keys():
        _block_inputs(block, gate.gradient(ga), scale, found)


def _block_inputs(block: EdgeBlock, gy: Tensor, scale: Tensor | None, found: Named) -> None:
    layer, part, x = block.layer, block.part, block.layer.tensors["x"]
    if "first" in found:
        _add(block, block.into(x, scale=scale), gy, found, "first")
    gz = block.first_back(gy)
    if _RADIAL & found.keys():
        _add_radial(block, scale_gradient(gz, block.into(x), layer.first), None, found)
    if scale is not None:
        scale_rows_(gz, scale, layer.first)
    if "x" in found:
        block.back(gz, found["x"])
    if "vectors" in found:
        found["vectors"][part] -= block.torque(x, gz)


def second_gradient(
    layer: EdgeLayer, grad: Tensor, y: Tensor, along: Named, wanted: set[str]
) -> Named:
    """Return the gradients of sum over e of <along[e], dE/de>, for ``grad`` and every input.

    ``along`` has tensors like the inputs, and ``vectors`` for t; of ``first.0``, ``second.1`` and
    so on, all of a map are given or none.
    """
    found = _empty_gradients(layer, wanted)
    if "grad" in wanted:
        found["grad"] = torch.zeros_like(grad)
    for block in layer.blocks():
        _Second(block, grad, y, along, found).run()
    return found


_RADIAL = {"radial", "radial_weight", "radial_bias"}


class _Second:
    """One block of the gradient of the gradient; names as in the module's first lines."""

    def __init__(
        self, block: EdgeBlock, grad: Tensor, kept: Tensor, along: Named, found: Named
    ) -> None:
        self.block, self.grad, self.along, self.found = block, grad, along, found
        self.layer, self.part = block.layer, block.part
        self.x = self.layer.tensors["x"]
        self.kept = kept
        self.envelope = block.edges("envelope")
        self.scale = block.scale()
        self.turn = along["vectors"][self.part] if "vectors" in along else None
        self.turned = (
            None
            if self.turn is None
            else torch.bmm(block.wigner, turning(self.turn, self.x.shape[1]))
        )

    def run(self) -> None:
        """Go forward along the direction, then back."""
        block, layer = self.block, self.layer
        r, moved_r = self._rows()
        moved_scale = self._moved_scale()
        z, moved_z = r.clone(), moved_r.clone()
        if self.scale is not None:
            scale_rows_(z, self.scale, layer.first)
            scale_rows_(moved_z, self.scale, layer.first)
        if moved_scale is not None:
            add_scaled_rows_(moved_z, r, moved_scale, layer.first)
        y = self.kept[self.part] if len(self.kept) else block.first(z)
        moved_y = block.first(moved_z) + self._other("first", z, back=False)
        gate = _gate(block, y)
        p, moved_p = self._weighted_targets()
        ga = block.second_back(p)
        moved_a, curved = gate.second(moved_y, ga)
        self._outputs(gate.value(), moved_a, p, moved_p)
        moved_ga = self._other("second", p, back=True)
        if moved_p is not None:
            moved_ga = moved_ga + block.second_back(moved_p)
        gy = gate.gradient(ga)
        if isinstance(moved_ga, Tensor):
            curved += gate.gradient(moved_ga)
        if "first" in self.found:
            _add(block, moved_z, gy, self.found, "first")
            _add(block, z, curved, self.found, "first")
        if self.found.keys() & {"x", "vectors", *_RADIAL}:
            gz = block.first_back(gy)
            moved_gz = block.first_back(curved) + self._other("first", gy, back=True)
            self._inputs(r, moved_r, gz, moved_gz, moved_scale)

    def _rows(self) -> tuple[Tensor, Tensor]:
        r = self.block.into(self.x)
        moved = torch.zeros_like(r) if "x" not in self.along else self.block.into(self.along["x"])
        if self.turned is not None:
            moved -= self.block.into(self.x, self.turned)
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
        self.q = self.block.into_target(self.grad)
        self.moved_q = None
        p, moved = self.q, None
        if self.turned is not None:
            self.moved_q = moved = self.block.into_target(self.grad, self.turned).neg_()
        if self.envelope is not None:
            p = p * self.envelope[:, None]
            moved = None if moved is None else moved * self.envelope[:, None]
        if "envelope" in self.along:
            through = self.q * self.along["envelope"][self.part, None]
            moved = through if moved is None else moved.add_(through)
        return p, moved

    def _other(self, name: str, rows: Tensor, *, back: bool) -> Tensor | int:
        """Return M' rows or M'^T rows of a direction in the weights, 0 if it has none."""
        if f"{name}.0" not in self.along:
            return 0
        shape = getattr(self.layer, name)
        weights = [self.along[f"{name}.{m}"] for m in range(shape.mmax + 1)]
        other = self.layer.kernels.so2_map(weights, shape)
        if back:
            return other.transposed(rows, rows.new_empty(len(rows), shape.n_rows * shape.c_in))
        return other.forward(rows, rows.new_empty(len(rows), shape.width))

    def _outputs(self, a: Tensor, moved_a: Tensor, p: Tensor, moved_p: Tensor | None) -> None:
        """Add the gradients that stem from the second map and the way back."""
        block, found, part = self.block, self.found, self.part
        if "second" in found:
            _add(block, moved_a, p, found, "second")
            if moved_p is not None:
                _add(block, a, moved_p, found, "second")
        if not found.keys() & {"grad", "envelope", "vectors"}:
            return
        u, moved_u = block.second(a), block.second(moved_a)
        moved_u += self._other("second", a, back=False)
        if "envelope" in found:
            found["envelope"][part] += torch.linalg.vecdot(self.q, moved_u)
            if self.moved_q is not None:
                found["envelope"][part] += torch.linalg.vecdot(self.moved_q, u)
        self._leave(u, moved_u)

    def _leave(self, u: Tensor, moved_u: Tensor) -> None:
        """Add the gradients of the rotation back, <f u, ...> and its derivative; both change."""
        block, found, part = self.block, self.found, self.part
        if self.envelope is not None:
            moved_u *= self.envelope[:, None]
        if "envelope" in self.along:
            moved_u += u * self.along["envelope"][part, None]
        if self.envelope is not None:
            u *= self.envelope[:, None]
        if "grad" in found:
            block.back_to_target(moved_u, found["grad"])
            if self.turned is not None:
                block.back_to_target(u.neg(), found["grad"], self.turned)
        if "vectors" in found:
            turn = block.torque_on_target(self.grad, moved_u)
            if self.turn is not None:
                turn -= block.turned_torque(self.grad, u, self.turn, both=False)
            found["vectors"][part] -= turn

    def _inputs(
        self, r: Tensor, moved_r: Tensor, gz: Tensor, moved_gz: Tensor, moved_scale: Tensor | None
    ) -> None:
        """Add the gradients that stem from the way in."""
        block, found, part, shape = self.block, self.found, self.part, self.layer.first
        if found.keys() & _RADIAL:
            through = scale_gradient(gz, moved_r, shape) + scale_gradient(moved_gz, r, shape)
            _add_radial(block, through, (scale_gradient(gz, r, shape), self.along), found)
        gr, moved_gr = gz, moved_gz
        if self.scale is not None:
            scale_rows_(moved_gr, self.scale, shape)
        if moved_scale is not None:
            add_scaled_rows_(moved_gr, gz, moved_scale, shape)
        if self.scale is not None:
            scale_rows_(gr, self.scale, shape)
        if "x" in found:
            block.back(moved_gr, found["x"])
            if self.turned is not None:
                block.back(gr.neg(), found["x"], self.turned)
        if "vectors" in found:
            turn = block.torque(self.x, moved_gr)
            if "x" in self.along:
                turn += block.torque(self.along["x"], gr)
            if self.turn is not None:
                turn -= block.turned_torque(self.x, gr, self.turn, both=True)
            found["vectors"][part] -= turn


def _gate(block: EdgeBlock, y: Tensor):
    lmax, mmax = block.layer.first[:2]
    return block.layer.kernels.gate(y, lmax, mmax, block.layer.first.c_out)


def _add(block: EdgeBlock, rows: Tensor, grad: Tensor, found: Named, name: str) -> None:
    shape = getattr(block.layer, name)
    into = [found[f"{name}.{m}"] for m in range(shape.mmax + 1)]
    block.layer.kernels.add_weight_gradients(rows, grad, into, shape)


def _add_radial(
    block: EdgeBlock, through: Tensor, moved: tuple[Tensor, Named] | None, found: Named
) -> None:
    """Add the gradients of s = h A^T + b, from that of s and, along a direction, that of s'."""
    part, weight = block.part, block.layer.tensors.get("radial_weight")
    if weight is None:
        found["radial"][part] = through
        return
    own = block.edges("radial")
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


def _empty_gradients(layer: EdgeLayer, wanted: set[str]) -> Named:
    """Return zeros for what is wanted; ``first`` stands for all weights of the first map."""
    found: Named = {}
    for name in wanted & layer.tensors.keys():
        found[name] = torch.zeros_like(layer.tensors[name])
    if "vectors" in wanted:
        found["vectors"] = layer.tensors["x"].new_zeros(layer.n_edges, 3)
    for name, weights in zip(("first", "second"), layer.weights, strict=True):
        if name in wanted:
            found[name] = weights[0].new_empty(0)
            found |= {f"{name}.{m}": torch.zeros_like(w) for m, w in enumerate(weights)}
    return found
