"""The gate of an edge layer in plain torch, or its C kernel where there is one."""

import torch
from torch import Tensor

from atomeq.ops.edge.cpu import memory, native_edge
from atomeq.ops.orders import m_primary_order, row_degrees
from atomeq.ops.tables import table_like


class CPUGate:
    """See :class:`~atomeq.ops.edge.kernel_sets.GateKernel`."""

    def __init__(self, y: Tensor, lmax: int, mmax: int, channels: int) -> None:
        self.y = y
        self.degrees = (lmax, mmax)
        self.channels = channels
        self.width = len(m_primary_order(lmax, mmax)) * channels
        # the gates and the row l = 0 lie side by side
        scalars = y[:, : (lmax + 1) * channels]
        self.sigmoid = torch.sigmoid(scalars, out=memory.empty(scalars.shape, y))
        self.native = native_edge.serves(y)

    def value(self) -> Tensor:
        """Return SiLU of l = 0, and gated rows."""
        if self.native:
            value = memory.empty((len(self.y), self.width), self.y)
            native_edge.rows_wise(
                "gate", (self.y, self.sigmoid, value), self.channels, self.degrees
            )
            return value
        return (self._rows(self.y) * self._by_row(self.sigmoid)).flatten(1)

    def gradient(self, grad: Tensor) -> Tensor:
        """Return J^T grad."""
        if self.native:
            result = memory.empty(self.y.shape, self.y)
            tensors = (self.y, self.sigmoid, grad, result)
            native_edge.rows_wise("gate_gradient", tensors, self.channels, self.degrees)
            return result
        g, y, p = grad.unflatten(1, (-1, self.channels)), self._rows(self.y), self.sigmoid
        slope = p * (1 - p)
        through = self._sum_by_gate(g * y) * slope  # SiLU is its own gate
        rows = g * self._by_row(p)
        rows[:, 0] += through[:, -self.channels :]
        return torch.cat((through[:, : -self.channels], rows.flatten(1)), dim=1)

    def second(self, moved: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return J moved and the gradient of <moved, J^T grad>."""
        if self.native:
            value, curved = (memory.empty(t.shape, t) for t in (grad, self.y))
            tensors = (self.y, self.sigmoid, moved, grad, value, curved)
            native_edge.rows_wise("gate_second", tensors, self.channels, self.degrees)
            return value, curved
        g, y, p = grad.unflatten(1, (-1, self.channels)), self._rows(self.y), self.sigmoid
        slope, bent = p * (1 - p), p * (1 - p) * (1 - 2 * p)
        # the row l = 0 moves its own gate
        gates, rows = moved[:, : p.shape[1]], self._rows(moved)
        value = rows * self._by_row(p) + y * self._by_row(slope * gates)
        curved = g * self._by_row(slope * gates)
        through = self._sum_by_gate(g * rows) * slope + self._sum_by_gate(g * y) * bent * gates
        curved[:, 0] += through[:, -self.channels :]
        result = torch.cat((through[:, : -self.channels], curved.flatten(1)), dim=1)
        return value.flatten(1), result

    def _rows(self, y: Tensor) -> Tensor:
        return y[:, y.shape[1] - self.width :].unflatten(1, (-1, self.channels))

    def _by_row(self, gates: Tensor) -> Tensor:
        """Spread the gates (n_edges, (lmax + 1) * channels), l = 0 last, over the rows."""
        return gates.unflatten(1, (-1, self.channels)).index_select(1, self._gate_of_row())

    def _sum_by_gate(self, rows: Tensor) -> Tensor:
        total = rows.new_zeros(len(rows), self.degrees[0] + 1, self.channels)
        return total.index_add_(1, self._gate_of_row(), rows).flatten(1)

    def _gate_of_row(self) -> Tensor:
        lmax, mmax = self.degrees
        return (table_like(row_degrees, lmax, mmax, like=self.y) - 1) % (lmax + 1)
