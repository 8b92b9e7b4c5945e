"""The edges of a graph with the frames in which each of them points to +y, as layers see them."""

from dataclasses import dataclass, replace

from jaxtyping import Float, Int
from torch import Tensor

from atomeq.ops.orders import check_orders, m_primary_order
from atomeq.typing import EdgeLengths, EdgeVectors


@dataclass(frozen=True, slots=True)
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

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return self.vectors.shape[0]
