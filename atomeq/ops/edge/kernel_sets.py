"""Kernel sets: raw functions, tensors in and tensors out, that the registered operations call.

A set knows nothing of autograd. It is named by a string, since that is what an operation of a
traced graph can carry, and found here when first asked for. A set need not have every topic.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor

from atomeq.ops.edge.radial_scale import RadialScale
from atomeq.ops.edge.so2_shape import SO2Shape
from atomeq.ops.tables import constant_in_traces

if TYPE_CHECKING:  # which imports this module
    from atomeq.ops.edge.layer import EdgeLayer

KERNELS: dict[str, str] = {
    "cpu": "atomeq.ops.edge.cpu.kernels:CPUEdgeKernels",
    "triton": "atomeq.ops.edge.triton.kernels:TritonEdgeKernels",
}


class SO2Map(Protocol):
    """A linear map of an edge's rows, one matrix for each order; see :class:`SO2Shape`."""

    def forward(self, rows: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
        """Write M rows, (n_edges, n_rows * c_in) -> (n_edges, width), to ``out``; return it.

        The bias, if there is one, belongs to the first of the outputs, those of m = 0.
        """
        ...

    def gated(self, rows: Tensor, out: Tensor, *, keep: bool) -> Tensor:
        """Write y = M rows to ``out``; return SiLU of l = 0 and gated rows of l > 0, a(y).

        The extra outputs are the gates. Unless ``keep``, whatever of y is not needed may stay
        unwritten. What is returned may have the precision of a product's operands.
        """
        ...

    def transposed(self, grad: Tensor, out: Tensor) -> Tensor:
        """Write M^T grad, (n_edges, width) -> (n_edges, n_rows * c_in), to ``out``; return it."""
        ...


class GateKernel(Protocol):
    """SiLU on l = 0, sigmoid gates on l > 0: value a(y), Jacobian J and second derivative."""

    def value(self) -> Tensor:
        """Return a, (n_edges, n_rows * channels)."""
        ...

    def gradient(self, grad: Tensor) -> Tensor:
        """Return J^T grad, like y."""
        ...

    def second(self, moved: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return J moved, like a, and the gradient of <moved, J^T grad> in y, like y."""
        ...


class LayerKernel(Protocol):
    """A whole edge layer at once, as :mod:`atomeq.ops.edge.layer` has it in blocks."""

    def value(self, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums on the atoms, and y and u if they are to be kept."""
        ...

    def gradient(
        self, grad: Tensor, kept: list[Tensor], wanted: set[str]
    ) -> dict[str, Tensor] | None:
        """Return dE/de of the wanted inputs, or None where that is for the blocks to do."""
        ...


class EdgeKernels(Protocol):
    """Rotation of features into and out of the edge frames, for one kernel set.

    ``wigner`` (n_edges, n_rows, n_sph) holds the rows |m| <= mmax of each edge's rotation W in
    m-primary order, block diagonal in l; multiplied by an infinitesimal rotation from the right it
    is still that. G x joins the atoms at ``indices`` along the channels: S indices make rows of
    S * channels; no index means that x belongs to the edges already. ``segments`` holds, for each
    index, the start of every atom's edges in a sorted list (n_atoms + 1,) and that list (n_edges,);
    it is empty unless ``wants_segments``.
    """

    wants_segments: bool

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
        """Return scale * W G x, (n_edges, n_rows, S * channels).

        ``scale`` (n_edges, sum over m of (lmax - m + 1) * S * channels) has m ascending; +m and -m
        share theirs. An ``operand`` is read by a map alone and may have the precision of those.
        """
        ...

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
        """Return G^T W^T (factor * rows), (n_atoms, n_sph, channels).

        ``factor`` is (n_edges,). Without indices the result is (n_edges, n_sph, channels). With
        ``total`` the result is added to it.
        """
        ...

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
        """Return <W^T rows, X_k G x> for the three generators X_k, (n_edges, 3)."""
        ...

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
        """Give the gradients of <grad, scale * W G x>; grad, (n_edges, n_rows * c_in), may change.

        That of the scale is written, (n_edges, n_scales), that of x added to ``to_x``, that of a
        turn, which is a torque, written, (n_edges, 3); None where it is not wanted. Without scale
        the factors are 1.
        """
        ...

    def empty(self, size: tuple[int, ...], like: Tensor) -> Tensor:
        """Return memory for results that come and go."""
        ...

    def so2_map(self, weights: list[Tensor], shape: SO2Shape) -> SO2Map:
        """Return the map M of some weights, which may be prepared for many calls."""
        ...

    def add_weight_gradients(
        self, rows: Tensor, grad: Tensor, into: list[Tensor], shape: SO2Shape
    ) -> None:
        """Add the gradients of <grad, M rows> with respect to the weights to ``into``."""
        ...

    def scaled_rows(self, rows: Tensor, scale: Tensor, shape: SO2Shape) -> Tensor:
        """Return s rows, (n_edges, n_rows * c_in), for factors s (n_edges, n_scales)."""
        ...

    def row_products(self, left: Tensor, right: Tensor, shape: SO2Shape) -> Tensor:
        """Return the products of rows, summed over +m and -m, (n_edges, n_scales)."""
        ...

    def gate(self, y: Tensor, lmax: int, mmax: int, channels: int) -> GateKernel:
        """Return the gate of edges, (n_edges, lmax * channels + n_rows * channels).

        The gates of l = 1..lmax come first, then the rows.
        """
        ...

    def radial_scale(self, scale: Tensor, shape: SO2Shape) -> RadialScale:
        """Return the factors of the first map's inputs, (n_edges, n_scales)."""
        ...

    def edges_at_once(self, first: SO2Shape) -> int:
        """Return how many edges a layer works on at a time."""
        ...

    def whole_layer(self, layer: "EdgeLayer") -> LayerKernel | None:
        """Return a kernel for all of a layer, or None where it goes block by block."""
        ...


@constant_in_traces
def wants_segments(name: str) -> bool:
    """Return whether the kernels of a set want sorted edges; a constant of a traced graph."""
    return edge_kernels(name).wants_segments


@cache
def edge_kernels(name: str) -> EdgeKernels:
    """Return the edge kernels of a set, importing them when first asked for."""
    module, _, attribute = KERNELS[name].partition(":")
    return cast(EdgeKernels, getattr(import_module(module), attribute)())
