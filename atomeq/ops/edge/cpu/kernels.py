"""The edge kernels of the ``cpu`` set: in C where a compiler is at hand, else in plain torch.

In plain torch a block of edges is worked on at a time, small enough for the processor's cache.
"""

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from atomeq.ops.blocks import blocks
from atomeq.ops.c_compiler import unavailable
from atomeq.ops.edge.cpu import memory, native_edge
from atomeq.ops.edge.cpu.gate import CPUGate
from atomeq.ops.edge.cpu.radial_scale import CPURadialScale
from atomeq.ops.edge.cpu.so2 import CPUSO2Map, add_weight_gradients
from atomeq.ops.edge.cpu.whole_layer import WholeLayer
from atomeq.ops.edge.cpu.wigner import edge_wigner
from atomeq.ops.edge.gather_gradient import GatherGradientBySteps
from atomeq.ops.edge.layer import EdgeLayer
from atomeq.ops.edge.radial_scale import RadialScale
from atomeq.ops.edge.so2_shape import SO2Shape, scale_gradient, scale_rows_
from atomeq.ops.edge.wigner import flat_generators
from atomeq.ops.orders import radial_rows
from atomeq.ops.specification import OpSpec
from atomeq.ops.tables import table_like

__all__ = ["CPUEdgeKernels", "edge_wigner", "refusal"]

logger = logging.getLogger(__name__)

_LAYER_BLOCK = 2**18  # numbers of the widest rows of an edge layer
_LEAST_EDGES, _MOST_EDGES = 400, 1024  # matrix products want some rows


def refusal(spec: OpSpec) -> str | None:
    """Refuse other devices and half precision."""
    if spec.device.type != "cpu":
        return "its kernels run on a CPU"
    if spec.dtype not in (torch.float32, torch.float64):
        return f"its kernels take float32 and float64, not {spec.dtype}"
    _say_what_serves()
    return None


class CPUEdgeKernels(GatherGradientBySteps):
    """See :class:`~atomeq.ops.edge.kernel_sets.EdgeKernels`."""

    wants_segments = False  # atoms are added to one after the other, in the order of the edges

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
        channels = max(1, len(indices)) * x.shape[2]
        rows = memory.empty((*wigner.shape[:2], channels), x)
        if native_edge.serves(x):
            given = [index.contiguous() for index in indices]
            scale = None if scale is None else scale.contiguous()
            native_edge.gather_rotate(
                x.contiguous(), wigner.contiguous(), given, scale, rows, (lmax, mmax)
            )
            return rows
        for part in blocks(len(rows), x.shape[1] * channels, x.device):
            torch.bmm(wigner[part], _gathered(x, indices, part), out=rows[part])
            if scale is not None:
                order = table_like(radial_rows, lmax, mmax, like=x)
                rows[part].mul_(scale[part].unflatten(1, (-1, channels)).index_select(1, order))
        return rows

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
        """Return G^T W^T (factor * rows)."""
        channels = rows.shape[2] // max(1, len(indices))
        if total is None:
            total = rows.new_zeros(n_atoms if indices else len(rows), wigner.shape[2], channels)
        if native_edge.serves(rows):
            given = [index.contiguous() for index in indices]
            factor = None if factor is None else factor.contiguous()
            native_edge.rotate_scatter(
                rows.contiguous(), wigner.contiguous(), given, factor, total, (lmax, mmax)
            )
            return total
        for part in blocks(len(rows), wigner.shape[2] * rows.shape[2], rows.device):
            lab = torch.bmm(wigner[part].mT, rows[part])
            if factor is not None:
                lab.mul_(factor[part, None, None])
            if not indices:
                total[part] += lab
            for index, members in zip(indices, lab.split(channels, dim=-1), strict=False):
                total.index_add_(0, index[part], members)
        return total

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
        """Sum over the channels first: the size of what is left does not grow with them."""
        result = rows.new_empty(len(rows), 3)
        if native_edge.serves(rows):
            given = [index.contiguous() for index in indices]
            native_edge.torque(
                x.contiguous(),
                rows.contiguous(),
                wigner.contiguous(),
                given,
                result,
                (lmax, mmax),
            )
            return result
        generators = table_like(flat_generators, lmax, like=x)
        for part in blocks(len(rows), wigner.shape[2] * rows.shape[2], x.device):
            lab = torch.bmm(wigner[part].mT, rows[part])
            outer = torch.bmm(lab, _gathered(x, indices, part).mT)
            torch.mm(outer.flatten(1), generators, out=result[part])
        return result

    def gather_gradient(
        self,
        x: Tensor,
        wigner: Tensor,
        indices: Sequence[Tensor],
        segments: Sequence[Tensor],
        grad: Tensor,
        shape: SO2Shape,
        *,
        scale: Tensor | None,
        to_scale: Tensor | None,
        to_x: Tensor | None,
        to_turn: Tensor | None,
    ) -> None:
        """Give the gradients of <grad, scale * W G x>."""
        if not native_edge.serves(x):
            results = {"to_scale": to_scale, "to_x": to_x, "to_turn": to_turn}
            given = (x, wigner, indices, segments, grad, shape)
            super().gather_gradient(*given, scale=scale, **results)
            return
        scale = None if scale is None else scale.contiguous()
        native_edge.gather_gradient(
            *(x.contiguous(), wigner.contiguous(), [index.contiguous() for index in indices]),
            *(grad, scale, (to_scale, to_x, to_turn), (shape.lmax, shape.mmax)),
        )

    def empty(self, size: tuple[int, ...], like: Tensor) -> Tensor:
        """Return memory that is used again when it is freed."""
        return memory.empty(size, like)

    def so2_map(self, weights: list[Tensor], shape: SO2Shape) -> CPUSO2Map:
        """Return the map of some weights."""
        return CPUSO2Map(weights, shape)

    def add_weight_gradients(
        self, rows: Tensor, grad: Tensor, into: list[Tensor], shape: SO2Shape
    ) -> None:
        """Add the gradients of <grad, M rows> with respect to the weights."""
        add_weight_gradients(rows, grad, into, shape)

    def scaled_rows(self, rows: Tensor, scale: Tensor, shape: SO2Shape) -> Tensor:
        """Return s rows."""
        return scale_rows_(rows.clone(), scale, shape)

    def row_products(self, left: Tensor, right: Tensor, shape: SO2Shape) -> Tensor:
        """Return the products of rows, summed over +m and -m."""
        return scale_gradient(left, right, shape)

    def gate(self, y: Tensor, lmax: int, mmax: int, channels: int) -> CPUGate:
        """Return the gate of edges."""
        return CPUGate(y, lmax, mmax, channels)

    def radial_scale(self, scale: Tensor, shape: SO2Shape) -> RadialScale:
        """Return the factors of the first map's inputs."""
        return (CPURadialScale if native_edge.serves(scale) else RadialScale)(scale, shape)

    def edges_at_once(self, first: SO2Shape) -> int:
        """Return how many edges keep a layer's rows in the cache."""
        edges = _LAYER_BLOCK // max(1, first.n_rows * first.c_in)
        return min(max(edges, _LEAST_EDGES), _MOST_EDGES)

    def whole_layer(self, layer: EdgeLayer) -> WholeLayer | None:
        """Return the C kernel where it serves."""
        return WholeLayer(layer) if WholeLayer.serves(layer) else None


def _gathered(x: Tensor, indices: Sequence[Tensor], part: slice) -> Tensor:
    if not indices:
        return x[part]
    members = [x.index_select(0, index[part]) for index in indices]
    return members[0] if len(members) == 1 else torch.cat(members, dim=-1)


@cache
def _say_what_serves() -> None:
    reason = unavailable()
    logger.info("cpu kernels of edge layers: %s", f"plain torch ({reason})" if reason else "C")
