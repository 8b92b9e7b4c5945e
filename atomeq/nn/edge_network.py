"""Networks of the edge: what they see of its length and its elements, and the degree embedding."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atomeq.nn.pair_mlp import PairFeatures, Pairs, RadialMLP, TabulatedPairs
from atomeq.ops.edge.frame import EdgeFrame
from atomeq.ops.edge.operations import rotate_from_edge
from atomeq.ops.tables import constant_table, table_like
from atomeq.typing import AtomicNumbers, NodeFeatures


@dataclass(frozen=True, slots=True)
class EdgeScalars:
    """What the networks of the edge length see.

    Attributes:
        features: The radial basis of the pair, and of its atoms what all networks share.
        atomic_numbers: Of which a network makes its own features, (n_atoms,).
        envelope: Goes to zero at the cutoff, (n_edges,); None leaves the cutoff sharp.
    """

    features: Pairs
    atomic_numbers: AtomicNumbers
    envelope: Tensor | None


class ElementPair(nn.Module):
    """Embeddings of the elements at both ends of an edge."""

    def __init__(self, num_elements: int, channels: int) -> None:
        super().__init__()
        self.source = nn.Embedding(num_elements, channels)
        self.target = nn.Embedding(num_elements, channels)
        for embedding in (self.source, self.target):
            nn.init.uniform_(embedding.weight, -0.001, 0.001)  # first of all, distance decides

    def forward(self, numbers: AtomicNumbers) -> tuple[Tensor, Tensor]:
        """Return what each atom is as a source and as a target, both (n_atoms, channels)."""
        return self.source(numbers), self.target(numbers)


class EdgeNetwork(nn.Module):
    """A perceptron of the edge length and, if asked, of the elements at its ends.

    Args:
        n_features: Width of the shared features of a pair and its atoms.
        edge_channels: Width of the hidden layers and of the embeddings.
        out_channels: Numbers for each edge.
        num_elements: Embeds atomic numbers below this in place of shared features of the atoms;
            None takes those.
    """

    def __init__(
        self, n_features: int, edge_channels: int, out_channels: int, num_elements: int | None
    ) -> None:
        super().__init__()
        self.elements = None
        if num_elements is not None:
            self.elements = ElementPair(num_elements, edge_channels)
            n_features += 2 * edge_channels
        sizes = (n_features, edge_channels, edge_channels, out_channels)
        self.layers = RadialMLP(sizes, layer_norm=True)

    def forward(self, edges: EdgeScalars) -> Tensor:
        """Return (n_edges, out_channels)."""
        return self.layers(self.seen(edges.features, edges.atomic_numbers))

    def seen(self, pairs: Pairs, atomic_numbers: AtomicNumbers) -> Pairs:
        """Return what the perceptron sees: features of the elements of its own, if it has any."""
        if self.elements is None or isinstance(pairs, TabulatedPairs):
            return pairs
        of_source, of_target = self.elements(atomic_numbers)
        return PairFeatures(pairs.of_pair, of_source, of_target, pairs.edge_index)


@constant_table
def degree_rescale(lmax: int, mmax: int) -> Tensor:
    """Return the factor of each coefficient after the way back from the edge frame, (n_sph, 1).

    Of the 2l + 1 orders of a degree only 2 mmax + 1 have come along; √((2l + 1)/(2 mmax + 1)) makes
    up for their variance.
    """
    degrees = torch.tensor([math.isqrt(i) for i in range((lmax + 1) ** 2)], dtype=torch.float64)
    return torch.sqrt((2 * degrees + 1) / (2 * mmax + 1)).clamp(min=1.0)[:, None]


class DegreeEmbedding(nn.Module):
    """The density of neighbours around each atom, expanded in spherical harmonics.

    Where the only features are scalars a message is a radial function on the polar axis of its
    edge, m = 0, so this first convolution costs far less than a layer.

    Args:
        lmax: Highest degree of the features.
        channels: Channels of the features.
        network: Of what is seen of an edge, with (lmax + 1) · channels outputs.
        mmax: Highest order that messages have later, for whose variance degrees are rescaled as
            theirs are; None rescales nothing.
        avg_degree: The sum over neighbours is divided by this.
    """

    def __init__(
        self,
        lmax: int,
        channels: int,
        network: RadialMLP | EdgeNetwork,
        *,
        mmax: int | None = None,
        avg_degree: float = 1.0,
    ) -> None:
        super().__init__()
        self.shape = (lmax + 1, channels)
        self.mmax = mmax
        self.avg_degree = avg_degree
        self.radial = network

    def forward(
        self, frame: EdgeFrame, edges: EdgeScalars | Pairs, envelope: Tensor | None
    ) -> NodeFeatures:
        """Return (n_atoms, n_sph, channels)."""
        features = edges.features if isinstance(edges, EdgeScalars) else edges
        if isinstance(features, TabulatedPairs):
            envelope = None  # tables have it
        polar = self.radial(edges).view(frame.n_edges, *self.shape)
        total = rotate_from_edge(polar, frame.truncated(0), envelope=envelope)
        if self.mmax is None:
            return total
        rescale = table_like(degree_rescale, frame.lmax, self.mmax, like=total)
        return total * (rescale / self.avg_degree)
