"""Geometric algebra attention: an energy from products of the vectors to an atom's neighbours.

Spellings, arXiv:2110.02393 (Geometric algebra attention networks for small point clouds). The
points of a cloud are multiplied in Cl(3, 0); invariants of the products of all tuples of points
make values, and a softmax of scores of these weighs the sums. The published layers and the
potential of its notebook stand beside their golden cases (tests/golden/published); there the cloud
of an atom is the whole molecule. This is our default form, an atom's edges being its cloud:

* the softmax is over tuples of neighbours within the cutoff, weighed by their envelopes, with an
  empty seat: what it gives is smooth where a neighbour leaves, and separate fragments are additive;
* forces are minus the gradient (the notebook's have the other sign), and no normalisation is
  detached from it (there the gradient is off by half of its largest value);
* norms have a floor under the root, and of trivectors the size counts, not the sign: the network is
  smooth where neighbours are in line and exact in mirrors (as published, vector attention of rank 3
  changes by 1e-3 of its value in a mirror).

A tuple of ``rank`` edges costs as much as an edge elsewhere; an atom has (neighbours)^rank of them.
"""

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import InvariantReadout
from atomeq.nn.attention import smooth_softmax
from atomeq.nn.mlp import MLP
from atomeq.nn.multivector_attention import invariants_of, products_of
from atomeq.nn.radial import BesselBasis, PolynomialEnvelope
from atomeq.ops.segment.operations import segment_sum

_FLOOR = 1e-2  # of squared norms, which are near one: lengths are in cutoffs


class GeometricAlgebraAttention(InvariantReadout):
    """Attention over tuples of an atom's neighbours, with conservative forces.

    Args:
        cutoff: Radius of the graph, Å.
        num_layers: Blocks that update the multivectors and features of edges.
        hidden_channels: Channels of edges and atoms.
        rank: Edges in a tuple, 2 or 3.
        num_radial: Bessel functions of the edge length.
        num_elements: Atomic numbers below this are embedded.

    Raises:
        ValueError: A rank of less than 2.
    """

    recordable = False  # how many tuples there are depends on the edges

    def __init__(
        self,
        cutoff: float = 4.0,
        *,
        num_layers: int = 2,
        hidden_channels: int = 32,
        rank: int = 2,
        num_radial: int = 8,
        num_elements: int = 119,
    ) -> None:
        super().__init__()
        self.keep_arguments(locals())
        self.receptive_depth = 1  # edges of an atom know of no other atom's
        if rank < 2:
            raise ValueError(f"rank {rank}: a tuple has two edges or more")
        self.cutoff = cutoff
        self.hidden_channels = hidden_channels
        self.rank = rank
        self.embedding = nn.Embedding(num_elements, hidden_channels)
        self.basis = BesselBasis(num_radial, cutoff)
        self.envelope = PolynomialEnvelope(cutoff)
        self.up_project = nn.Linear(2 * hidden_channels + num_radial, hidden_channels)
        self.layers = nn.ModuleList(
            TupleAttention(hidden_channels, rank, covariant=True) for _ in range(num_layers)
        )
        self.updates = nn.ModuleList(
            MLP((hidden_channels, 2 * hidden_channels, hidden_channels)) for _ in range(num_layers)
        )
        self.reduction = TupleAttention(hidden_channels, rank)
        self.mix = MLP((2 * hidden_channels, hidden_channels, hidden_channels))
        self.energy = MLP((hidden_channels, hidden_channels, 1), zero_output=True)

    def node_features(self, graph: AtomGraph) -> Tensor:
        """Return the atoms with the sums over their tuples, (n_atoms, hidden_channels)."""
        source, target = graph.edge_index
        vectors = graph.edge_vectors().to(self.dtype)  # (n_edges, 3)
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        envelope = self.envelope(lengths)
        relative = nn.functional.pad(vectors / self.cutoff, (1, 4))  # (n_edges, 8)
        atoms = self.with_state(self.embedding(graph.atomic_numbers), graph)
        own, other = atoms.index_select(0, target), atoms.index_select(0, source)
        pair = torch.cat([other + own, other - own, self.basis(lengths)], dim=1)
        v = self.up_project(pair)  # (n_edges, C)

        tuples = edge_tuples(target, graph.n_atoms, self.rank)
        others = torch.stack([envelope.index_select(0, t) for t in tuples[1:]]).prod(dim=0)
        r = relative
        for layer, update in zip(self.layers, self.updates, strict=True):
            turned, total = layer(r, v, tuples, tuples[0], others, len(target))
            r = turned + r + relative
            v = update(total) + v
        of_tuple = others * envelope.index_select(0, tuples[0])
        atom = target.index_select(0, tuples[0])
        _, total = self.reduction(r, v, tuples, atom, of_tuple, graph.n_atoms)
        return atoms + self.mix(torch.cat([atoms, total], dim=1))


class TupleAttention(nn.Module):
    """Sums over tuples of values and, with ``covariant``, of products of their multivectors.

    Args:
        channels: Of edges.
        rank: Edges in a tuple.
        covariant: Whether multivectors are summed.
    """

    def __init__(self, channels: int, rank: int, *, covariant: bool = False) -> None:
        super().__init__()
        self.value = MLP((4 * rank, 2 * channels, channels))
        self.score = MLP((channels, 2 * channels, 1))
        self.scale = MLP((channels, 2 * channels, rank)) if covariant else None

    def forward(
        self,
        r: Tensor,
        v: Tensor,
        tuples: list[Tensor],
        index: Tensor,
        envelope: Tensor,
        n_segments: int,
    ) -> tuple[Tensor, Tensor]:
        """Return multivectors (n_segments, 8), or what came in, and features (n_segments, C).

        Args:
            r: Multivectors of the edges, (n_edges, 8).
            v: Features of the edges, (n_edges, C).
            tuples: Edges in each place of a tuple, (n_tuples,) each.
            index: What each tuple is summed to.
            envelope: Of each tuple, (n_tuples,).
            n_segments: Of the sums.
        """
        points = [r.index_select(0, edge) for edge in tuples]
        products = products_of(points, "partial")
        invariants = [invariants_of(p, n, vector=False, floor=_FLOOR) for p, n in products]
        merged = torch.stack([v.index_select(0, edge) for edge in tuples]).mean(dim=0)
        value = self.value(torch.cat(invariants, dim=1)) + merged  # (n_tuples, C)
        weights = smooth_softmax(self.score(value), envelope, index, n_segments)
        total = segment_sum(weights * value, index, n_segments)
        if self.scale is None:
            return r, total
        stacked = torch.stack([product for product, _ in products], dim=2)  # (n_tuples, 8, rank)
        mixed = (stacked * self.scale(value)[:, None, :]).sum(dim=2)
        return segment_sum(weights * mixed, index, n_segments), total


def edge_tuples(target: Tensor, n_atoms: int, rank: int) -> list[Tensor]:
    """Return all tuples of edges with one target, an edge with itself too.

    Args:
        target: Of each edge, (n_edges,).
        n_atoms: Number of atoms.
        rank: Edges in a tuple.

    Returns:
        The edges in each place, (n_tuples,) each.
    """
    order = target.argsort(stable=True)
    atoms = torch.arange(n_atoms, device=target.device)
    starts, stops = (torch.searchsorted(target[order], atoms, right=end) for end in (False, True))
    tuples = [torch.arange(len(target), device=target.device)]
    for _ in range(rank - 1):
        atom = target[tuples[0]]
        ends = (stops - starts)[atom].cumsum(0)
        n_tuples = int(ends[-1]) if len(ends) else 0  # the one question to a device
        number = torch.arange(n_tuples, device=target.device)
        of = torch.searchsorted(ends, number, right=True)  # the tuple that this one extends
        first = starts[atom] - ends + (stops - starts)[atom]
        partner = order[number + first[of]]
        tuples = [*(edge[of] for edge in tuples), partner]
    return tuples
