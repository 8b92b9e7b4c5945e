"""The edges of a graph with the frames in which each of them points to +y, as layers see them."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atomeq.ops.orders import check_orders, m_primary_order
from atomeq.typing import EdgeLengths, EdgeVectors


@dataclass(frozen=True)
class EdgeFrame:
    """The edges of one graph with the rotation that takes each of them to +y.

    Built once per forward pass and shared by all layers. ``wigner`` never requires a gradient:
    the derivative with respect to ``vectors`` comes from the torque identity inside
    :func:`~atomeq.ops.so2.rotate_to_edge` and :func:`~atomeq.ops.so2.rotate_from_edge`, exact
    as long as what happens between the two is equivariant to rotations about the edge.

    Attributes:
        source: Neighbour j of each edge, (n_edges,).
        target: Centre i of each edge, (n_edges,).
        vectors: r_j - r_i, (n_edges, 3), Å; carries the gradient.
        lengths: (n_edges,), Å; carries the gradient.
        wigner: Rows |m| <= mmax in m-primary order, (n_edges, n_rows, n_sph); detached.
        n_atoms: Number of atoms the edges connect.
        lmax: Highest degree.
        mmax: Highest order kept in the edge frame.
    """

    source: Int[Tensor, " n_edges"]
    target: Int[Tensor, " n_edges"]
    vectors: EdgeVectors
    lengths: EdgeLengths
    wigner: Float[Tensor, "n_edges n_rows n_sph"]
    n_atoms: int
    lmax: int
    mmax: int

    def truncated(self, mmax: int) -> "EdgeFrame":
        """Return the same frame with the orders up to ``mmax`` alone, the first of its rows."""
        check_orders(self.mmax, mmax)
        n_rows = len(m_primary_order(self.lmax, mmax))
        return replace(self, wigner=self.wigner[:, :n_rows], mmax=mmax)

    def segments(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return where each atom's edges start in a sorted list, and that list of edges.

        Args:
            index: ``source`` or ``target`` of this frame; sorted once for all layers.

        Returns:
            (n_atoms + 1,) and (n_edges,).
        """
        if torch.compiler.is_compiling():  # a trace merges what is computed twice
            return segments_of(index, self.n_atoms)
        return self._by_source if index is self.source else self._by_target

    @cached_property
    def _by_source(self) -> tuple[Tensor, Tensor]:
        return segments_of(self.source, self.n_atoms)

    @cached_property
    def _by_target(self) -> tuple[Tensor, Tensor]:
        return segments_of(self.target, self.n_atoms)

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return self.vectors.shape[0]


def segments_of(index: Tensor, n_atoms: int) -> tuple[Tensor, Tensor]:
    """Return where each atom's edges start in a sorted list (n_atoms + 1,), and that list."""
    order = torch.argsort(index, stable=True)
    starts = torch.arange(n_atoms + 1, device=index.device, dtype=index.dtype)
    return torch.searchsorted(index.index_select(0, order), starts), order
