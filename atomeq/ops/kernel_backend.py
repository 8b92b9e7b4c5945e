"""Backends made of the registered operations: one kernel set computes, the gradients are shared."""

import torch
from torch import Tensor

from atomeq.ops.atom_operations import ATOM_TOPICS, AtomOperations
from atomeq.ops.edge import escn_conv, so2_map
from atomeq.ops.edge import registered_wigner as wigner
from atomeq.ops.edge import rotation as edge_rotation
from atomeq.ops.edge.frame import EdgeFrame
from atomeq.ops.edge.row_scale import scale_by_row
from atomeq.ops.edge.so2_shape import SO2Shape
from atomeq.ops.kernel_sets import refusal, wants_segments
from atomeq.ops.specification import OpSpec

_EDGE_OPS = ("rotate_to_edge", "rotate_from_edge", "so2_linear", "escn_conv")
_TOPICS = dict.fromkeys(_EDGE_OPS, "edge") | ATOM_TOPICS | {"edge_wigner": "wigner"}


class KernelBackend(AtomOperations):
    """The operations of one kernel set; see :class:`~atomeq.ops.dispatch.Backend`.

    Args:
        kernels: Name of the set.
    """

    def __init__(self, kernels: str) -> None:
        super().__init__(kernels)

    def refusal(self, spec: OpSpec) -> str | None:
        """Ask the kernels; a set need not have those of every operation."""
        return refusal(_TOPICS.get(spec.op, spec.op), self.name, spec)

    def edge_wigner(self, vectors: Tensor, lmax: int, mmax: int) -> Tensor:
        """Return the Wigner rows that take edges to +y."""
        return wigner.edge_wigner(vectors, lmax, mmax, self.name)

    def rotate_to_edge(self, x: Tensor, frame: EdgeFrame, indices: tuple[Tensor, ...]) -> Tensor:
        """Gather by each index, join the channels, rotate into the edge frames."""
        segments = self._segments(frame, indices)
        return edge_rotation.gather_rotate(
            *(x, frame.vectors, frame.wigner, None, list(indices), segments),
            *(frame.lmax, frame.mmax, self.name),
        )

    def rotate_from_edge(
        self, y: Tensor, frame: EdgeFrame, envelope: Tensor | None, total: bool
    ) -> Tensor:
        """Rotate back to the lab frame and, if total, sum on the targets."""
        indices = (frame.target,) if total else ()
        return edge_rotation.rotate_scatter(
            *(y, frame.vectors, frame.wigner, envelope, None, list(indices)),
            *(self._segments(frame, indices), frame.n_atoms, frame.lmax, frame.mmax, self.name),
        )

    def so2_linear(
        self,
        x: Tensor,
        weights: list[Tensor],
        c_out: int,
        bias: Tensor | None,
        scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Mix degrees and channels within each order."""
        mmax, lmax = len(weights) - 1, weights[0].shape[1] // x.shape[2] - 1
        n_scalars = weights[0].shape[0] - (lmax + 1) * c_out
        shape = SO2Shape(lmax, mmax, x.shape[2], c_out, n_scalars)
        if scale is not None:
            x = scale_by_row(x, scale, shape, self.name)
        return so2_map.so2_map(x, _views(weights), shape, bias, self.name)

    def escn_conv(
        self,
        x: Tensor,
        frame: EdgeFrame,
        first: list[Tensor],
        second: list[Tensor],
        radial: Tensor | None,
        radial_weight: Tensor | None,
        radial_bias: Tensor | None,
        envelope: Tensor | None,
        recompute: bool,
    ) -> Tensor:
        """Return the whole edge layer as one operation."""
        inputs = (x, frame.vectors, radial, radial_weight, radial_bias, envelope, *first, *second)
        needs = any(tensor is not None and tensor.requires_grad for tensor in inputs)
        keep = needs and torch.is_grad_enabled() and not recompute
        given = {"x": x, "vectors": frame.vectors, "radial": radial, "envelope": envelope}
        for name, leaf in (("radial_weight", radial_weight), ("radial_bias", radial_bias)):
            given[name] = None if leaf is None else _views([leaf])[0]
        segments = self._segments(frame, (frame.source, frame.target))
        edges = [frame.wigner, frame.source, frame.target, *segments]
        present, layout = escn_conv.layer_arguments(given, frame.lmax, frame.mmax)
        weights = _views([*first, *second])
        total, *_ = escn_conv.escn_conv(present, weights, edges, layout, keep, self.name)
        return total

    def _segments(self, frame: EdgeFrame, indices: tuple[Tensor, ...]) -> list[Tensor]:
        if not wants_segments("edge", self.name):
            return []
        return [part for index in indices for part in frame.segments(index)]


class CPUBackend(KernelBackend):
    """The registered operations with the kernels of a CPU."""

    def __init__(self) -> None:
        super().__init__("cpu")


def _views(weights: list[Tensor]) -> list[Tensor]:
    """Return views of the weights: of a leaf torch cannot tell whether its gradient is wanted."""
    return [weight.view_as(weight) if weight.requires_grad else weight for weight in weights]
