"""The eSCN edge layer in raw functions: value and gradient.

For each edge, with G the gather of both atoms, W the rotation into its frame, S the sum on the
target atoms,

    r = W G x,  z = s r,  y = M_1 z,  a = gate(y),  u = M_2 a,  out = S f W^T u.

Edges are worked on a block at a time, and between the passes nothing of an edge is kept but y and
u, and for a second derivative dE/da and dE/dz, or not even these. The gradient of the gradient is
in :mod:`atomeq.ops.edge.layer_second`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from atomeq.ops.edge.frame import segments_of
from atomeq.ops.edge.kernel_sets import EdgeKernels, GateKernel
from atomeq.ops.edge.so2_shape import SO2Shape

Named = dict[str, Tensor]
RADIAL = {"radial", "radial_weight", "radial_bias"}
INWARD = {"first", "x", "vectors", *RADIAL}  # what a gradient must pass the first map for


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

    def torque(self, x: Tensor, rows: Tensor, wigner: Tensor | None = None) -> Tensor:
        """Return <W^T rows, X_k G x> of both atoms, (n, 3)."""
        return self._torque(x, rows, self.indices, wigner)

    def torque_on_target(self, x: Tensor, rows: Tensor, wigner: Tensor | None = None) -> Tensor:
        """Return <W^T rows, X_k G x> of the target atoms, (n, 3)."""
        return self._torque(x, rows, self.indices[1:], wigner)

    def first(self, z: Tensor, out: Tensor | None = None) -> Tensor:
        """Return M_1 z."""
        return self._forward(0, z, out)

    def second(self, a: Tensor, out: Tensor | None = None) -> Tensor:
        """Return M_2 a."""
        return self._forward(1, a, out)

    def first_back(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Return M_1^T grad."""
        return self._transposed(0, grad, out)

    def second_back(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Return M_2^T grad."""
        return self._transposed(1, grad, out)

    def gate(self, y: Tensor) -> GateKernel:
        """Return the gate at y."""
        lmax, mmax = self.layer.first[:2]
        return self.layer.kernels.gate(y, lmax, mmax, self.layer.first.c_out)

    def add_weight_gradients(self, rows: Tensor, grad: Tensor, found: Named, name: str) -> None:
        """Add the gradients of <grad, M rows> to those of the ``first`` or ``second`` map."""
        shape = getattr(self.layer, name)
        into = [found[f"{name}.{m}"] for m in range(shape.mmax + 1)]
        self.layer.kernels.add_weight_gradients(rows, grad, into, shape)

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

    def empty(self, width: int, like: Tensor) -> Tensor:
        """Return memory for rows of so many numbers that do not outlive the block."""
        return self.layer.kernels.empty((self.n, width), like)

    def _forward(self, number: int, rows: Tensor, out: Tensor | None) -> Tensor:
        shape = (self.layer.first, self.layer.second)[number]
        out = self.empty(shape.width, rows) if out is None else out
        return self.layer.maps[number].forward(rows, out)

    def _transposed(self, number: int, grad: Tensor, out: Tensor | None) -> Tensor:
        shape = (self.layer.first, self.layer.second)[number]
        out = self.empty(shape.n_rows * shape.c_in, grad) if out is None else out
        return self.layer.maps[number].transposed(grad, out)

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

    def _torque(
        self, x: Tensor, rows: Tensor, indices: list[Tensor], wigner: Tensor | None
    ) -> Tensor:
        wigner = self.wigner if wigner is None else wigner
        lmax, mmax = self.layer.first[:2]
        rows = rows.unflatten(1, (self.layer.first.n_rows, -1))
        return self.layer.kernels.torque(x, rows, wigner, indices, lmax=lmax, mmax=mmax)

    def _segments(self) -> list[Tensor]:
        if not self.layer.kernels.wants_segments:
            return []
        n_atoms = self.layer.tensors["x"].shape[0]
        return [part for index in self.indices for part in segments_of(index, n_atoms)]


def value(layer: EdgeLayer, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums on the atoms, (n_atoms, n_sph, C), and y and u if they are to be kept."""
    whole = layer.kernels.whole_layer(layer)
    if whole is not None:
        return whole.value(keep=keep)
    x = layer.tensors["x"]
    n_sph, channels = x.shape[1], layer.second.c_out
    total = x.new_zeros(x.shape[0], n_sph, channels)
    n_kept = layer.n_edges if keep else 0
    y, u = (layer.kernels.empty((n_kept, shape.width), x) for shape in (layer.first, layer.second))
    for block in layer.blocks():
        rows = block.into(x, scale=block.scale(), operand=True)
        block_y = y[block.part] if keep else block.empty(layer.first.width, x)
        block_u = u[block.part] if keep else block.empty(layer.second.width, x)
        block.second(layer.maps[0].gated(rows, block_y, keep=keep), out=block_u)
        block.back_to_target(block_u, total, factor=block.edges("envelope"))
    return total, y, u


def gradient(
    layer: EdgeLayer, grad: Tensor, kept: list[Tensor], wanted: set[str], *, keep: bool
) -> tuple[Named, Tensor, Tensor]:
    """Return dE/de of the wanted inputs, and dE/da and dE/dz if they are to be kept.

    ``grad`` is dE/d(out). Of the results, ``vectors`` means dE/dt, (n_edges, 3). ``kept`` has y and
    u, both empty if they were not kept. To keep something, one of ``INWARD`` must be wanted.
    """
    n_kept = layer.n_edges if keep else 0
    ga, gz = (
        layer.kernels.empty((n_kept, shape.n_rows * shape.c_in), grad)
        for shape in (layer.second, layer.first)
    )
    whole = None if keep else layer.kernels.whole_layer(layer)
    found = None if whole is None else whole.gradient(grad, kept, wanted)
    if found is not None:
        return found, ga, gz
    found = empty_gradients(layer, wanted)
    for block in layer.blocks():
        into = (ga[block.part], gz[block.part]) if keep else (None, None)
        _block_gradient(block, grad, kept, found, into)
    return found, ga, gz


def _block_gradient(
    block: EdgeBlock,
    grad: Tensor,
    kept: list[Tensor],
    found: Named,
    into: tuple[Tensor | None, Tensor | None],
) -> None:
    part, x = block.part, block.layer.tensors["x"]
    scale, envelope = block.scale(), block.edges("envelope")
    y, u = (values[part] if len(values) else None for values in kept)
    if y is None:
        y = block.first(block.into(x, scale=scale))
    gate = block.gate(y)
    q = block.into_target(grad)
    ga = block.second_back(q, into[0])
    a = gate.value() if {"envelope", "second", "vectors"} & found.keys() else None
    if envelope is not None:
        if a is not None and "envelope" in found:
            torch.linalg.vecdot(ga, a, out=found["envelope"][part])
        ga.mul_(envelope[:, None])
    if a is not None and "vectors" in found:
        turn = block.torque_on_target(grad, block.second(a) if u is None else u)
        found["vectors"][part] -= turn if envelope is None else turn * envelope[:, None]
    if a is not None and "second" in found:
        q = q if envelope is None else q.mul_(envelope[:, None])
        block.add_weight_gradients(a, q, found, "second")
    if INWARD & found.keys():
        _block_inputs(block, gate.gradient(ga), scale, found, into[1])


def _block_inputs(
    block: EdgeBlock, gy: Tensor, scale: Tensor | None, found: Named, into: Tensor | None
) -> None:
    layer, part, x = block.layer, block.part, block.layer.tensors["x"]
    if "first" in found:
        block.add_weight_gradients(block.into(x, scale=scale), gy, found, "first")
    gz = block.first_back(gy)
    if into is not None:
        into.copy_(gz)
    to_scale, to_turn = None, None
    mapped = "radial_weight" in layer.tensors
    if scale is not None and RADIAL & found.keys():
        to_scale = layer.kernels.empty(scale.shape, x) if mapped else found["radial"][part]
    if "vectors" in found:
        to_turn = x.new_empty(block.n, 3)
    layer.kernels.gather_gradient(
        *(x, block.wigner, block.indices, block.segments, gz, layer.first),
        **{"scale": scale, "to_scale": to_scale, "to_x": found.get("x"), "to_turn": to_turn},
    )
    if to_turn is not None:
        found["vectors"][part] -= to_turn
    if to_scale is not None and mapped:
        block.add_radial_gradients(to_scale, None, found)


def empty_gradients(layer: EdgeLayer, wanted: set[str]) -> Named:
    """Return zeros for what is wanted; ``first`` stands for all weights of the first map.

    Edges have ``radial`` to themselves, and its memory is as it is.
    """

    def zeros_like(tensor: Tensor) -> Tensor:
        return layer.kernels.empty(tensor.shape, tensor).zero_()

    found = {
        name: zeros_like(layer.tensors[name]) for name in wanted & layer.tensors.keys() - {"radial"}
    }
    if "radial" in wanted:
        found["radial"] = layer.kernels.empty(layer.tensors["radial"].shape, layer.tensors["x"])
    if "vectors" in wanted:
        found["vectors"] = layer.tensors["x"].new_zeros(layer.n_edges, 3)
    for name, weights in zip(("first", "second"), layer.weights, strict=True):
        if name in wanted:
            found[name] = weights[0].new_empty(0)
            found |= {f"{name}.{m}": zeros_like(w) for m, w in enumerate(weights)}
    return found
