"""PaiNN: atoms have scalars and vectors, and vectors turn with the structure.

K. T. Schütt, O. T. Unke and M. Gastegger, Equivariant message passing for the prediction of
tensorial properties and molecular spectra, ICML (2021), arXiv:2102.03150.

Two differences from the paper: the cutoff has two continuous derivatives where the cosine has one,
and |v| is sqrt(v² + 0.01), which has no kink at zero, where vectors of symmetric crystals are.
"""

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import AtomisticModel
from atomeq.nn.radial import BesselBasis, PolynomialEnvelope
from atomeq.ops.segment.operations import segment_sum
from atomeq.typing import PropertyKey

_MAX_Z = 118
_SOFTENING = 0.01


class PaiNN(AtomisticModel):
    """Scalars and vectors of atoms, exchanged along the edges and mixed in place.

    Args:
        cutoff: Å.
        num_layers: Pairs of a message and an update.
        hidden_channels: F, of scalars and of vectors.
        num_basis: Radial functions.
    """

    def __init__(
        self,
        cutoff: float = 5.0,
        *,
        num_layers: int = 3,
        hidden_channels: int = 64,
        num_basis: int = 20,
    ) -> None:
        super().__init__()
        self.keep_arguments(locals())
        self.embedding = nn.Embedding(_MAX_Z + 1, hidden_channels)
        self.basis = BesselBasis(num_basis, cutoff)
        self.envelope = PolynomialEnvelope(cutoff)
        self.messages = nn.ModuleList(
            Message(hidden_channels, num_basis) for _ in range(num_layers)
        )
        self.receptive_depth = num_layers
        self.updates = nn.ModuleList(Update(hidden_channels) for _ in range(num_layers))
        self.energy = _network(hidden_channels, hidden_channels // 2, 1)

    def forward(self, graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        """Return energies (n_atoms,)."""
        return {"energies": self.energy(self.node_features(graph))[:, 0]}

    @property
    def node_channels(self) -> int:
        """Channels of :meth:`node_features`."""
        return self.embedding.embedding_dim

    def node_features(self, graph: AtomGraph) -> Tensor:
        """Return the scalars of the atoms after the last update, (n_atoms, F)."""
        vectors = graph.edge_vectors().to(self.dtype)
        lengths = vectors.norm(dim=1)
        directions = vectors / lengths[:, None]
        radial = self.basis(lengths)  # (n_edges, num_basis)
        envelope = self.envelope(lengths)[:, None]
        s = self.embedding(graph.atomic_numbers)  # (n_atoms, F)
        v = s.new_zeros(len(s), 3, s.shape[1])  # (n_atoms, 3, F)
        for message, update in zip(self.messages, self.updates, strict=True):
            s, v = message(s, v, graph.edge_index, directions, radial, envelope)
            s, v = update(s, v)
        return s


class Message(nn.Module):
    """What the neighbours send, eqs. 7 and 8."""

    def __init__(self, channels: int, num_basis: int) -> None:
        super().__init__()
        self.atom = _network(channels, channels, 3 * channels)
        self.filter = nn.Linear(num_basis, 3 * channels)

    def forward(
        self,
        s: Tensor,
        v: Tensor,
        edge_index: Tensor,
        directions: Tensor,
        radial: Tensor,
        envelope: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return scalars and vectors with the messages added."""
        source, target = edge_index
        weights = self.filter(radial) * envelope  # the bias too ends at the cutoff
        of_s, of_v, of_r = (self.atom(s)[source] * weights).chunk(3, dim=1)
        sent = v[source] * of_v[:, None] + directions[:, :, None] * of_r[:, None]
        return s + segment_sum(of_s, target, len(s)), v + segment_sum(sent, target, len(s))


class Update(nn.Module):
    """What an atom makes of it, eqs. 9 and 10."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Linear(channels, 2 * channels, bias=False)
        self.atom = _network(2 * channels, channels, 3 * channels)

    def forward(self, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed scalars and vectors."""
        left, right = self.mix(v).chunk(2, dim=2)  # U v and V v
        length = (right.square().sum(dim=1) + _SOFTENING).sqrt()
        of_v, of_product, of_s = self.atom(torch.cat([s, length], dim=1)).chunk(3, dim=1)
        return s + of_s + of_product * (left * right).sum(dim=1), v + left * of_v[:, None]


def _network(n_in: int, n_hidden: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, n_hidden), nn.SiLU(), nn.Linear(n_hidden, n_out))
