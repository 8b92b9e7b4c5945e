"""What EquiformerV2 and EquiformerV3 have in common: edges, blocks, and where heads read."""

from abc import ABC, abstractmethod
from typing import cast

from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import GraphBuilder, neighbor_graph
from atomeq.models.base import AtomisticModel
from atomeq.nn.attention import EquivariantAttention
from atomeq.nn.dropout import EquivariantDropout, GraphDropPath
from atomeq.nn.edge_network import DegreeEmbedding, EdgeScalars, ElementPair
from atomeq.nn.pair_networks import PairNetworks
from atomeq.nn.radial import BesselBasis, GaussianBasis
from atomeq.nn.radial_tables import RadialTables
from atomeq.nn.sphere import with_scalars
from atomeq.nn.stress import EquivariantStress, Rank2Stress, stress_of
from atomeq.ops.edge.frame import EdgeFrame
from atomeq.ops.edge.wigner import build_edge_frame
from atomeq.typing import NodeFeatures, PropertyKey

GAUSSIAN_WIDTH = 2.0  # of the grid spacing, as published


class EquivariantTransformer(AtomisticModel, ABC):
    """A transformer over the edges of each atom; a subclass makes the parts named here.

    Args:
        cutoff: Radius of the graph, Å.

    Attributes:
        pairs: Embeds the elements of an edge for all networks; None where each does for itself.
    """

    lmax: int
    mmax: int
    sphere_channels: int
    max_neighbors: int | None
    strict_neighbors: bool
    embedding: nn.Embedding
    basis: nn.Module
    cut: nn.Module | None
    pairs: ElementPair | None
    degree_embedding: DegreeEmbedding
    blocks: nn.ModuleList
    norm_out: nn.Module
    forces: EquivariantAttention | None
    stress: EquivariantStress | Rank2Stress | None

    readouts = ("energy", "forces", "stress")

    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self._tables = RadialTables(cutoff)

    @abstractmethod
    def _energies(self, x: NodeFeatures, graph: AtomGraph) -> tuple[Tensor, Tensor]:
        """Return the energies of the atoms (n_atoms,), and what the last map makes them of."""

    def graph_builder(self) -> GraphBuilder:
        """Return the builder of all pairs within the cutoff, or of the nearest neighbours."""
        return neighbor_graph(self.cutoff, self.max_neighbors, strict=self.strict_neighbors)

    def forward(
        self, graph: AtomGraph, *, edge_rotation: Tensor | None = None
    ) -> dict[PropertyKey, Tensor]:
        """Compute energies, and what has a head of its own, in the model's own scale.

        Args:
            graph: Structures with edges.
            edge_rotation: Rotations that take each edge to +y, (n_edges, 3, 3), to set its roll;
                by default a rule without randomness.

        Returns:
            ``energies`` (n_atoms,) and both features; ``forces`` (n_atoms, 3) and ``stress``
            (n_graphs, 3, 3) if they have a head.
        """
        x, frame, edges = self._transform(graph, edge_rotation)
        energies, features = self._energies(x, graph)
        outputs: dict[PropertyKey, Tensor] = {"energies": energies, "features": features}
        outputs["sphere_features"] = x
        if self.forces is not None:
            outputs["forces"] = self.forces(x, frame, edges)[:, 1:4, 0]  # l = 1 is (x, y, z)
        if self.stress is not None:
            outputs["stress"] = stress_of(self.stress, x, graph)
        return outputs

    @property
    def node_channels(self) -> int:
        """Channels of :meth:`node_features`."""
        return self.sphere_channels

    @property
    def sphere_shape(self) -> tuple[int, int]:
        """Highest degree and channels of the features of the last block."""
        return self.lmax, self.sphere_channels

    def node_features(self, graph: AtomGraph) -> Tensor:
        """Return the scalars of the last block, normalised, (n_atoms, sphere_channels)."""
        return self._transform(graph, None)[0][:, 0]

    def _transform(
        self, graph: AtomGraph, edge_rotation: Tensor | None
    ) -> tuple[NodeFeatures, EdgeFrame, EdgeScalars]:
        """Return the atoms after the last block (n_atoms, n_sph, C), and the edges they saw."""
        numbers = graph.atomic_numbers
        frame = build_edge_frame(
            graph.edge_vectors().to(self.dtype),
            graph.edge_index,
            n_atoms=graph.n_atoms,
            lmax=self.lmax,
            mmax=self.mmax,
            rotation=edge_rotation,
        )
        pairs, envelope = self._pair_networks().evaluate(
            frame, numbers, graph.edge_index, self._tables
        )
        edges = EdgeScalars(pairs, numbers, envelope)
        x = self.degree_embedding(frame, edges, edges.envelope)
        x = with_scalars(x, x[:, 0] + self.with_state(self.embedding(numbers), graph))
        for block in self.blocks:
            x = block(x, frame, edges, graph.batch, graph.n_graphs)
        return self.norm_out(x), frame, edges

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


def radial_basis_of(name: str, num_radial: int, cutoff: float) -> nn.Module:
    """Return ``bessel`` functions, or ``gaussian`` ones as published."""
    if name == "bessel":
        return BesselBasis(num_radial, cutoff)
    if name == "gaussian":
        return GaussianBasis(num_radial, cutoff, width=GAUSSIAN_WIDTH)
    raise ValueError(f"radial_basis is bessel or gaussian, not {name!r}")
