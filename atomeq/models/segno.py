"""SEGNO: Second-order Equivariant Graph Neural Ordinary differential equation.

Liu, Cheng, Li, Dai, Tian and Rong, ICLR 2024, arXiv:2308.13212. Particles obey d²x/dt² = a(h, x)
with a learned, equivariant a; one layer, with the same weights at every step, is integrated by a
symplectic scheme over a horizon. Two uses: :class:`SEGNOPropagator` carries particles a long step
ahead, :class:`SEGNO` reads an energy from the features that the motion leaves behind.

The reference (yliukj/SEGNO, commit 46e748b) has three code bases under this name; its N-body and
MD22 forms are options of the propagator (:func:`nbody_form`, :func:`md22_form`); the Motion form,
rigid sticks and hinges, stands beside its golden cases. What they do, and our defaults instead:

* N-body: the time step is 1/8 whatever the number of steps, so that fewer steps silently shorten
  the horizon. Here the step is horizon / num_steps, and the features' own rate does not depend on
  it, so the number of steps can be changed after training.
* MD22: velocities are multiplied by a gate in each step of length one, which is no discretised ODE.
  ``velocity_gate`` is off by default.
* Pulls are clipped by component, which is not equivariant where it acts; ``largest_pull`` is off by
  default.
* The mean over neighbours jumps when one crosses a cutoff. The propagator's edges are given and
  stay; the energy model divides by a constant and ends every message in an envelope.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import InvariantReadout, Propagator, refuse_nonpositive
from atomeq.nn.mlp import MLP
from atomeq.nn.pair_mlp import PairMLP
from atomeq.nn.radial import BesselBasis, PolynomialEnvelope
from atomeq.ops.segment.operations import segment_sum
from atomeq.typing import EdgeIndex, EdgeVectors, Positions

LARGEST_PULL = 100.0  # of one neighbour on one coordinate, as published
Integrator = Literal["symplectic_euler", "leapfrog"]


class Motion(NamedTuple):
    """Particles at one time: features (n_atoms, C), positions and velocities (n_atoms, 3)."""

    h: Tensor
    pos: Positions
    velocities: Tensor


class SEGNOPropagator(Propagator):
    """Carries particles over a horizon by integrating a learned second-order ODE.

    Args:
        n_inputs: Input features of a particle.
        n_edge_features: Features given with each edge.
        hidden_channels: Channels of particles and messages.
        num_steps: Steps of the integrator.
        horizon: Time that passes, in the unit of the velocities.
        feature_rate: Rate at which features change, per unit of time.
        integrator: ``symplectic_euler`` as published, of first order in the step; ``leapfrog``
            drifts half a step before and after each kick and is of second order. It looks twice at
            the particles in each step, where their features change.
        velocity_gate: Multiply velocities by a function of the features in each step.
        normalize: Divide directions by their length plus one.
        final_bias: Give the strength of a pull a bias.
        largest_pull: Bound of each component of a neighbour's pull; not equivariant where it acts.
        residual: Features change by what the layer gives; else they become it, as published where
            ``recurrent`` is off, whatever the length of a step.
        tanh: Bound the strength of a pull to +-1.
        pull_scale: Factor of the mean pull, ``coords_weight`` of the reference.

    Raises:
        ValueError: Steps or horizon are not positive, or there is no such integrator.
    """

    def __init__(
        self,
        n_inputs: int = 1,
        n_edge_features: int = 2,
        *,
        hidden_channels: int = 64,
        num_steps: int = 8,
        horizon: float = 1.0,
        feature_rate: float = 8.0,
        integrator: Integrator = "symplectic_euler",
        velocity_gate: bool = False,
        normalize: bool = False,
        final_bias: bool = True,
        largest_pull: float | None = None,
        residual: bool = True,
        tanh: bool = False,
        pull_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if num_steps < 1 or horizon <= 0:
            raise ValueError(f"{num_steps} steps over a horizon of {horizon}: both must be > 0")
        if integrator not in get_args(Integrator):
            raise ValueError(
                f"integrator {integrator!r} is unknown; there are {', '.join(get_args(Integrator))}"
            )
        self.keep_arguments(locals())
        self.integrator: Integrator = integrator
        self.num_steps = num_steps
        self.horizon = horizon
        self.feature_rate = feature_rate
        self.residual = residual
        self.pull_scale = pull_scale
        self.embedding = nn.Linear(n_inputs, hidden_channels)
        self.layer = Acceleration(
            hidden_channels,
            n_edge_features,
            velocity_gate=velocity_gate,
            normalize=normalize,
            final_bias=final_bias,
            largest_pull=largest_pull,
            tanh=tanh,
        )

    def forward(
        self,
        pos: Positions,
        velocities: Tensor,
        node_features: Tensor,
        edge_features: Tensor,
        edge_index: EdgeIndex,
    ) -> tuple[Positions, Tensor]:
        """Return positions and velocities, each (n_atoms, 3), a horizon ahead."""
        motion = Motion(self.embedding(node_features), pos, velocities)
        for step in self.trajectory(motion, edge_features, edge_index):
            motion = step
        return motion.pos, motion.velocities

    def trajectory(
        self, motion: Motion, edge_features: Tensor, edge_index: EdgeIndex
    ) -> Iterator[Motion]:
        """Yield the state after each step of the integrator.

        Args:
            motion: The state at the start, its features already embedded.
            edge_features: Constant features of the edges, (n_edges, n_edge_features).
            edge_index: Row 0 is j, row 1 is i and receives.
        """
        dt = self.horizon / self.num_steps
        leapfrog = self.integrator == "leapfrog"
        drift_before = dt / 2 if leapfrog else 0.0
        growth = dt * self.feature_rate
        n_atoms = motion.h.shape[0]
        counts = motion.pos.new_zeros(n_atoms).index_add(
            0, edge_index[1], motion.pos.new_ones(edge_index.shape[1])
        )
        share = self.pull_scale / counts.clamp(min=1.0)[:, None]  # of a sum: the mean
        h, pos, velocities = motion
        for _ in range(self.num_steps):
            if drift_before:
                pos = pos + drift_before * velocities
            pull, h_rate, gate = self.layer(h, pos, edge_features, edge_index)
            if (
                leapfrog and self.feature_rate and self.residual
            ):  # midpoint rule, or the features are of first order
                middle = h + growth / 2 * h_rate
                pull, h_rate, gate = self.layer(middle, pos, edge_features, edge_index)
            if gate is not None:
                velocities = gate * velocities
            velocities = velocities + dt * share * pull
            pos = pos + (dt - drift_before) * velocities
            h = h + growth * h_rate if self.residual else h_rate
            yield Motion(h, pos, velocities)


class Acceleration(nn.Module):
    """The right-hand side: the pull of the neighbours and the rate of the features."""

    def __init__(
        self,
        channels: int,
        n_edge_features: int,
        *,
        velocity_gate: bool,
        normalize: bool,
        final_bias: bool,
        largest_pull: float | None,
        tanh: bool,
    ) -> None:
        super().__init__()
        self.normalize = normalize
        self.largest_pull = largest_pull
        self.edge_mlp = PairMLP(channels, 1 + n_edge_features)
        self.node_mlp = MLP((2 * channels, channels, channels))
        final = nn.Linear(channels, 1, bias=final_bias)
        nn.init.xavier_uniform_(final.weight, gain=1e-3)
        bound = [nn.Tanh()] if tanh else []
        self.coord_mlp = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), final, *bound)
        self.coord_mlp_vel = MLP((channels, channels, 1)) if velocity_gate else None

    def forward(
        self, h: Tensor, pos: Positions, edge_features: Tensor, edge_index: EdgeIndex
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return summed pulls (n_atoms, 3), feature rates (n_atoms, C), velocity gates or None."""
        source, target = edge_index
        separation = pos.index_select(0, target) - pos.index_select(0, source)  # towards receivers
        squared = (separation**2).sum(dim=1, keepdim=True)
        m = self.edge_mlp(h, torch.cat([squared, edge_features], dim=1), edge_index)
        if self.normalize:
            separation = separation / (squared.sqrt() + 1.0)
        pull = separation * self.coord_mlp(m)
        if self.largest_pull is not None:
            pull = pull.clamp(-self.largest_pull, self.largest_pull)
        # One scatter for both sums: a second one costs as much again.
        total = segment_sum(torch.cat([m, pull], dim=1), target, h.shape[0])
        m_total, pull_total = total.split([m.shape[1], 3], dim=1)
        gate = None if self.coord_mlp_vel is None else self.coord_mlp_vel(h)
        return pull_total, self.node_mlp(torch.cat([h, m_total], dim=1)), gate


def nbody_form(num_steps: int = 8, **options: Any) -> SEGNOPropagator:
    """Return the published N-body form, whose step is 1/8 for any number of steps."""
    return SEGNOPropagator(
        num_steps=num_steps,
        horizon=num_steps / 8,
        feature_rate=8.0,
        largest_pull=LARGEST_PULL,
        **options,
    )


def md22_form(num_steps: int = 5, **options: Any) -> SEGNOPropagator:
    """Return the published MD22 form: gated velocities, steps of length one."""
    return SEGNOPropagator(
        num_steps=num_steps,
        horizon=float(num_steps),
        feature_rate=1.0,
        velocity_gate=True,
        final_bias=False,
        largest_pull=LARGEST_PULL,
        **options,
    )


def from_official(state_dict: dict[str, Tensor], model: SEGNOPropagator) -> dict[str, Tensor]:
    """Rename the reference's weights, and leave out those that it never uses.

    These are ``forget`` in the MD22 form and the velocity gate in the N-body form.
    """
    dead = ("forget.",) if model.layer.coord_mlp_vel is not None else ("module.coord_mlp_vel.",)
    return {
        f"layer.{name.removeprefix('module.')}" if name.startswith("module.") else name: weight
        for name, weight in state_dict.items()
        if not name.startswith(dead)
    }


class SEGNO(InvariantReadout):
    """An energy from the features of atoms that moved for a horizon, starting at rest.

    Args:
        cutoff: Radius of the graph, Å.
        num_steps: Steps of the symplectic Euler scheme; all share one layer.
        horizon: Time that passes, in the network's own unit.
        feature_rate: Rate at which features change, per unit of time.
        hidden_channels: Channels of atoms and messages.
        num_radial: Bessel functions of the edge length.
        avg_num_neighbors: Sums over neighbours are divided by its square root.
        num_elements: Atomic numbers below this are embedded.
    """

    def __init__(
        self,
        cutoff: float = 5.0,
        *,
        num_steps: int = 4,
        horizon: float = 1.0,
        feature_rate: float = 4.0,
        hidden_channels: int = 128,
        num_radial: int = 16,
        avg_num_neighbors: float = 20.0,
        num_elements: int = 119,
    ) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.num_steps = self.receptive_depth = num_steps
        self.horizon = horizon
        self.feature_rate = feature_rate
        self.hidden_channels = hidden_channels
        self.num_radial = num_radial
        refuse_nonpositive(avg_num_neighbors=avg_num_neighbors)
        self.avg_num_neighbors = avg_num_neighbors
        self.num_elements = num_elements

        self.embedding = nn.Embedding(num_elements, hidden_channels)
        self.basis = BesselBasis(num_radial, cutoff)
        self.envelope = PolynomialEnvelope(cutoff)
        self.layer = SmoothAcceleration(hidden_channels, num_radial + 1)
        self.energy = MLP((hidden_channels, hidden_channels, 1), zero_output=True)

    def node_features(self, graph: AtomGraph) -> Tensor:
        """Return the atoms at the end of the motion, (n_atoms, hidden_channels)."""
        source, target = graph.edge_index
        vectors = graph.edge_vectors().to(self.dtype)  # (n_edges, 3)
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        basis = self.basis(lengths)
        envelope = self.envelope(lengths)[:, None] / math.sqrt(self.avg_num_neighbors)

        dt = self.horizon / self.num_steps
        h = self.with_state(self.embedding(graph.atomic_numbers), graph)  # (n_atoms, C)
        moved = vectors.new_zeros(graph.n_atoms, 3)  # displacements keep a crystal's edges defined
        velocities = torch.zeros_like(moved)
        for _ in range(self.num_steps):
            separation = vectors + moved.index_select(0, source) - moved.index_select(0, target)
            squared = (separation**2).sum(dim=1, keepdim=True) / self.cutoff**2
            invariants = torch.cat([basis, squared], dim=1)  # (n_edges, num_radial + 1)
            pull, h_rate = self.layer(h, separation, invariants, envelope, graph.edge_index)
            velocities = velocities + dt * pull
            moved = moved + dt * velocities
            h = h + dt * self.feature_rate * h_rate
        return h


class SmoothAcceleration(nn.Module):
    """The right-hand side of the energy model: messages and pulls that vanish at the cutoff."""

    def __init__(self, channels: int, n_invariants: int) -> None:
        super().__init__()
        self.message = PairMLP(channels, n_invariants)
        final = nn.Linear(channels, 1)
        self.strength = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), final)
        self.update = MLP((2 * channels, channels, channels))
        # As in EGNN: atoms start to move by little, or long horizons are unstable.
        nn.init.xavier_uniform_(final.weight, gain=1e-3)
        nn.init.zeros_(final.bias)

    def forward(
        self,
        h: Tensor,
        separation: EdgeVectors,
        invariants: Tensor,
        envelope: Tensor,
        edge_index: EdgeIndex,
    ) -> tuple[Tensor, Tensor]:
        """Return accelerations (n_atoms, 3) and the rates of the features (n_atoms, C)."""
        m = self.message(h, invariants, edge_index) * envelope
        direction = separation * torch.rsqrt((separation**2).sum(dim=1, keepdim=True) + 1.0)
        # The envelope is applied once more: the strength has biases and must end at the cutoff.
        pull = direction * self.strength(m) * envelope
        total = segment_sum(torch.cat([m, pull], dim=1), edge_index[1], h.shape[0])
        m_total, acceleration = total.split([m.shape[1], 3], dim=1)
        return acceleration, self.update(torch.cat([h, m_total], dim=1))
