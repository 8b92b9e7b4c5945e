"""Heads that read a stress from the features of atoms, in place of the energy's derivative."""

import functools
import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.nn.feed_forward import FeedForward
from atomeq.nn.mlp import MLP
from atomeq.nn.norms import NormName, equivariant_norm
from atomeq.ops.harmonics.operations import spherical_harmonics
from atomeq.ops.segment.operations import segment_mean, segment_sum
from atomeq.ops.tables import constant_table, table_like
from atomeq.typing import BatchIndex, EdgeIndex, EdgeVectors, NodeFeatures, Stress

StressHead = Literal["equivariant"] | Mapping[str, bool | int | float] | None

logger = logging.getLogger(__name__)


@constant_table
def symmetric_basis() -> Tensor:
    """Return the trace and the five harmonics of l = 2 as matrices, orthonormal, (6, 3, 3).

    The harmonics are in the order of the rows of l = 2: xz, xy, 2 yy - xx - zz, yz, zz - xx.
    """
    basis = torch.zeros(6, 3, 3, dtype=torch.float64)
    basis[0] = torch.eye(3, dtype=torch.float64) / math.sqrt(3)
    for row, (a, b) in ((1, (0, 2)), (2, (0, 1)), (4, (1, 2))):
        basis[row, a, b] = basis[row, b, a] = 1 / math.sqrt(2)
    basis[3] = torch.diag(torch.tensor([-1.0, 2.0, -1.0], dtype=torch.float64)) / math.sqrt(6)
    basis[5] = torch.diag(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)) / math.sqrt(2)
    return basis


def symmetric_tensor(parts: Tensor) -> Stress:
    """Return the symmetric matrices (n_graphs, 3, 3) of trace and l = 2, (n_graphs, 6)."""
    basis = table_like(symmetric_basis, like=parts)
    return (parts @ basis.flatten(1)).unflatten(1, (3, 3))


class EquivariantStress(nn.Module):
    """The stress as the mean over atoms of what a gated network makes of each: l = 0 and l = 2.

    Args:
        lmax: Highest degree of the features, at least 2.
        channels: Channels of the features.
        hidden_channels: Channels of the network.

    Raises:
        ValueError: The features have no l = 2.
    """

    def __init__(self, lmax: int, channels: int, hidden_channels: int) -> None:
        super().__init__()
        if lmax < 2:
            raise ValueError(f"a stress head reads degree 2 of the features; lmax is {lmax}")
        self.network = FeedForward(lmax, channels, hidden_channels, 1)

    def forward(self, x: NodeFeatures, batch: BatchIndex, n_graphs: int) -> Stress:
        """Return the stress of each structure, (n_graphs, 3, 3), in the model's own scale."""
        rows = segment_mean(self.network(x)[..., 0], batch, n_graphs)  # (n_graphs, n_sph)
        return symmetric_tensor(torch.cat([rows[:, :1], rows[:, 4:9]], dim=1))


class Rank2Stress(nn.Module):
    """The stress head of the published materials models, EquiformerV2's and eSEN's.

    Features are contracted with harmonics of each edge; the invariants that come of it weigh the
    tensor of that edge, and perceptrons act on its components one by one, through SiLU and with
    biases. So what they return turns with the structure in its trace alone: that is what published
    weights were trained in. :class:`EquivariantStress` has no such defect.

    Args:
        lmax: Highest degree of the features.
        channels: Channels of the features.
        norm: Of the harmonics of an edge, which are not normalised: |d|^l.
        decompose: Make trace and l = 2 apart, of the direction of an edge; else the nine
            components of a matrix, of its vector.
        edge_level: Apply the perceptrons to edges and average after; else to averages over edges.
        num_layers: Linear layers of each perceptron.
        source_and_target: Contract the features of both atoms of an edge, not of the target alone.
        extensive: Sum over atoms; else their mean.
        divisor: Of what is decomposed.
    """

    def __init__(
        self,
        lmax: int,
        channels: int,
        norm: NormName,
        *,
        decompose: bool = False,
        edge_level: bool = False,
        num_layers: int = 2,
        source_and_target: bool = False,
        extensive: bool = False,
        divisor: float = 1.0,
    ) -> None:
        super().__init__()
        _say_it_is_not_equivariant()
        self.lmax = lmax
        self.decompose = decompose
        self.edge_level = edge_level
        self.source_and_target = source_and_target
        self.extensive = extensive
        self.divisor = divisor
        width = channels * (2 if source_and_target else 1)
        widths = (*[width] * num_layers, 1)
        self.harmonics_norm = equivariant_norm(norm, lmax, 1)
        self.edge_norm = nn.LayerNorm(width)
        self.trace = MLP(widths) if decompose else None
        self.traceless = MLP(widths) if decompose else None
        self.tensor = None if decompose else MLP(widths)

    def forward(
        self,
        x: NodeFeatures,
        vectors: EdgeVectors,
        edge_index: EdgeIndex,
        batch: BatchIndex,
        n_graphs: int,
    ) -> Stress:
        """Return the stress of each structure in the model's own scale.

        Args:
            x: Features of atoms, (n_atoms, n_sph, channels).
            vectors: Of edges, (n_edges, 3), Å.
            edge_index: (2, n_edges).
            batch: Structure of each atom, (n_atoms,).
            n_graphs: Number of structures.

        Returns:
            (n_graphs, 3, 3), symmetric.
        """
        weights = self.edge_weights(x, vectors, edge_index)[:, None]  # (n_edges, 1, width)
        target, pool = edge_index[1], segment_sum if self.extensive else segment_mean

        def read(network: nn.Module, components: Tensor) -> Tensor:
            values = components[:, :, None] * weights  # (n_edges, n_components, width)
            values = network(values) if self.edge_level else values
            values = segment_mean(values, target, x.shape[0])
            return (values if self.edge_level else network(values))[..., 0]

        if self.tensor is not None:
            products = (vectors[:, :, None] * vectors[:, None]).flatten(1)  # (n_edges, 9)
            return pool(read(self.tensor, products), batch, n_graphs).unflatten(1, (3, 3))
        assert self.trace is not None
        assert self.traceless is not None
        directions = spherical_harmonics(vectors, 2, normalization="integral")[:, 4:]
        parts = [
            read(self.trace, torch.ones_like(vectors[:, :1])),
            read(self.traceless, directions),
        ]
        return symmetric_tensor(pool(torch.cat(parts, dim=1), batch, n_graphs) / self.divisor)

    def edge_weights(self, x: NodeFeatures, vectors: EdgeVectors, edge_index: EdgeIndex) -> Tensor:
        """Contract the features of an edge's atoms with its harmonics, (n_edges, width)."""
        harmonics = spherical_harmonics(
            vectors, self.lmax, normalize=False, normalization="integral"
        )
        harmonics = self.harmonics_norm(harmonics[..., None])  # (n_edges, n_sph, 1)
        ends = edge_index if self.source_and_target else edge_index[1:]
        found = [torch.einsum("esk,esc->ec", harmonics, x.index_select(0, end)) for end in ends]
        return self.edge_norm(torch.cat(found, dim=1))


def stress_head_of(
    option: StressHead, lmax: int, channels: int, hidden_channels: int, norm: NormName
) -> EquivariantStress | Rank2Stress | None:
    """Return the head of an option: ``equivariant``, those of :class:`Rank2Stress`, or None."""
    if option is None:
        return None
    if option == "equivariant":
        return EquivariantStress(lmax, channels, hidden_channels)
    options: Any = option  # the head checks them
    return Rank2Stress(lmax, channels, norm, **options)


def stress_of(head: EquivariantStress | Rank2Stress, x: NodeFeatures, graph: AtomGraph) -> Stress:
    """Return what a head reads from the features of a graph's atoms."""
    if isinstance(head, EquivariantStress):
        return head(x, graph.batch, graph.n_graphs)
    vectors = graph.edge_vectors().detach().to(x.dtype)
    return head(x, vectors, graph.edge_index, graph.batch, graph.n_graphs)


@functools.cache
def _say_it_is_not_equivariant() -> None:
    logger.warning(
        "the published stress head is not rotation-equivariant in its l = 2 part (in its trace it "
        "is): perceptrons act on components; for training choose stress_head: equivariant"
    )
