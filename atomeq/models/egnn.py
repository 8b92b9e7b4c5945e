"""EGNN: E(n) Equivariant Graph Neural Networks.

Satorras, Hoogeboom and Welling, ICML 2021, arXiv:2102.09844. Messages are functions of invariants
of a pair; positions move along the directions to the neighbours, and invariants of the moved
positions feed the next layer.

This is our default form, an energy potential. It differs from the paper on purpose:

* neighbours are those within a cutoff, and every message ends in a polynomial envelope, so the
  energy is smooth and extensive; the published QM9 model sends messages between all pairs;
* distances enter through a Bessel basis, beside the squared distances of the moved positions;
* positions are moved by displacements, which leaves the edge vectors of a crystal well defined;
* sums are divided by a constant, the root of a typical neighbour count, never by the count itself,
  which would make the energy jump when an atom crosses the cutoff.
"""

import math

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import InvariantReadout, refuse_nonpositive
from atomeq.nn.mlp import MLP
from atomeq.nn.pair_mlp import PairMLP
from atomeq.nn.radial import BesselBasis, PolynomialEnvelope
from atomeq.ops.segment.operations import segment_sum
from atomeq.typing import EdgeIndex, EdgeVectors


class EGNN(InvariantReadout):
    """E(n)-equivariant network with conservative forces.

    Args:
        cutoff: Radius of the graph, Å.
        num_layers: Message-passing layers.
        hidden_channels: Channels of atoms and messages.
        num_radial: Bessel functions of the edge length.
        attention: Weigh each message by a sigmoid of itself (eq. 8).
        avg_num_neighbors: Sums over neighbours are divided by its square root.
        num_elements: Atomic numbers below this are embedded.
    """

    def __init__(
        self,
        cutoff: float = 5.0,
        *,
        num_layers: int = 4,
        hidden_channels: int = 128,
        num_radial: int = 16,
        attention: bool = True,
        avg_num_neighbors: float = 20.0,
        num_elements: int = 119,
    ) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.num_layers = self.receptive_depth = num_layers
        self.hidden_channels = hidden_channels
        self.num_radial = num_radial
        self.attention = attention
        refuse_nonpositive(avg_num_neighbors=avg_num_neighbors)
        self.avg_num_neighbors = avg_num_neighbors
        self.num_elements = num_elements

        self.embedding = nn.Embedding(num_elements, hidden_channels)
        self.basis = BesselBasis(num_radial, cutoff)
        self.envelope = PolynomialEnvelope(cutoff)
        self.layers = nn.ModuleList(
            EGNNLayer(hidden_channels, num_radial + 1, attention=attention)
            for _ in range(num_layers)
        )
        # No layer follows that would see the last move. Its weights stay, as older potentials have
        # them, but are not trained: distributed training waits for every gradient it was promised.
        self.layers[-1].get_submodule("shift").requires_grad_(False)
        self.energy = MLP((hidden_channels, hidden_channels, 1), zero_output=True)

    def node_features(self, graph: AtomGraph) -> Tensor:
        """Return the atoms after the last layer, (n_atoms, hidden_channels)."""
        source, target = graph.edge_index
        vectors = graph.edge_vectors().to(self.dtype)  # (n_edges, 3)
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        basis = self.basis(lengths)
        envelope = self.envelope(lengths)[:, None] / math.sqrt(self.avg_num_neighbors)

        h = self.with_state(self.embedding(graph.atomic_numbers), graph)  # (n_atoms, C)
        moved = vectors.new_zeros(graph.n_atoms, 3)
        for number, layer in enumerate(self.layers, start=1):
            assert isinstance(layer, EGNNLayer)
            separation = vectors + moved.index_select(0, source) - moved.index_select(0, target)
            squared = (separation * separation).sum(dim=1, keepdim=True)  # (n_edges, 1)
            invariants = torch.cat([basis, squared / self.cutoff**2], dim=1)
            m = layer.messages(h, invariants, envelope, graph.edge_index)  # (n_edges, C)
            if number < self.num_layers:
                pull = layer.pull(m, separation, squared, envelope)  # (n_edges, 3)
                moved = moved + segment_sum(pull, target, graph.n_atoms)  # eq. 4
            h = layer(h, m, target)
        return h


class EGNNLayer(nn.Module):
    """One equivariant graph convolution (eqs. 3-6), residual in atoms and in displacements."""

    def __init__(self, channels: int, n_invariants: int, *, attention: bool) -> None:
        super().__init__()
        self.message = PairMLP(channels, n_invariants)
        self.attention = nn.Linear(channels, 1) if attention else None
        final = nn.Linear(channels, 1)
        self.shift = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), final)
        self.update = MLP((2 * channels, channels, channels))
        # As published: positions start to move by little, or deep stacks are unstable.
        nn.init.xavier_uniform_(final.weight, gain=1e-3)
        nn.init.zeros_(final.bias)

    def messages(
        self, h: Tensor, invariants: Tensor, envelope: Tensor, edge_index: EdgeIndex
    ) -> Tensor:
        """Return the messages between atoms ``h`` (n_atoms, C), (n_edges, C); eqs. 3 and 8."""
        m = self.message(h, invariants, edge_index)
        # Numbers of an edge are multiplied with one another first: each product with all of its
        # channels is one more pass through memory, and another when it is differentiated.
        weight = envelope
        if self.attention is not None:
            weight = torch.sigmoid(self.attention(m)) * envelope
        return m * weight

    def pull(
        self, m: Tensor, separation: EdgeVectors, squared: Tensor, envelope: Tensor
    ) -> EdgeVectors:
        """Return how far messages ``m`` (n_edges, C) move their targets, (n_edges, 3), Å."""
        # The envelope is applied once more: φ_x has biases, and its output must end at the cutoff.
        return separation * (self.shift(m) * envelope * torch.rsqrt(squared + 1.0))

    def forward(self, h: Tensor, m: Tensor, target: Tensor) -> Tensor:
        """Return atoms ``h`` (n_atoms, C) updated by messages ``m`` (n_edges, C); eqs. 5 and 6."""
        total = segment_sum(m, target, h.shape[0])
        return h + self.update(torch.cat([h, total], dim=1))
