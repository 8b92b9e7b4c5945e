"""The way into an edge layer, s W G x, differentiated by single kernels one after the other."""

from collections.abc import Sequence

from torch import Tensor

from atomeq.ops.edge.kernel_sets import EdgeKernels
from atomeq.ops.edge.so2_shape import SO2Shape


class GatherGradientBySteps:
    """For :class:`~atomeq.ops.edge.kernel_sets.EdgeKernels` without a kernel of their own."""

    def gather_gradient(
        self: EdgeKernels,
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
        lmax, mmax = shape.lmax, shape.mmax
        if scale is not None:
            radial = self.radial_scale(scale, shape)
            if to_scale is None:
                radial.multiply_(grad)
            else:
                rows = self.gather_rotate(x, wigner, indices, lmax=lmax, mmax=mmax)
                to_scale.copy_(radial.gradient_(rows.flatten(1), grad))
        rows = grad.unflatten(1, (shape.n_rows, -1))
        if to_x is not None:
            self.rotate_scatter(
                rows, wigner, indices, segments, len(x), lmax=lmax, mmax=mmax, total=to_x
            )
        if to_turn is not None:
            to_turn.copy_(self.torque(x, rows, wigner, indices, lmax=lmax, mmax=mmax))
