"""The factors s of an edge layer's first rows, z = s r, and their derivatives in plain torch."""

from torch import Tensor

from atomeq.ops.edge.so2_shape import (
    SO2Shape,
    add_scaled_rows_,
    scale_gradient,
    scale_rows_,
)


class RadialScale:
    """Factors (n_edges, n_scales) of rows (n_edges, n_rows * c_in); +m and -m share theirs.

    A kernel set may have a faster one; ``moved`` are derivatives along a direction.
    """

    def __init__(self, scale: Tensor, shape: SO2Shape) -> None:
        self.scale = scale
        self.shape = shape

    def value(
        self, rows: Tensor, moved: Tensor, moved_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return z = s r and z' = s r' + s' r."""
        z, moved_z = self.multiply_(rows.clone()), self.multiply_(moved.clone())
        if moved_scale is not None:
            add_scaled_rows_(moved_z, rows, moved_scale, self.shape)
        return z, moved_z

    def gradient_(self, rows: Tensor, grad: Tensor) -> Tensor:
        """Return dE/ds from ``grad`` = dE/dz, which becomes dE/dr."""
        through = scale_gradient(grad, rows, self.shape)
        self.multiply_(grad)
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
        through = scale_gradient(grad, rows, self.shape)
        moved_through = scale_gradient(grad, moved, self.shape)
        moved_through += scale_gradient(moved_grad, rows, self.shape)
        self.multiply_(moved_grad)
        if moved_scale is not None:
            add_scaled_rows_(moved_grad, grad, moved_scale, self.shape)
        self.multiply_(grad)
        return through, moved_through

    def multiply_(self, rows: Tensor) -> Tensor:
        """Multiply rows by s, in place."""
        return scale_rows_(rows, self.scale, self.shape)
