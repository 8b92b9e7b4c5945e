"""What networks with features on the sphere have in common: edges, first atoms, blocks, outputs."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import GraphBuilder, neighbor_graph
from atomeq.models.base import AtomisticModel
from atomeq.nn.edge_convolution import EdgeConvolution
from atomeq.nn.pair_mlp import Pairs
from atomeq.nn.pair_networks import PairNetworks
from atomeq.nn.radial import BesselBasis, GaussianBasis
from atomeq.nn.radial_tables import RadialTables
from atomeq.nn.sphere import set_resolution, with_scalars
from atomeq.nn.stress import EquivariantStress, Rank2Stress, stress_of
from atomeq.ops.edge.frame import EdgeFrame
from atomeq.ops.edge.wigner import build_edge_frame
from atomeq.typing import NodeFeatures, PropertyKey

#: Frames of the edges, what networks of pairs see of them, and their envelope (n_edges,).
Edges = tuple[EdgeFrame, Pairs, Tensor | None]

GAUSSIAN_WIDTH = 2.0  # of the grid spacing, as published


class SphericalNetwork(AtomisticModel, ABC):
    """A network whose atoms have features by degree, updated in the frames of their edges.

    Args:
        cutoff: Radius of the graph, Å.

    Attributes:
        stress: A head for stress, if there is one.
    """

    lmax: int
    mmax: int
    sphere_channels: int
    grid_resolution: int | None
    max_neighbors: int | None = None
    strict_neighbors: bool = False
    embedding: nn.Embedding

    readouts = ("energy", "forces", "stress")

    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self._tables = RadialTables(cutoff)
        self.stress: EquivariantStress | Rank2Stress | None = None

    @abstractmethod
    def _pair_networks(self) -> PairNetworks:
        """Return the networks that depend on an edge's length and elements alone."""

    @abstractmethod
    def _atoms(self, graph: AtomGraph, edges: Edges) -> NodeFeatures:
        """Return the atoms after the last block and its norm, (n_atoms, n_sph, C)."""

    @abstractmethod
    def _energies(self, x: NodeFeatures, graph: AtomGraph) -> tuple[Tensor, Tensor]:
        """Return the energies of the atoms (n_atoms,), and what the last map makes them of."""

    def _forces(self, x: NodeFeatures, graph: AtomGraph, edges: Edges) -> Tensor | None:
        """Return what a head for forces gives, (n_atoms, 3), or None without one."""
        return None

    def graph_builder(self) -> GraphBuilder:
        """Return the builder of all pairs within the cutoff, or of the nearest neighbours."""
        return neighbor_graph(self.cutoff, self.max_neighbors, strict=self.strict_neighbors)

    def set_grid_resolution(self, grid_resolution: int | None) -> None:
        """Compute on other grids from now on; the finer, the more equivariant and the slower."""
        self.grid_resolution = grid_resolution
        set_resolution(self, grid_resolution)

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
        edges = self._edges(graph, edge_rotation)
        x = self._atoms(graph, edges)
        energies, features = self._energies(x, graph)
        outputs: dict[PropertyKey, Tensor] = {"energies": energies, "features": features}
        outputs["sphere_features"] = x
        forces = self._forces(x, graph, edges)
        if forces is not None:
            outputs["forces"] = forces
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
        return self._atoms(graph, self._edges(graph))[:, 0]

    def _edges(self, graph: AtomGraph, rotation: Tensor | None = None) -> Edges:
        frame = build_edge_frame(
            graph.edge_vectors().to(self.dtype),
            graph.edge_index,
            n_atoms=graph.n_atoms,
            lmax=self.lmax,
            mmax=self.mmax,
            rotation=rotation,
        )
        networks, numbers = self._pair_networks(), graph.atomic_numbers
        return frame, *networks.evaluate(frame, numbers, graph.edge_index, self._tables)

    def _with_elements(self, x: NodeFeatures, graph: AtomGraph) -> NodeFeatures:
        """Return ``x`` (n_atoms, n_sph, C) with the embedded atoms in its scalars."""
        atoms = self.with_state(self.embedding(graph.atomic_numbers), graph)  # (n_atoms, C)
        return with_scalars(x, x[:, 0] + atoms)


class MessageBlock(nn.Module):
    """Messages along edges, then an update of each atom; both residual, after a normalisation."""

    def __init__(
        self,
        *,
        message_norm: nn.Module,
        message: EdgeConvolution,
        update_norm: nn.Module,
        update: nn.Module,
    ) -> None:
        super().__init__()
        self.message_norm = message_norm
        self.message = message
        self.update_norm = update_norm
        self.update = update

    def forward(
        self,
        x: NodeFeatures,
        frame: EdgeFrame,
        edges: Pairs,
        envelope: Tensor | None,
        *,
        n_wanted: int | None = None,
    ) -> NodeFeatures:
        """Update ``x`` (n_atoms, n_sph, C), or only the first so many that are wanted."""
        x = x + self.message(self.message_norm(x), frame, edges, envelope)
        if n_wanted is not None:
            x = x[:n_wanted]
        return x + self.update(self.update_norm(x))


def radial_basis_of(
    name: str, num_radial: int, cutoff: float, **others: Callable[[int, float], nn.Module]
) -> nn.Module:
    """Return ``bessel`` functions, ``gaussian`` ones as published, or ``others`` by their names."""
    gaussian = partial(GaussianBasis, width=GAUSSIAN_WIDTH)
    bases = {"bessel": BesselBasis, "gaussian": gaussian, **others}
    if name not in bases:
        raise ValueError(f"radial_basis is {' or '.join(bases)}, not {name!r}")
    return bases[name](num_radial, cutoff)
