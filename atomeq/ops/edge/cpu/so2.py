"""SO(2) maps, by so2.c, and the gate and the factors between them, by edge.c."""

from typing import Any

import torch
from torch import Tensor

from atomeq.ops.c_compiler import c_library, threads_for
from atomeq.ops.edge.cpu.memory import empty
from atomeq.ops.edge.cpu.rotation import edge_functions, plain
from atomeq.ops.edge.so2_map import SO2Shape

_MAP_EDGES_PER_THREAD = 48  # fewer do not pay for a thread


class SO2Map:
    """The map M of some weights, packed in the order in which the kernel reads them."""

    def __init__(self, weights: list[Tensor], shape: SO2Shape) -> None:
        self.shape = shape
        self.weights = [weight.contiguous() for weight in weights]
        self._library = _maps(weights[0].dtype, shape)
        self._packed: dict[int, Tensor] = {}

    def forward(
        self, rows: Tensor, out: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Return M rows + bias, (n_edges, n_rows * c_in) -> (n_edges, width).

        The bias, if there is one, belongs to the first of the outputs, those of m = 0.
        """
        out = empty((len(rows), self.shape.width), rows) if out is None else out
        self._multiply(rows, out, 0)
        if bias is not None:
            out[:, : len(bias)] += bias
        return out

    def gated(self, rows: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Return a(y) of y = M rows + bias, which is written to ``out`` if it is to be kept."""
        return Gate(self.forward(rows, out, bias), self.shape).value()

    def transposed(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Return M^T grad, (n_edges, width) -> (n_edges, n_rows * c_in)."""
        out = empty((len(grad), self.shape.width_in), grad) if out is None else out
        self._multiply(grad, out, 1)
        return out

    def transposed_through(
        self,
        gate: "Gate",
        grad: Tensor,
        out: Tensor | None = None,
        also: Tensor | None = None,
        value: Tensor | None = None,
        *,
        operand: bool = False,
    ) -> Tensor:
        """Return J^T M^T grad + also, of the gate before the map; M^T grad goes to ``out``."""
        return gate.gradient(self.transposed(grad, out), also, value)

    def _multiply(self, rows: Tensor, out: Tensor, back: int) -> None:
        sizes, is_complex = (back, *self.shape[2:]), _complex(self.weights)
        if back not in self._packed:
            packed = empty((self._library.packed_size(*sizes),), self.weights[0])
            self._library.pack_map(self.weights, is_complex, *sizes, packed)
            self._packed[back] = packed
        n_threads = threads_for(len(rows), _MAP_EDGES_PER_THREAD)
        self._library.map_rows(
            rows, self._packed[back], is_complex, *sizes, out, len(rows), n_threads
        )


def add_weight_gradients(rows: Tensor, grad: Tensor, into: list[Tensor], shape: SO2Shape) -> None:
    """Add the gradients of <grad, M rows> with respect to the weights to ``into``."""
    library, n_threads = _maps(rows.dtype, shape), threads_for(len(rows), _MAP_EDGES_PER_THREAD)
    panels = empty((library.panels_size(shape.c_in),), rows)
    library.map_weights(rows, grad, _complex(into), *shape[2:], into, panels, len(rows), n_threads)


def _maps(dtype: torch.dtype, shape: SO2Shape) -> Any:
    return c_library("edge/cpu/so2.c", dtype, LMAX=shape.lmax, MMAX=shape.mmax)


def _complex(weights: list[Tensor]) -> list[int]:
    return [int(weight.ndim == 3) for weight in weights]


class Gate:
    """SiLU on l = 0, sigmoid gates on l > 0: value a(y), Jacobian J and second derivative.

    Of y, (n_edges, lmax * channels + n_rows * channels), the gates of l = 1..lmax come first.
    """

    def __init__(self, y: Tensor, shape: SO2Shape) -> None:
        self.y = y
        self.shape = shape
        # the gates and the row l = 0 lie side by side
        scalars = y[:, : (shape.lmax + 1) * shape.c_out]
        self.sigmoid = torch.sigmoid(scalars, out=empty(scalars.shape, y))

    def value(self) -> Tensor:
        """Return SiLU of l = 0, and gated rows, (n_edges, n_rows * channels)."""
        value = empty((len(self.y), self.shape.n_rows * self.shape.c_out), self.y)
        self._call("gate", value)
        return value

    def gradient(
        self, grad: Tensor, also: Tensor | None = None, value: Tensor | None = None
    ) -> Tensor:
        """Return J^T grad + also, like y; the value is written where it is wanted."""
        if value is not None:
            self._call("gate", value)
        result = empty(self.y.shape, self.y)
        self._call("gate_gradient", grad, result)
        return result if also is None else result.add_(also)

    def second(
        self, moved: Tensor, grad: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return J moved, the gradient of <moved, J^T grad> in y, to ``out`` too, and J^T grad."""
        value = empty(grad.shape, grad)
        curved = empty(self.y.shape, self.y) if out is None else out
        self._call("gate_second", moved, grad, value, curved)
        return value, curved, self.gradient(grad)

    def _call(self, name: str, *tensors: Tensor) -> None:
        function = getattr(edge_functions(self.y.dtype, *self.shape[:2]), name)
        function(self.y, self.sigmoid, *tensors, len(self.y), self.shape.c_out)


def moved_scaled(
    rows: Tensor, moved: Tensor, scale: Tensor, moved_scale: Tensor | None, shape: SO2Shape
) -> Tensor:
    """Return z' = s r' + s' r, the derivative of z = s r along a direction."""
    moved_z = empty(rows.shape, rows)
    given = (rows, moved, scale.contiguous(), plain(moved_scale), moved_z)
    edge_functions(rows.dtype, *shape[:2]).moved_scaled(*given, len(rows), shape.c_in)
    return moved_z


def scaled_rows(rows: Tensor, scale: Tensor, shape: SO2Shape) -> Tensor:
    """Return s rows, (n_edges, n_rows * c_in), for factors s (n_edges, n_scales)."""
    return moved_scaled(rows, rows, scale, None, shape)


def row_products(left: Tensor, right: Tensor, shape: SO2Shape) -> Tensor:
    """Return the products of rows, summed over +m and -m, (n_edges, n_scales)."""
    result = left.new_empty(len(left), shape.n_scales)
    for block in shape.blocks:
        part = result[:, block.scales]
        torch.mul(left[:, block.inputs[0]], right[:, block.inputs[0]], out=part)
        for columns in block.inputs[1:]:
            part.addcmul_(left[:, columns], right[:, columns])
    return result
