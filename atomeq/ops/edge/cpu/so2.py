"""The matrix products of SO(2) maps by the C kernel, or in plain torch where there is none.

A complex product costs three real ones: with s = x_+ + x_-,

    y_+ = W_1 s - (W_1 + W_2) x_-,    y_- = W_1 s + (W_2 - W_1) x_+.
"""

from functools import cached_property

import torch
from torch import Tensor

from atomeq.ops.edge.cpu import memory, native_edge, native_so2
from atomeq.ops.edge.cpu.gate import CPUGate
from atomeq.ops.edge.so2_shape import SO2Shape


class CPUSO2Map:
    """See :class:`~atomeq.ops.edge.kernel_sets.SO2Map`."""

    def __init__(self, weights: list[Tensor], shape: SO2Shape) -> None:
        self.shape = shape
        self.weights = weights
        self.native = native_edge.serves(weights[0])

    def forward(self, rows: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
        """Write M rows + bias to ``out``."""
        if self.native:
            self._packed.multiply(rows, out)
        else:
            self._forward(rows, out)
        if bias is not None:
            out[:, : len(bias)] += bias
        return out

    def gated(self, rows: Tensor, out: Tensor, *, keep: bool) -> Tensor:
        """Write y = M rows to ``out``; return a(y)."""
        shape = self.shape
        return CPUGate(self.forward(rows, out), shape.lmax, shape.mmax, shape.c_out).value()

    def transposed(self, grad: Tensor, out: Tensor) -> Tensor:
        """Write M^T grad to ``out``."""
        if self.native:
            return self._packed_transposed.multiply(grad, out)
        return self._transposed(grad, out)

    @cached_property
    def _packed(self) -> native_so2.PackedMap:
        return native_so2.PackedMap(self.weights, self.shape, transposed=False)

    @cached_property
    def _packed_transposed(self) -> native_so2.PackedMap:
        return native_so2.PackedMap(self.weights, self.shape, transposed=True)

    @cached_property
    def _parts(self) -> list[tuple[Tensor, Tensor, Tensor] | None]:
        return [_complex_parts(weight) for weight in self.weights]

    def _forward(self, rows: Tensor, out: Tensor) -> None:
        for block, weight, parts in zip(self.shape.blocks, self.weights, self._parts, strict=True):
            inputs = [rows[:, columns] for columns in block.inputs]
            outputs = [out[:, columns] for columns in block.outputs]
            if parts is None:
                for x, y in zip(inputs, outputs, strict=True):
                    torch.mm(x, weight.T, out=y)
            else:
                _complex_product(inputs, [part.T for part in parts], outputs)

    def _transposed(self, grad: Tensor, out: Tensor) -> Tensor:
        for block, weight, parts in zip(self.shape.blocks, self.weights, self._parts, strict=True):
            inputs = [out[:, columns] for columns in block.inputs]
            outputs = [grad[:, columns] for columns in block.outputs]
            if parts is None:
                for x, y in zip(inputs, outputs, strict=True):
                    torch.mm(y, weight, out=x)
            else:  # W_2 changes its sign: the sum and the difference change places
                real, total, difference = parts
                _complex_product(outputs, [real, difference, total], inputs, sign=-1)
        return out


def add_weight_gradients(rows: Tensor, grad: Tensor, into: list[Tensor], shape: SO2Shape) -> None:
    """Add grad rows^T, order by order, to the gradients of the weights."""
    if native_edge.serves(rows):
        native_so2.add_weight_gradients(rows, grad, into, shape)
        return
    for block, gradient in zip(shape.blocks, into, strict=True):
        inputs = [rows[:, columns] for columns in block.inputs]
        outputs = [grad[:, columns] for columns in block.outputs]
        if gradient.ndim == 2:
            for x, y in zip(inputs, outputs, strict=True):
                gradient.addmm_(y.T, x)
        else:
            _add_complex_gradient(inputs, outputs, gradient)


def _complex_parts(weight: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    if weight.ndim == 2:
        return None
    real, imaginary = weight.unbind(0)
    return real, _sum(real, imaginary), _difference(imaginary, real)


def _complex_product(x: list[Tensor], parts: list[Tensor], y: list[Tensor], sign: int = 1) -> None:
    real, total, difference = parts
    torch.mm(_sum(*x), real, out=y[0])
    y[1].copy_(y[0])
    y[0].addmm_(x[1], total, alpha=-sign)
    y[1].addmm_(x[0], difference, alpha=sign)


def _add_complex_gradient(x: list[Tensor], y: list[Tensor], gradient: Tensor) -> None:
    """(y_+ + i y_-)(x_+ - i x_-)^T by three products."""
    common = torch.mm(_sum(*y).T, x[0], out=memory.empty(gradient[0].shape, gradient))
    gradient[0].add_(common).addmm_(y[1].T, _difference(*x), alpha=-1)
    gradient[1].add_(common).addmm_(y[0].T, _sum(*x), alpha=-1)


def _sum(x: Tensor, y: Tensor) -> Tensor:
    return torch.add(x, y, out=memory.empty(x.shape, x))


def _difference(x: Tensor, y: Tensor) -> Tensor:
    return torch.sub(x, y, out=memory.empty(x.shape, x))
