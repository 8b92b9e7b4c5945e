"""The factors s of an edge layer's first rows, z = s r, and their derivatives in plain torch."""

import torch
from torch import Tensor

from atomeq.ops.registered.so2_shape import SO2Shape


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
        return z, moved_z if moved_scale is None else self._add(moved_z, rows, moved_scale)

    def gradient_(self, rows: Tensor, grad: Tensor) -> Tensor:
        """Return dE/ds from ``grad`` = dE/dz, which becomes dE/dr."""
        through = self._through(grad, rows)
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
        through = self._through(grad, rows)
        moved_through = self._through(grad, moved) + self._through(moved_grad, rows)
        self.multiply_(moved_grad)
        if moved_scale is not None:
            self._add(moved_grad, grad, moved_scale)
        self.multiply_(grad)
        return through, moved_through

    def multiply_(self, rows: Tensor) -> Tensor:
        """Multiply rows by s, in place."""
        for block in self.shape.blocks:
            for columns in block.inputs:
                rows[:, columns].mul_(self.scale[:, block.scales])
        return rows

    def _add(self, total: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
        for block in self.shape.blocks:
            for columns in block.inputs:
                total[:, columns].addcmul_(rows[:, columns], scale[:, block.scales])
        return total

    def _through(self, grad: Tensor, rows: Tensor) -> Tensor:
        result = rows.new_empty(len(rows), self.shape.n_scales)
        for block in self.shape.blocks:
            part = result[:, block.scales]
            torch.mul(grad[:, block.inputs[0]], rows[:, block.inputs[0]], out=part)
            for columns in block.inputs[1:]:
                part.addcmul_(grad[:, columns], rows[:, columns])
        return result
