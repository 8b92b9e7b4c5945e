"""CGENN: Clifford group equivariant neural networks.

Ruhe, Brandstetter and Forré, NeurIPS 2023, arXiv:2305.11141. Features are multivectors of Cl(3, 0):
scalars, vectors, bivectors and trivectors, which linear maps by grade and geometric products of two
features, weighted by path, carry on. Two uses: :class:`CGENNPropagator` carries particles a long
step ahead, :class:`CGENN` gives an energy. ``sharing="quaternion"`` makes GLGENN of either
(Filimoshina and Shirokov, arXiv:2506.09625): in three dimensions its weights are the same, and what
differs is that it has no biases, gates, linear terms and normalisations beside the product.

The reference is DavidRuhe/clifford-group-equivariant-neural-networks, commit 8482b06. What it does,
and our defaults instead:

* positions enter relative to the mean of the whole system, so that a far body changes all; here
  they enter as the vectors of the edges (``centred`` is off);
* the mean over neighbours jumps when one crosses a cutoff; the energy model divides by a constant
  and ends every message in an envelope;
* norms are (q² + 1e-16)^(1/4), a cusp where a feature vanishes; the energy model's have a floor
  of 1;
* the weighted product is a dense table of 512 entries, made anew in each call; here it is its 64
  non-zero terms (:func:`~atomeq.ops.clifford.operations.geometric_product`);
* forward casts to float32; here dtypes are kept.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import InvariantReadout, Propagator, refuse_nonpositive
from atomeq.nn.clifford import GeometricBlock, GradeLinear, grade_linear, grade_sizes
from atomeq.nn.mlp import MLP
from atomeq.nn.radial import BesselBasis, PolynomialEnvelope
from atomeq.ops.clifford.algebra import Sharing
from atomeq.ops.segment.operations import segment_mean, segment_sum
from atomeq.typing import EdgeIndex, Positions

SIGNATURE = (3, 0)
_VECTOR = slice(1, 4)  # its rows among the eight blades


class CGENNPropagator(Propagator):
    """Carries particles a long step ahead: positions and a vector of the last features.

    Args:
        n_inputs: Scalars of a particle.
        n_edge_features: Scalars of an edge.
        hidden_channels: Multivectors of a particle and of a message.
        num_layers: Message-passing layers.
        num_blocks: Blocks of the two networks of a layer.
        sharing: ``quaternion`` for GLGENN.
        centred: As published, particles have their position relative to the mean of itself and its
            neighbours, in a complete graph that of the system; else edges have their vectors.
    """

    gives_velocities = False

    def __init__(
        self,
        n_inputs: int = 1,
        n_edge_features: int = 2,
        *,
        hidden_channels: int = 28,
        num_layers: int = 3,
        num_blocks: int = 2,
        sharing: Sharing = "grade",
        centred: bool = False,
    ) -> None:
        super().__init__()
        self.keep_arguments(locals())
        self.centred = centred
        bias = sharing == "grade"
        n_vectors = 2 if centred else 1
        self.embedding = GradeLinear(
            SIGNATURE, n_inputs + n_vectors, hidden_channels, by_grade=False, bias=bias
        )
        n_pair = n_edge_features + (0 if centred else 1)
        self.layers = nn.ModuleList(
            CliffordLayer(hidden_channels, n_pair, num_blocks=num_blocks, sharing=sharing)
            for _ in range(num_layers)
        )
        self.projection = GradeLinear(SIGNATURE, hidden_channels, 1, bias=bias)

    def forward(
        self,
        pos: Positions,
        velocities: Tensor,
        node_features: Tensor,
        edge_features: Tensor,
        edge_index: EdgeIndex,
    ) -> tuple[Positions, None]:
        """Return positions (n_atoms, 3) a time ahead, and None for the velocities."""
        h = self.multivectors(pos, velocities, node_features, edge_features, edge_index)
        return pos + h[:, _VECTOR, 0], None

    def multivectors(
        self,
        pos: Positions,
        velocities: Tensor,
        node_features: Tensor,
        edge_features: Tensor,
        edge_index: EdgeIndex,
    ) -> Tensor:
        """Return the last features of the particles, (n_atoms, 8, 1)."""
        source, target = edge_index
        vectors, of_pairs = [velocities], []
        if self.centred:
            neighbours = segment_sum(pos.index_select(0, source), target, len(pos))
            ones = pos.new_ones(len(target), 1)
            counts = 1.0 + segment_sum(ones, target, len(pos))
            vectors.insert(0, pos - (pos + neighbours) / counts)
        else:
            of_pairs.append(pos.index_select(0, target) - pos.index_select(0, source))
        h = self.embedding(multivectors(node_features, vectors))  # (n_atoms, 8, C)
        pairs = multivectors(edge_features, of_pairs)
        for layer in self.layers:
            h = h + layer(h, pairs, edge_index)
        return self.projection(h)


def multivectors(scalars: Tensor, vectors: list[Tensor]) -> Tensor:
    """Return scalars (n, C) and vectors (n, 3) each, as channels of multivectors, (n, 8, C + V)."""
    n, n_scalars = scalars.shape
    rows = scalars.new_zeros(n, 8, n_scalars + len(vectors))
    rows = torch.cat([scalars[:, None, :], rows[:, 1:, :n_scalars]], dim=1)
    if not vectors:
        return rows
    of_vectors = nn.functional.pad(torch.stack(vectors, dim=2), (0, 0, 1, 4))
    return torch.cat([rows, of_vectors], dim=2)


class CliffordLayer(nn.Module):
    """A network of the pair [h_i - h_j, e_ij], and one of the atom and the mean of its messages.

    Args:
        channels: Multivectors of atoms and messages.
        n_pair: Multivectors of a pair.
        num_blocks: Blocks of each network.
        sharing: ``quaternion`` for GLGENN.
        floor: Of the roots of the quadratic forms.
    """

    def __init__(
        self,
        channels: int,
        n_pair: int,
        *,
        num_blocks: int = 2,
        sharing: Sharing = "grade",
        floor: float = 1e-16,
    ) -> None:
        super().__init__()
        self.first = GradeLinear(SIGNATURE, channels + n_pair, channels, bias=sharing == "grade")

        def network(first: int | None) -> nn.Sequential:
            widths = [first, *[channels] * (num_blocks - 1)]
            return nn.Sequential(
                *(
                    GeometricBlock(SIGNATURE, channels, n_in, sharing=sharing, floor=floor)
                    for n_in in widths
                )
            )

        self.message = network(None)  # its first map is made of atoms and pairs apart
        self.update = network(2 * channels)

    def messages(self, h: Tensor, pairs: Tensor, edge_index: EdgeIndex) -> Tensor:
        """Return the messages of the edges, (n_edges, 8, C).

        Args:
            h: Atoms, (n_atoms, 8, C).
            pairs: Of the edges, (n_edges, 8, n_pair).
            edge_index: Row 0 is j, row 1 is i.
        """
        source, target = edge_index
        sizes, weight = grade_sizes(SIGNATURE), self.first.weight
        of_atoms, of_pairs = weight.split([h.shape[2], pairs.shape[2]], dim=1)
        # The first map is linear in h_i - h_j: it is made of atoms, of which there are fewer.
        h = grade_linear(h, of_atoms, None, sizes)
        difference = h.index_select(0, target) - h.index_select(0, source)
        return self.message(difference + grade_linear(pairs, of_pairs, self.first.bias, sizes))

    def forward(self, h: Tensor, pairs: Tensor, edge_index: EdgeIndex) -> Tensor:
        """Return what the atoms change by, (n_atoms, 8, C)."""
        mean = segment_mean(self.messages(h, pairs, edge_index), edge_index[1], len(h))
        return self.update(torch.cat([h, mean], dim=2))


class CGENN(InvariantReadout):
    """An energy from the scalars of multivector features, with conservative forces.

    Args:
        cutoff: Radius of the graph, Å.
        num_layers: Message-passing layers.
        hidden_channels: Multivectors of an atom and of a message.
        num_blocks: Blocks of the two networks of a layer.
        num_radial: Bessel functions of the edge length; each is a scalar and, along the edge, a
            vector of the pair.
        sharing: ``quaternion`` for GLGENN.
        avg_num_neighbors: Sums over neighbours are divided by its square root.
        num_elements: Atomic numbers below this are embedded.
    """

    def __init__(
        self,
        cutoff: float = 5.0,
        *,
        num_layers: int = 3,
        hidden_channels: int = 32,
        num_blocks: int = 1,
        num_radial: int = 8,
        sharing: Sharing = "grade",
        avg_num_neighbors: float = 20.0,
        num_elements: int = 119,
    ) -> None:
        super().__init__()
        self.keep_arguments(locals())
        self.receptive_depth = num_layers
        refuse_nonpositive(avg_num_neighbors=avg_num_neighbors)
        self.hidden_channels = hidden_channels
        self.avg_num_neighbors = avg_num_neighbors
        self.embedding = nn.Embedding(num_elements, hidden_channels)
        self.basis = BesselBasis(num_radial, cutoff)
        self.envelope = PolynomialEnvelope(cutoff)
        self.layers = nn.ModuleList(
            CliffordLayer(
                hidden_channels, num_radial, num_blocks=num_blocks, sharing=sharing, floor=1.0
            )
            for _ in range(num_layers)
        )
        self.energy = MLP((hidden_channels, hidden_channels, 1), zero_output=True)

    def node_features(self, graph: AtomGraph) -> Tensor:
        """Return the scalars of the atoms after the last layer, (n_atoms, hidden_channels)."""
        vectors = graph.edge_vectors().to(self.dtype)  # (n_edges, 3)
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        basis = self.basis(lengths)  # (n_edges, num_radial)
        directions = vectors / lengths[:, None]
        pairs = nn.functional.pad(directions, (0, 4))[:, :, None] * basis[:, None, :]
        pairs = torch.cat([basis[:, None, :], pairs], dim=1)  # (n_edges, 8, num_radial)
        envelope = self.envelope(lengths)[:, None, None] / math.sqrt(self.avg_num_neighbors)

        atoms = self.with_state(self.embedding(graph.atomic_numbers), graph)  # (n_atoms, C)
        h = nn.functional.pad(atoms[:, None, :], (0, 0, 0, 7))  # (n_atoms, 8, C)
        for layer in self.layers:
            layer = cast(CliffordLayer, layer)
            messages = layer.messages(h, pairs, graph.edge_index) * envelope
            total = segment_sum(messages, graph.edge_index[1], graph.n_atoms)
            h = h + layer.update(torch.cat([h, total], dim=2))
        return h[:, 0]
