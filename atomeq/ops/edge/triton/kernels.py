"""The Triton kernels of edge layers, as the registered operations call them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atomeq.ops.edge.gather_gradient import GatherGradientBySteps
from atomeq.ops.edge.layer import EdgeLayer
from atomeq.ops.edge.so2_shape import SO2Shape
from atomeq.ops.edge.triton import rotation, row_scale, so2
from atomeq.ops.edge.triton.gate import TritonGate
from atomeq.ops.specification import OpSpec
from atomeq.ops.triton_launch import refusal as launch_refusal

_BYTES_AT_ONCE = 2**31  # of the widest tensor of a layer while it works on some of the edges


def refusal(spec: OpSpec) -> str | None:
    """Return None if these kernels serve the call, else the reason why not."""
    return None if by_torch(spec) else launch_refusal(spec)


def by_torch(spec: OpSpec) -> bool:
    """Whether it is made once for all layers, a few hundredths of the time of one."""
    return spec.op == "edge_wigner"


class TritonEdgeKernels(GatherGradientBySteps):
    """See :class:`~atomeq.ops.edge.kernel_sets.EdgeKernels`."""

    wants_segments = True

    def gather_rotate(
        self,
        x: Tensor,
        wigner: Tensor,
        indices: Sequence[Tensor],
        *,
        lmax: int,
        mmax: int,
        scale: Tensor | None = None,
        operand: bool = False,
    ) -> Tensor:
        """Return scale * W G x."""
        dtype = so2.operand_dtype(x) if operand else x.dtype
        size = {"lmax": lmax, "mmax": mmax}
        return rotation.gather_rotate(x, wigner, indices, **size, scale=scale, dtype=dtype)

    def rotate_scatter(
        self,
        rows: Tensor,
        wigner: Tensor,
        indices: Sequence[Tensor],
        segments: Sequence[Tensor],
        n_atoms: int,
        *,
        lmax: int,
        mmax: int,
        factor: Tensor | None = None,
        total: Tensor | None = None,
    ) -> Tensor:
        """Return G^T W^T (factor * rows), added to the total if there is one."""
        return rotation.rotate_scatter(
            rows,
            wigner,
            indices,
            segments,
            n_atoms,
            lmax=lmax,
            mmax=mmax,
            factor=factor,
            total=total,
        )

    def torque(
        self,
        x: Tensor,
        rows: Tensor,
        wigner: Tensor,
        indices: Sequence[Tensor],
        *,
        lmax: int,
        mmax: int,
    ) -> Tensor:
        """Return <W^T rows, X_k G x>."""
        return rotation.torque(x, rows, wigner, indices, lmax=lmax, mmax=mmax)

    def empty(self, size: tuple[int, ...], like: Tensor) -> Tensor:
        """Return memory; torch keeps what is freed on a GPU."""
        return like.new_empty(size)

    def so2_map(self, weights: list[Tensor], shape: SO2Shape) -> so2.TritonSO2Map:
        """Return the map of some weights."""
        return so2.TritonSO2Map(weights, shape)

    def add_weight_gradients(
        self, rows: Tensor, grad: Tensor, into: list[Tensor], shape: SO2Shape
    ) -> None:
        """Add the gradients of <grad, M rows> with respect to the weights to ``into``."""
        so2.add_weight_gradients(rows, grad, into, shape)

    def scaled_rows(self, rows: Tensor, scale: Tensor, shape: SO2Shape) -> Tensor:
        """Return s rows."""
        return row_scale.scaled_rows(rows, scale, shape)

    def row_products(self, left: Tensor, right: Tensor, shape: SO2Shape) -> Tensor:
        """Return the products of rows, summed over +m and -m."""
        return row_scale.row_products(left, right, shape)

    def gate(self, y: Tensor, lmax: int, mmax: int, channels: int) -> TritonGate:
        """Return the gate of edges."""
        return TritonGate(y, lmax, mmax, channels)

    def radial_scale(self, scale: Tensor, shape: SO2Shape) -> row_scale.TritonRadialScale:
        """Return the factors of the first map's inputs."""
        return row_scale.TritonRadialScale(scale, shape)

    def edges_at_once(self, first: SO2Shape) -> int:
        """Return how many edges a layer works on at a time: what fits, since a GPU wants all."""
        widest = max(first.width, first.n_rows * first.c_in)
        return max(1, _BYTES_AT_ONCE // (widest * torch.float64.itemsize))

    def whole_layer(self, layer: EdgeLayer) -> None:
        """Return None: blocks are as large as memory allows."""
