"""The edges of a graph with the frames in which each of them points to +y, as layers see them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atomeq.ops.orders import check_orders
from atomeq.traces import has_values
from atomeq.typing import EdgeIndex, EdgeLengths, EdgeVectors

Side = Literal["source", "target", "both"]


@dataclass(frozen=True)
class EdgeFrame:
    """The edges of one graph with the rotation that takes each of them to +y.

    Built once per forward pass and shared by all layers. ``wigner`` never requires a gradient:
    the derivative with respect to ``vectors`` comes from the torque identity inside
    :func:`~atomeq.ops.edge.operations.rotate_to_edge` and its counterpart, exact as long as what
    happens between the two is equivariant to rotations about the edge.

    Attributes:
        source: Neighbour j of each edge, (n_edges,); no number is beyond the atoms.
        target: Centre i of each edge, (n_edges,); likewise.
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

    def ends(self, side: Side) -> tuple[Tensor, ...]:
        """Return the atoms of a side: the neighbours, the centres, or both in this order."""
        ends = {"source": (self.source,), "target": (self.target,)}
        return ends[side] if side != "both" else (self.source, self.target)

    def truncated(self, mmax: int) -> "EdgeFrame":
        """Return the same frame with the orders up to ``mmax`` alone, the first of its rows."""
        if not 0 <= mmax <= self.mmax:
            check_orders(self.mmax, mmax)  # raises
        n_rows = (2 * mmax + 1) * (self.lmax + 1) - mmax * (mmax + 1)
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

    def segments_for(self, ends: Sequence[Tensor]) -> list[Tensor]:
        """Return the segments of each of some ends."""
        return [part for index in ends for part in self.segments(index)]

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


def checked_edges(edge_index: EdgeIndex, n_sources: int, n_targets: int) -> EdgeIndex:
    """Return the ends of edges as int64, or refuse one that is no atom.

    On a GPU the answer stays there: gather's own assertion ends the process that reads outside,
    and the host does not wait for it. In a trace there is nothing to read yet; the kernels of a
    CPU check again when it runs.

    Args:
        edge_index: (2, n_edges).
        n_sources: Number of atoms that row 0 counts.
        n_targets: Number of atoms that row 1 counts.

    Raises:
        IndexError: If an end is not among the atoms.
        TypeError: If the ends are no whole numbers.
    """
    if edge_index.dtype.is_floating_point or edge_index.dtype == torch.bool:
        raise TypeError(f"edge_index is {edge_index.dtype}; the numbers of atoms are int64")
    edge_index = edge_index.long()
    if not has_values(edge_index) or not edge_index.numel():
        return edge_index
    for row, n_atoms in enumerate((n_sources, n_targets)):
        if edge_index.device.type != "cpu":
            atoms = torch.empty(n_atoms, dtype=torch.uint8, device=edge_index.device)
            atoms.gather(0, edge_index[row])
            continue
        lowest, highest = (int(end) for end in torch.aminmax(edge_index[row]))
        if lowest < 0 or highest >= n_atoms:
            raise IndexError(
                f"row {row} of edge_index names an atom that is not there: {lowest} to {highest}, "
                f"of {n_atoms} atoms"
            )
    return edge_index


def segments_of(index: Tensor, n_atoms: int) -> tuple[Tensor, Tensor]:
    """Return where each atom's edges start in a sorted list (n_atoms + 1,), and that list."""
    order = torch.argsort(index, stable=True)
    starts = torch.arange(n_atoms + 1, device=index.device, dtype=index.dtype)
    return torch.searchsorted(index.index_select(0, order), starts), order
