"""The factors of an edge layer's first rows by the C kernel: one pass over rows for all of them."""

from torch import Tensor

from atomeq.ops.edge.cpu import memory, native_edge
from atomeq.ops.edge.radial_scale import RadialScale
from atomeq.ops.edge.so2_shape import SO2Shape


class CPURadialScale(RadialScale):
    """See :class:`~atomeq.ops.edge.radial_scale.RadialScale`; rows are contiguous."""

    def __init__(self, scale: Tensor, shape: SO2Shape) -> None:
        super().__init__(scale.contiguous(), shape)

    def value(
        self, rows: Tensor, moved: Tensor, moved_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return z = s r and z' = s r' + s' r."""
        z, moved_z = (memory.empty(rows.shape, rows) for _ in range(2))
        self._call("scale_rows", rows, moved, self.scale, _contiguous(moved_scale), z, moved_z)
        return z, moved_z

    def gradient_(self, rows: Tensor, grad: Tensor) -> Tensor:
        """Return dE/ds from ``grad`` = dE/dz, which becomes dE/dr."""
        through = memory.empty(self.scale.shape, rows)
        self._call("scale_gradient", rows, self.scale, grad, through)
        return through

    def second_(
        self,
        rows: Tensor,
        moved: Tensor,
        grad: Tensor,
        moved_grad: Tensor,
        moved_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return dE/ds and its derivative; dE/dz and its derivative become those of dE/dr."""
        through, moved_through = (memory.empty(self.scale.shape, rows) for _ in range(2))
        self._call(
            *("scale_second", rows, moved, self.scale, _contiguous(moved_scale)),
            *(grad, moved_grad, through, moved_through),
        )
        return through, moved_through

    def _call(self, name: str, *tensors: Tensor | None) -> None:
        native_edge.rows_wise(name, tensors, self.shape.c_in, self.shape[:2])


def _contiguous(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.contiguous()
