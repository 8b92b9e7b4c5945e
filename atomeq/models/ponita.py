"""PONITA: convolutions in position-orientation space, with weights shared over rotations.

Bekkers, Vadgama, Hesselink, van der Linden and Romero, ICLR 2024, arXiv:2310.02970. A feature
belongs to an atom and a direction o. A message to it is weighted by a kernel of the invariants of
the pair, here r, r·o and o·o', and layers are those of ConvNeXt.

This is our default form: an energy potential, and a propagator of particles. It differs from the
paper on purpose:

* the directions of an atom are those of its near neighbours, each with a weight that ends smoothly,
  and the zero vector, position alone. They turn with the structure, so the network is exact under
  rotations and reflections; the published grid, the same for all, is not;
* the kernel in o·o' is a series of Legendre polynomials up to ``lmax``. So a neighbour's features
  are summed into moments once, and read at any direction: the cost is that of directions times
  neighbours, not of all pairs of directions;
* the part of r across o is left out: with r and r·o it is known, and its slope is infinite on o;
* distances enter through a Bessel basis and messages end in an envelope; sums are divided by
  constants, not by counts; the network is told which element a direction points to.

:mod:`atomeq.models.ponita_published` has the published modes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import InvariantReadout, Propagator, refuse_nonpositive
from atomeq.nn.local_frames import Directions, neighbour_directions
from atomeq.nn.mlp import MLP
from atomeq.nn.radial import BesselBasis, PolynomialEnvelope
from atomeq.ops.harmonics.operations import spherical_harmonics
from atomeq.ops.segment.operations import segment_sum
from atomeq.typing import EdgeIndex, Positions

_POWERS = 4  # of the cosine between a direction and an edge, from 0
_SMALLEST_SPEED = 0.1  # of a particle with a direction; below it, it fades
_NEAR = 0.1  # where 1/r of particles is cut off


class PONITA(InvariantReadout):
    """Position-orientation network with conservative forces.

    Args:
        cutoff: Radius of the graph, Å.
        direction_cutoff: How far the neighbours are that give an atom directions, Å.
        num_layers: Message-passing layers.
        hidden_channels: Channels of an atom at each direction.
        basis_channels: Channels that the kernels of all layers are linear in.
        num_radial: Bessel functions of the edge length.
        lmax: Highest degree of the kernel between directions.
        widening: Hidden channels of a layer, in ``hidden_channels``.
        avg_num_neighbors: Sums over neighbours are divided by its square root.
        avg_num_directions: Sums over directions likewise.
        num_elements: Atomic numbers below this are embedded.

    Raises:
        ValueError: ``direction_cutoff`` exceeds ``cutoff``.
    """

    recordable = False  # how many directions there are is asked

    def __init__(
        self,
        cutoff: float = 5.0,
        *,
        direction_cutoff: float = 3.0,
        num_layers: int = 3,
        hidden_channels: int = 64,
        basis_channels: int = 32,
        num_radial: int = 8,
        lmax: int = 2,
        widening: int = 2,
        avg_num_neighbors: float = 20.0,
        avg_num_directions: float = 6.0,
        num_elements: int = 119,
    ) -> None:
        super().__init__()
        self.keep_arguments(locals())
        self.receptive_depth = num_layers + 1  # directions are those of neighbours
        refuse_nonpositive(
            avg_num_neighbors=avg_num_neighbors, avg_num_directions=avg_num_directions
        )
        if direction_cutoff > cutoff:
            raise ValueError(
                f"direction_cutoff {direction_cutoff} Å is beyond the cutoff of {cutoff} Å; "
                "directions are those of neighbours"
            )
        self.cutoff = cutoff
        self.embedding = nn.Embedding(num_elements, hidden_channels)
        self.pointed_at = nn.Embedding(num_elements, hidden_channels)
        self.reach = nn.Linear(num_radial, hidden_channels, bias=False)
        self.basis = BesselBasis(num_radial, cutoff)
        self.envelope = PolynomialEnvelope(cutoff)
        self.direction_envelope = PolynomialEnvelope(direction_cutoff)
        self.network = OrientedNetwork(
            num_radial,
            _POWERS + 1,
            num_layers=num_layers,
            hidden_channels=hidden_channels,
            basis_channels=basis_channels,
            lmax=lmax,
            widening=widening,
            avg_num_neighbors=avg_num_neighbors,
            avg_num_directions=avg_num_directions,
        )
        self.energy = MLP((hidden_channels, hidden_channels, 1), zero_output=True)

    def node_features(self, graph: AtomGraph) -> Tensor:
        """Return sums over the directions of each atom, (n_atoms, hidden_channels)."""
        x, directions = self.oriented_features(graph)
        return self.network.share * torch.einsum("noc,no->nc", x, directions.weights)

    def node_vectors(self, graph: AtomGraph) -> Tensor:
        """Return vectors of each atom that turn along, (n_atoms, 3, hidden_channels)."""
        x, directions = self.oriented_features(graph)
        weighted = directions.vectors * directions.weights[:, :, None]
        return self.network.share * weighted.mT @ x

    def oriented_features(self, graph: AtomGraph) -> tuple[Tensor, Directions]:
        """Return features after the last layer, (n_atoms, n_directions, C), and directions."""
        source, target = graph.edge_index
        vectors = graph.edge_vectors().to(self.dtype)  # (n_edges, 3)
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        units, radial = vectors / lengths[:, None], self.basis(lengths)
        weights = self.direction_envelope(lengths)
        directions = neighbour_directions(units, target, weights, graph.n_atoms)
        atoms = self.with_state(self.embedding(graph.atomic_numbers), graph)  # (n_atoms, C)
        ends = self.pointed_at(graph.atomic_numbers).index_select(0, source) + self.reach(radial)
        x = atoms[:, None] + at_directions(ends, directions)  # (n_atoms, n_directions, C)
        angular = powers_of_cosines(units, target, directions)
        envelope = self.envelope(lengths)[:, None, None]
        return self.network(x, directions, radial, angular, envelope, graph.edge_index), directions


class PONITAPropagator(Propagator):
    """Carries particles a long step ahead in several short ones, each with the same layers.

    Directions of a particle are those to all others, and in place of zero that of its velocity. The
    layers give accelerations along them; in the next step they see the particles moved. The
    published network gives the whole displacement at once.

    Args:
        n_inputs: Input features of a particle.
        n_edge_features: Features given with each edge; the first divides by the distance too, as
            the product of charges does.
        hidden_channels: Channels of a particle at each direction.
        basis_channels: Channels that the kernels of all layers are linear in.
        num_layers: Message-passing layers of a step.
        num_steps: Steps.
        lmax: Highest degree of the kernel between directions.
        widening: Hidden channels of a layer, in ``hidden_channels``.
    """

    def __init__(
        self,
        n_inputs: int = 1,
        n_edge_features: int = 2,
        *,
        hidden_channels: int = 32,
        basis_channels: int = 24,
        num_layers: int = 1,
        num_steps: int = 6,
        lmax: int = 1,
        widening: int = 2,
    ) -> None:
        super().__init__()
        self.keep_arguments(locals())
        n_radial = n_edge_features + 5
        self.embedding = nn.Linear(n_inputs, hidden_channels)
        self.pointed_at = MLP((n_inputs + n_radial, hidden_channels, hidden_channels))
        self.network = OrientedNetwork(
            n_radial,
            _POWERS + 3,
            num_layers=num_layers,
            hidden_channels=hidden_channels,
            basis_channels=basis_channels,
            lmax=lmax,
            widening=widening,
            avg_num_neighbors=4.0,
            avg_num_directions=4.0,
        )
        self.push = nn.Linear(hidden_channels, 1)
        nn.init.zeros_(self.push.weight)
        self.num_steps = num_steps

    def forward(
        self,
        pos: Positions,
        velocities: Tensor,
        node_features: Tensor,
        edge_features: Tensor,
        edge_index: EdgeIndex,
    ) -> tuple[Positions, Tensor]:
        """Return positions and velocities, each (n_atoms, 3), a long step ahead."""
        given = node_features.index_select(0, edge_index[0])
        x, dt = self.embedding(node_features)[:, None], 1 / self.num_steps
        table = neighbour_directions(
            torch.zeros_like(pos[edge_index[1]]),
            edge_index[1],
            edge_features.new_ones(len(given)),
            len(pos),
        )
        for _ in range(self.num_steps):
            directions, radial, angular = self._geometry(
                pos, velocities, edge_features, edge_index, table
            )
            ends = self.pointed_at(torch.cat([given, radial], dim=1))
            x = x + at_directions(ends, directions)
            x = self.network(x, directions, radial, angular, None, edge_index)
            strengths = self.push(x) * directions.weights[:, :, None]
            velocities = velocities + dt * (strengths * directions.vectors).sum(dim=1)
            pos = pos + dt * velocities
        return pos, velocities

    def _geometry(
        self,
        pos: Positions,
        velocities: Tensor,
        edge_features: Tensor,
        edge_index: EdgeIndex,
        table: Directions,
    ) -> tuple[Directions, Tensor, Tensor]:
        """Return directions, and functions of edges (n_edges, any) and of both together."""
        source, target = edge_index
        vectors = pos.index_select(0, source) - pos.index_select(0, target)
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        units = vectors / lengths
        own, theirs = velocities.index_select(0, target), velocities.index_select(0, source)
        inverse = 1 / (lengths + _NEAR)
        along = [(v * units).sum(dim=1, keepdim=True) for v in (own, theirs)]
        radial = [edge_features, lengths, inverse, edge_features[:, :1] * inverse, *along]

        speed = ((velocities * velocities).sum(dim=1, keepdim=True) + _SMALLEST_SPEED**2).sqrt()
        drift = (velocities / speed)[:, None]
        others = at_directions(units, table)[:, 1:]
        directions = table._replace(vectors=torch.cat([drift, others], dim=1))
        o = directions.vectors.index_select(0, target)
        angular = [powers_of_cosines(units, target, directions)]
        angular += [o @ v[:, :, None] for v in (own, theirs)]
        return directions, torch.cat(radial, dim=1), torch.cat(angular, dim=2)


class OrientedNetwork(nn.Module):
    """Layers of convolutions over atoms and their directions.

    Args:
        n_radial: Functions of an edge.
        n_angular: Functions of an edge and a direction, a constant among them.
        others: As of :class:`PONITA`.
    """

    def __init__(
        self,
        n_radial: int,
        n_angular: int,
        *,
        num_layers: int,
        hidden_channels: int,
        basis_channels: int,
        lmax: int,
        widening: int,
        avg_num_neighbors: float,
        avg_num_directions: float,
    ) -> None:
        super().__init__()
        self.lmax, self.n_angular = lmax, n_angular
        self.share = 1 / math.sqrt(avg_num_directions)
        n_hidden = 2 * basis_channels
        self.products = nn.Linear(n_radial, n_angular * n_hidden)
        self.kernel_basis = nn.Linear(n_hidden, basis_channels)
        self.layers = nn.ModuleList(
            OrientedLayer(
                hidden_channels, basis_channels, lmax, widening, avg_num_neighbors, self.share
            )
            for _ in range(num_layers)
        )

    def forward(
        self,
        x: Tensor,
        directions: Directions,
        radial: Tensor,
        angular: Tensor,
        envelope: Tensor | None,
        edge_index: EdgeIndex,
    ) -> Tensor:
        """Return features (n_atoms, n_directions, C) after all layers.

        Args:
            x: Features of atoms at their directions, (n_atoms, n_directions, C).
            directions: Of all atoms.
            radial: Functions of each edge, (n_edges, n_radial).
            angular: Of each edge and direction of its target, (n_edges, n_directions, n_angular).
            envelope: Ends messages, (n_edges, 1, 1).
            edge_index: Row 0 is the source, row 1 the target.
        """
        # Linear in all products of both, of which none is formed.
        products = self.products(radial).unflatten(1, (self.n_angular, -1))
        basis = silu(self.kernel_basis(silu(angular @ products)))  # (n_edges, n_directions, B)
        basis = basis if envelope is None else basis * envelope
        harmonics = spherical_harmonics(directions.vectors, self.lmax, normalize=False)
        weighted = (harmonics * directions.weights[:, :, None] * self.share).mT
        at_targets = harmonics.index_select(0, edge_index[1])
        for layer in self.layers:
            x = layer(x, basis, harmonics, weighted, at_targets, edge_index)
        return x


class OrientedLayer(nn.Module):
    """A convolution over positions, one over directions, and a perceptron."""

    degrees: Tensor

    def __init__(
        self,
        channels: int,
        n_basis: int,
        lmax: int,
        widening: int,
        avg_num_neighbors: float,
        share: float,
    ) -> None:
        super().__init__()
        self.kernel = nn.Linear(n_basis, channels, bias=False)
        nn.init.normal_(self.kernel.weight, std=2 / math.sqrt(n_basis * avg_num_neighbors))
        self.between = nn.Parameter(torch.ones(lmax + 1, channels))
        self.within = nn.Parameter(torch.ones(lmax + 1, channels))
        self.stay = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.norm = nn.LayerNorm(channels)
        self.linear_1 = nn.Linear(channels, widening * channels)
        self.linear_2 = nn.Linear(widening * channels, channels)
        degrees = torch.arange(lmax + 1).repeat_interleave(2 * torch.arange(lmax + 1) + 1)
        self.register_buffer("degrees", degrees, persistent=False)

    def forward(
        self,
        x: Tensor,
        basis: Tensor,
        harmonics: Tensor,
        weighted: Tensor,
        at_targets: Tensor,
        edge_index: EdgeIndex,
    ) -> Tensor:
        """Return features (n_atoms, n_directions, C), updated.

        Args:
            x: Features.
            basis: Of kernels, (n_edges, n_directions, B).
            harmonics: Of each direction, (n_atoms, n_directions, n_sph).
            weighted: The same as sums over directions take it, (n_atoms, n_sph, n_directions).
            at_targets: Of the directions of each edge's target, (n_edges, n_directions, n_sph).
            edge_index: Row 0 is the source, row 1 the target.
        """
        source, target = edge_index
        moments = (weighted @ x) * self.between[self.degrees]  # (n_atoms, n_sph, C)
        read = at_targets @ moments.index_select(0, source)  # (n_edges, n_directions, C)
        y = self.stay * x + segment_sum(self.kernel(basis) * read, target, len(x))
        y = y + harmonics @ ((weighted @ y) * self.within[self.degrees])
        y = self.norm(y + self.bias)
        return x + self.linear_2(silu(self.linear_1(y)))


def at_directions(ends: Tensor, directions: Directions) -> Tensor:
    """Return features of edges (n_edges, C) at the directions they give, zeros at others."""
    index = directions.edge.clamp_min(0).flatten()
    values = ends.index_select(0, index) if len(ends) else ends.new_zeros(len(index), ends.shape[1])
    return values.view(*directions.edge.shape, -1) * directions.present[:, :, None]


def powers_of_cosines(units: Tensor, target: Tensor, directions: Directions) -> Tensor:
    """Return 1, c, c², ... of each edge and direction, and whether a neighbour is there.

    Args:
        units: Of edges, (n_edges, 3).
        target: Of edges, (n_edges,).
        directions: Of all atoms.

    Returns:
        (n_edges, n_directions, 5).
    """
    cosine = directions.vectors.index_select(0, target) @ units[:, :, None]
    present = directions.present.index_select(0, target)[:, :, None].to(units.dtype)
    return torch.cat([*(cosine**power for power in range(_POWERS)), present], dim=2)
