"""What EquiformerV2 and EquiformerV3 have in common: blocks of attention, and what is in them."""

from abc import ABC, abstractmethod
from typing import cast

from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.spherical import Edges, SphericalNetwork, radial_basis_of
from atomeq.nn.activations import ActivationName
from atomeq.nn.attention import EquivariantAttention, Weighing
from atomeq.nn.dropout import EquivariantDropout, GraphDropPath
from atomeq.nn.edge_network import DegreeEmbedding, EdgeNetwork, EdgeScalars, ElementPair
from atomeq.nn.norms import NormName, equivariant_norm
from atomeq.nn.pair_networks import PairNetworks
from atomeq.nn.radial import PolynomialEnvelope
from atomeq.nn.sphere import GridResolution
from atomeq.ops.edge.frame import EdgeFrame
from atomeq.typing import NodeFeatures


class EquivariantTransformer(SphericalNetwork, ABC):
    """A transformer over the edges of each atom; a subclass names the arguments and makes heads.

    Attributes:
        own_elements: Elements that each network embeds for itself; None where none does.
        pairs: Embeds the elements of an edge for all networks; None where it does not.
        weighing: How attention weighs messages.
    """

    num_layers: int
    attn_hidden_channels: int
    num_heads: int
    attn_alpha_channels: int
    attn_value_channels: int
    ffn_hidden_channels: int
    edge_channels: int
    num_elements: int
    radial_basis: str
    num_radial: int
    norm: NormName
    activation: ActivationName
    shared_radial: bool
    add_merge: bool = False
    chiral: bool
    envelope: bool
    max_neighbors: int | None
    strict_neighbors: bool
    avg_degree: float
    energy_divisor: float
    alpha_drop: float
    drop_path: float
    proj_drop: float

    forces: EquivariantAttention | None

    def _make_trunk(
        self,
        weighing: Weighing,
        grid_resolution: GridResolution,
        *,
        own_elements: int | None,
        shared_elements: bool = False,
    ) -> None:
        """Make all parts but the heads, of the arguments that are kept and of these."""
        self.weighing, self.own_elements = weighing, own_elements
        self.embedding = nn.Embedding(self.num_elements, self.sphere_channels)
        self.basis = radial_basis_of(self.radial_basis, self.num_radial, self.cutoff)
        self.cut = PolynomialEnvelope(self.cutoff) if self.envelope else None
        sizes = (self.num_elements, self.edge_channels)
        self.pairs = ElementPair(*sizes) if shared_elements else None
        self.degree_embedding = self._degree_embedding()
        self.blocks = nn.ModuleList(self._block(grid_resolution) for _ in range(self.num_layers))
        self.norm_out = equivariant_norm(self.norm, self.lmax, self.sphere_channels)

    @abstractmethod
    def _feed_forward(self) -> nn.Module:
        """Return the network on each atom that a block has."""

    def _forces(self, x: NodeFeatures, graph: AtomGraph, edges: Edges) -> Tensor | None:
        if self.forces is None:
            return None
        return self.forces(x, *_seen(graph, edges))[:, 1:4, 0]  # l = 1 is (x, y, z)

    def _atoms(self, graph: AtomGraph, edges: Edges) -> NodeFeatures:
        frame, scalars = _seen(graph, edges)
        x = self._with_elements(self.degree_embedding(frame, scalars, scalars.envelope), graph)
        for block in self.blocks:
            x = block(x, frame, scalars, graph.batch, graph.n_graphs)
        return self.norm_out(x)

    def _pair_networks(self) -> PairNetworks:
        blocks = cast("list[TransformerBlock]", list(self.blocks))  # a ModuleList has no types
        attentions = [block.attention for block in blocks]
        attentions += [] if self.forces is None else [self.forces]
        return PairNetworks(
            self.basis,
            self.cut,
            self.pairs,
            self.degree_embedding.radial,
            tuple(one.radial for one in attentions),
        )

    @property
    def _num_edge_scalars(self) -> int:
        return self.num_radial + (0 if self.pairs is None else 2 * self.edge_channels)

    def _degree_embedding(self) -> DegreeEmbedding:
        n_weights = (self.lmax + 1) * self.sphere_channels
        sizes = (self._num_edge_scalars, self.edge_channels, n_weights, self.own_elements)
        return DegreeEmbedding(
            self.lmax,
            self.sphere_channels,
            EdgeNetwork(*sizes),
            mmax=self.mmax,
            avg_degree=self.avg_degree,
        )

    def _block(self, grid_resolution: GridResolution) -> "TransformerBlock":
        sizes = (self.sphere_channels, self.activation, grid_resolution)
        return TransformerBlock(
            norm_1=equivariant_norm(self.norm, self.lmax, self.sphere_channels),
            attention=self._attention(*sizes, dropout=self.alpha_drop),
            norm_2=equivariant_norm(self.norm, self.lmax, self.sphere_channels),
            feed_forward=self._feed_forward(),
            drop_path=self.drop_path,
            proj_drop=self.proj_drop,
        )

    def _attention(
        self,
        out_channels: int,
        activation: ActivationName,
        grid_resolution: GridResolution,
        *,
        dropout: float = 0.0,
    ) -> EquivariantAttention:
        return EquivariantAttention(
            self.lmax,
            self.mmax,
            self.sphere_channels,
            out_channels,
            hidden_channels=self.attn_hidden_channels,
            num_heads=self.num_heads,
            alpha_channels=self.attn_alpha_channels,
            value_channels=self.attn_value_channels,
            num_basis=self._num_edge_scalars,
            edge_channels=self.edge_channels,
            num_elements=self.own_elements,
            activation=activation,
            grid_resolution=grid_resolution,
            shared_radial=self.shared_radial,
            add_merge=self.add_merge,
            weighing=self.weighing,
            chiral=self.chiral,
            dropout=dropout,
        )


def _seen(graph: AtomGraph, edges: Edges) -> tuple[EdgeFrame, EdgeScalars]:
    frame, pairs, envelope = edges
    return frame, EdgeScalars(pairs, graph.atomic_numbers, envelope)


class TransformerBlock(nn.Module):
    """Attention over the neighbours, then a network on each atom, both residual behind a norm."""

    def __init__(
        self,
        *,
        norm_1: nn.Module,
        attention: EquivariantAttention,
        norm_2: nn.Module,
        feed_forward: nn.Module,
        drop_path: float,
        proj_drop: float,
    ) -> None:
        super().__init__()
        self.norm_1 = norm_1
        self.attention = attention
        self.norm_2 = norm_2
        self.feed_forward = feed_forward
        self.drop_path = GraphDropPath(drop_path)
        self.proj_drop = EquivariantDropout(proj_drop)

    def forward(
        self, x: NodeFeatures, frame: EdgeFrame, edges: EdgeScalars, batch: Tensor, n_graphs: int
    ) -> NodeFeatures:
        """Update ``x`` (n_atoms, n_sph, channels)."""
        y = self.attention(self.norm_1(x), frame, edges)
        x = x + self.drop_path(self.proj_drop(y), batch, n_graphs)
        y = self.feed_forward(self.norm_2(x))
        return x + self.drop_path(self.proj_drop(y), batch, n_graphs)
