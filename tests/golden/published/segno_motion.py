"""SEGNO's Motion form: free particles, rigid sticks and hinges carried ahead by learned forces.

The third code base of SEGNO (see segno.py; reference yliukj/SEGNO, commit 46e748b), after GMN
(Huang et al., ICLR 2022, arXiv:2203.06442): forces are computed on all particles, the two ends of a
stick move as one body, and two particles turn about the pivot of a hinge, so lengths are kept. The
published experiment has sticks and no hinges. For parity with published weights; what the
reference does and we would not:

* steps have length one, whatever their number: fewer steps shorten the horizon;
* the factor of a stick's central acceleration, a network of the normalised squared force, is a
  constant but for the smallest forces, for a single number normalised is one;
* velocity gates are in its weights but take part in the spin of a hinge's arms only;
* its learnable sticks, which would not keep their length, raise a NameError and are left out.
"""

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from atomeq.nn.mlp import MLP
from atomeq.nn.pair_mlp import PairMLP
from atomeq.ops.segment.operations import segment_mean, segment_sum
from atomeq.typing import EdgeIndex, Positions

Sticks = Int[Tensor, "n_sticks 2"]  # the two particles at the ends
Hinges = Int[Tensor, "n_hinges 3"]  # the pivot, and the particles at the ends of its two arms
LARGEST_PULL = 100.0  # of one neighbour on one coordinate
SMALLEST_ANGLE = 1e-5  # of a turn, whose axis is undefined at zero


class SEGNOMotion(nn.Module):
    """Carries particles and sticks over num_steps steps of one shared layer.

    Args:
        n_inputs: Input features of a particle.
        n_edge_features: Features given with each edge.
        hidden_channels: Channels of particles and messages.
        num_steps: Steps, each one unit of time long.
        residual: Features change by what the layer gives; else they become it.
        normalize: Divide directions by their length plus one.
        tanh: Bound the strength of a pull to +-1.
        pull_scale: Factor of the force, ``coords_weight`` of the reference.
    """

    def __init__(
        self,
        n_inputs: int = 2,
        n_edge_features: int = 3,
        *,
        hidden_channels: int = 64,
        num_steps: int = 6,
        residual: bool = True,
        normalize: bool = False,
        tanh: bool = False,
        pull_scale: float = 1.0,
    ) -> None:
        super().__init__()
        channels = hidden_channels
        self.num_steps = num_steps
        self.residual = residual
        self.normalize = normalize
        self.pull_scale = pull_scale
        self.embedding = nn.Linear(n_inputs, channels)
        self.edge_mlp = PairMLP(channels, 1 + n_edge_features)
        final = nn.Linear(channels, 1, bias=False)
        nn.init.xavier_uniform_(final.weight, gain=1e-3)
        bound = [nn.Tanh()] if tanh else []
        self.coord_mlp = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), final, *bound)
        self.node_mlp = MLP((3 * channels, channels, channels))
        self.f_stick_mlp = MLP((1, channels, 1))
        self.f_hinge_mlp = MLP((9, channels, 3))
        self.coord_mlp_w_vel = MLP((channels, channels, 1))

    def forward(
        self,
        pos: Positions,
        velocities: Tensor,
        node_features: Tensor,
        edge_features: Tensor,
        edge_index: EdgeIndex,
        sticks: Sticks,
        hinges: Hinges | None = None,
    ) -> tuple[Positions, Tensor]:
        """Return positions and velocities, each (n_atoms, 3), after all steps.

        Args:
            pos: Positions, (n_atoms, 3).
            velocities: Velocities, (n_atoms, 3).
            node_features: Invariants of each particle, (n_atoms, n_inputs).
            edge_features: Invariants of each pair, (n_edges, n_edge_features).
            edge_index: Row 0 is j, row 1 is i and receives.
            sticks: Ends of each stick, (n_sticks, 2).
            hinges: Pivot and ends of each hinge, (n_hinges, 3). All other particles are free.

        Raises:
            ValueError: A particle belongs to more than one stick or hinge.
        """
        bodies = (
            sticks.flatten() if hinges is None else torch.cat([sticks.flatten(), hinges.flatten()])
        )
        if len(bodies) != len(bodies.unique()):
            raise ValueError("a particle belongs to one stick or one hinge, not to several")
        h = self.embedding(node_features)
        for _ in range(self.num_steps):
            after, force = self.force(h, pos, edge_features, edge_index)
            moved = self.advance(pos, velocities, force, sticks)
            if hinges is not None and len(hinges):
                moved = self.swing(h, (pos, velocities, force), moved, hinges)
            h, (pos, velocities) = after, moved  # hinges turn by the features of before
        return pos, velocities

    def force(
        self, h: Tensor, pos: Positions, edge_features: Tensor, edge_index: EdgeIndex
    ) -> tuple[Tensor, Tensor]:
        """Return updated features (n_atoms, C) and the force on each particle (n_atoms, 3)."""
        source, target = edge_index
        separation = pos.index_select(0, target) - pos.index_select(0, source)  # towards receivers
        squared = (separation**2).sum(dim=1, keepdim=True)
        m = self.edge_mlp(h, torch.cat([squared, edge_features], dim=1), edge_index)
        if self.normalize:
            separation = separation / (squared.sqrt() + 1.0)
        pull = (separation * self.coord_mlp(m)).clamp(-LARGEST_PULL, LARGEST_PULL)
        total = segment_sum(m, target, len(h))
        new = self.node_mlp(torch.cat([h, h, total], dim=1))
        force = self.pull_scale * segment_mean(pull, target, len(h))
        return h + new if self.residual else new, force

    def advance(
        self, pos: Positions, velocities: Tensor, force: Tensor, sticks: Sticks
    ) -> tuple[Positions, Tensor]:
        """Return positions and velocities a step later, sticks as rigid bodies."""
        free_velocities = velocities + force
        free_pos = pos + free_velocities
        if len(sticks) == 0:
            return free_pos, free_velocities
        ends = sticks.flatten()
        # (n_sticks, 2, 3): both ends of each stick, as seen from its centre
        centre, arms = _centred(pos[sticks])
        centre_velocity, arm_velocities = _centred(velocities[sticks])
        inertia = (arms**2).sum(dim=(1, 2))[:, None]
        spin = torch.linalg.cross(arms, arm_velocities).sum(dim=1) / inertia
        spin = spin + torch.linalg.cross(arms, force[sticks]).sum(dim=1) / inertia
        squared_force = (force[sticks] ** 2).sum(dim=-1, keepdim=True)
        factor = self.f_stick_mlp(normalize(squared_force, dim=-1))
        centre_velocity = centre_velocity + (factor * force[sticks]).mean(dim=1)
        centre = centre + centre_velocity
        arms = _turned(arms, spin[:, None, :])
        end_pos = centre[:, None] + arms
        turning = torch.linalg.cross(spin[:, None, :].expand_as(arms), arms)
        end_velocities = centre_velocity[:, None] + turning
        return (
            free_pos.index_copy(0, ends, end_pos.flatten(0, 1)),
            free_velocities.index_copy(0, ends, end_velocities.flatten(0, 1)),
        )

    def swing(
        self,
        h: Tensor,
        before: tuple[Positions, Tensor, Tensor],
        moved: tuple[Positions, Tensor],
        hinges: Hinges,
    ) -> tuple[Positions, Tensor]:
        """Return positions and velocities with the particles of hinges where their arms bring them.

        Args:
            h: Features, (n_atoms, C).
            before: Positions, velocities and forces at the start of the step, each (n_atoms, 3).
            moved: Positions and velocities of all other particles at its end.
            hinges: Pivot and ends of each hinge, (n_hinges, 3).
        """
        pos, velocities, force = (tensor[hinges] for tensor in before)  # (n_hinges, 3, 3)
        arms, arm_velocities = pos - pos[:, :1], velocities - velocities[:, :1]
        basis = torch.stack(
            [force, arms, arm_velocities], dim=-1
        )  # (n_hinges, 3 bodies, 3 axes, 3)
        gram = (basis.transpose(-1, -2) @ basis).flatten(-2)
        weights = self.f_hinge_mlp(normalize(gram, dim=-1))  # (n_hinges, 3 bodies, 3)
        acceleration = (basis @ weights[..., None])[..., 0].mean(dim=1)  # of the pivot
        pivot_velocity = velocities[:, 0] + acceleration
        pivot = pos[:, 0] + pivot_velocity

        arms, arm_velocities = arms[:, 1:], arm_velocities[:, 1:]  # (n_hinges, 2 arms, 3)
        squared = (arms**2).sum(dim=-1, keepdim=True)
        torque = torch.linalg.cross(arms, force[:, 1:] - acceleration[:, None])
        spin = torch.linalg.cross(arms, arm_velocities) / squared
        spin = self.coord_mlp_w_vel(h[hinges[:, 1:]]) * spin + torque / squared
        arms = _turned(arms, spin)
        ends = pivot[:, None] + arms
        end_velocities = pivot_velocity[:, None] + torch.linalg.cross(spin, arms)
        particles = hinges.flatten()
        new_pos = torch.cat([pivot[:, None], ends], dim=1).flatten(0, 1)
        new_velocities = torch.cat([pivot_velocity[:, None], end_velocities], dim=1).flatten(0, 1)
        return (
            moved[0].index_copy(0, particles, new_pos),
            moved[1].index_copy(0, particles, new_velocities),
        )


def _centred(ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of two ends (n_sticks, 3), and the ends relative to it (n_sticks, 2, 3)."""
    centre = ends.mean(dim=1)
    return centre, ends - centre[:, None]


def _turned(arms: Tensor, spin: Tensor) -> Tensor:
    """Turn vectors about an axis by its length in radians (Rodrigues)."""
    angle = torch.linalg.vector_norm(spin, dim=-1, keepdim=True).clamp(min=SMALLEST_ANGLE)
    axis = (spin / angle).expand_as(arms)
    along = axis * (axis * arms).sum(dim=-1, keepdim=True)
    across = torch.linalg.cross(axis, arms)
    return arms * torch.cos(angle) + across * torch.sin(angle) + along * (1 - torch.cos(angle))


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the reference's weights, and leave out those that take no part in the motion."""
    used = ("embedding.", "edge_mlp.", "coord_mlp.", "node_mlp.", "f_stick_mlp.")
    used = (*used, "f_hinge_mlp.", "coord_mlp_w_vel.")
    renamed = {name.removeprefix("module."): weight for name, weight in state_dict.items()}
    return {name: weight for name, weight in renamed.items() if name.startswith(used)}
