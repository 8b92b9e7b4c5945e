"""EquiformerV3: equivariant graph attention whose nonlinearities are products on the sphere.

Liao, Wood, Das and Smidt, 2026, arXiv:2604.09130. EquiformerV2 with a nonlinearity that a grid
resolves exactly, the product of two functions on the sphere with gates, in messages and in
feed-forward networks; with one normalisation for all degrees, a radial weight for each degree and
channel, an envelope at the cutoff, and an energy read from scalars.

Our default form differs from the published one on purpose, each time by an option:

* ``chiral`` is off: SO(2) maps have real weights, so mirror images have one energy;
* ``max_neighbors`` is off: a cap makes the energy jump when two neighbours swap ranks;
* ``attn_epsilon`` is None: the softmax has an empty seat, so the last neighbour fades out by it;
* ``grid_mlp`` is off: the linear maps on the grid, which commute with the way there and back, are
  one with those in front of and behind it;
* ``direct_forces`` is off, the energy is a plain sum over atoms, ``radial_basis`` is Bessel's.

In both forms the derivative with respect to an edge's direction is a torque, exact for every
direction (the published code cuts it within 0.08 degrees of the y axis), structures without edges
are computed, and each structure has its own periodicity. Weights of the published form fit, those
for denoising apart, which no structure without noise feels.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import outputs_of, refuse_nonpositive
from atomeq.models.transformer import EquivariantTransformer
from atomeq.nn.activations import PAIRED, ActivationName, ScalarsAndSphere
from atomeq.nn.attention import Weighing
from atomeq.nn.feed_forward import FeedForward, Nonlinearity
from atomeq.nn.mlp import MLP
from atomeq.nn.norms import NormName
from atomeq.nn.so3 import SO3Linear
from atomeq.nn.sphere import GridResolution, set_resolution, with_scalars
from atomeq.nn.stress import stress_head_of
from atomeq.ops.atoms.operations import so3_linear
from atomeq.ops.orders import check_orders
from atomeq.typing import NodeFeatures


class EquiformerV3(EquivariantTransformer):
    """Equivariant transformer; conservative by default, with heads as published for pre-training.

    Args:
        cutoff: Radius of the graph, Å.
        lmax: Highest degree of the atom features.
        mmax: Highest order kept in the edge frame, at most ``lmax``.
        num_layers: Transformer blocks.
        sphere_channels: Channels of the atom features.
        attn_hidden_channels: Channels of messages.
        num_heads: Attention heads.
        attn_alpha_channels: Invariants of each head from which its attention logit is made.
        attn_value_channels: Channels of each head's values.
        ffn_hidden_channels: Channels inside feed-forward networks and heads.
        edge_channels: Width of networks of the edge length and of element embeddings in them.
        num_elements: Atomic numbers below this are embedded.
        radial_basis: ``bessel`` or ``gaussian``.
        num_radial: Functions in it.
        norm: Of features (:mod:`atomeq.nn.norms`).
        logit_norm: Of invariants in front of logits: ``layer_norm``, ``rms_norm`` or ``none``.
        activation: Of messages (:mod:`atomeq.nn.activations`).
        feed_forward: Of feed-forward networks (:class:`~atomeq.nn.feed_forward.FeedForward`).
        grid_mlp: Make them of linear maps on the grid too (:class:`FactoredFeedForward`).
        attn_grid: Polar angles and azimuths of the grid of messages. None is the least that is
            exact for products; no weight depends on it.
        ffn_grid: Likewise of feed-forward networks.
        element_pairs: Let networks of the edge length see the elements at its ends.
        shared_radial: Use one radial weight for all m of a degree.
        add_merge: Add the features of both atoms in a message; else they lie side by side.
        softcap: Bounds logits smoothly.
        silu_logits: SiLU in front of logits in place of a smooth leaky ReLU.
        attn_epsilon: As published, beside the sum of attention weights
            (:class:`~atomeq.nn.attention.Weighing`).
        chiral: Let +m and -m mix, which commutes with rotations but not with reflections.
        envelope: End messages smoothly at the cutoff.
        max_neighbors: Keep this many nearest neighbours; None keeps all.
        strict_neighbors: Keep exactly so many, and not equally far ones beyond
            (:class:`~atomeq.graph.builders.NearestNeighborGraph`).
        direct_forces: Forces from a head of their own, no derivative of the energy.
        force_activation: Of that head.
        direct_stress: Stress from a head of its own.
        avg_degree: Typical count of neighbours, dividing their sum in the degree embedding.
        energy_divisor: Divides the energy; as published for OC20 a typical count of atoms.
        alpha_drop: Dropout of attention weights.
        drop_path: Probability that a structure skips a block's branch.
        proj_drop: Dropout of channels after each branch.

    Raises:
        ValueError: ``mmax`` is not between 0 and ``lmax``, or a divisor is not positive.
    """

    feed_forward: Nonlinearity
    grid_mlp: bool
    ffn_grid: GridResolution

    def __init__(
        self,
        cutoff: float = 6.0,
        *,
        lmax: int = 3,
        mmax: int = 2,
        num_layers: int = 4,
        sphere_channels: int = 64,
        attn_hidden_channels: int = 32,
        num_heads: int = 8,
        attn_alpha_channels: int = 32,
        attn_value_channels: int = 16,
        ffn_hidden_channels: int = 128,
        edge_channels: int = 64,
        num_elements: int = 119,
        radial_basis: Literal["bessel", "gaussian"] = "bessel",
        num_radial: int = 8,
        norm: NormName = "rms_norm_sh",
        logit_norm: Literal["layer_norm", "rms_norm", "none"] = "layer_norm",
        activation: ActivationName = "product",
        feed_forward: Nonlinearity = "product",
        grid_mlp: bool = False,
        attn_grid: GridResolution = None,
        ffn_grid: GridResolution = None,
        element_pairs: bool = True,
        shared_radial: bool = True,
        add_merge: bool = False,
        softcap: float | None = None,
        silu_logits: bool = False,
        attn_epsilon: float | None = None,
        chiral: bool = False,
        envelope: bool = True,
        max_neighbors: int | None = None,
        strict_neighbors: bool = True,
        direct_forces: bool = False,
        force_activation: ActivationName = "gate",
        direct_stress: bool = False,
        avg_degree: float = 40.0,
        energy_divisor: float = 1.0,
        alpha_drop: float = 0.0,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(cutoff)
        check_orders(lmax, mmax)
        refuse_nonpositive(avg_degree=avg_degree, energy_divisor=energy_divisor)
        self.keep_arguments(locals())
        self.receptive_depth = num_layers + 1  # atoms start from their neighbours
        self.outputs = outputs_of(forces=direct_forces, stress=direct_stress)
        self._make_trunk(
            Weighing(norm=logit_norm, silu=silu_logits, softcap=softcap, epsilon=attn_epsilon),
            attn_grid,
            own_elements=num_elements if element_pairs else None,
        )
        self.energy = MLP((sphere_channels, ffn_hidden_channels, 1))
        forces = (1, force_activation, attn_grid)
        self.forces = self._attention(*forces) if direct_forces else None
        head = "equivariant" if direct_stress else None
        self.stress = stress_head_of(head, lmax, sphere_channels, ffn_hidden_channels, norm)

    def set_grid_resolution(self, grid_resolution: int | None) -> None:
        """Compute on other grids; where products are exact, finer ones change nothing."""
        self.attn_grid = self.ffn_grid = grid_resolution
        set_resolution(self, grid_resolution)

    def _energies(self, x: NodeFeatures, graph: AtomGraph) -> tuple[Tensor, Tensor]:
        energies, features = self.energy.with_hidden(x[:, 0])
        return energies[:, 0] / self.energy_divisor, features

    def _feed_forward(self) -> nn.Module:
        sizes = (self.lmax, self.sphere_channels, self.ffn_hidden_channels)
        if self.grid_mlp:
            return FactoredFeedForward(
                *sizes, nonlinearity=self.feed_forward, grid_resolution=self.ffn_grid
            )
        return FeedForward(
            *sizes,
            self.sphere_channels,
            nonlinearity=self.feed_forward,
            grid_resolution=self.ffn_grid,
        )


class FactoredFeedForward(nn.Module):
    """The published feed-forward network, with linear maps of its own on the grid.

    They are linear in the channels, the ways to the grid and back in the coefficients: they
    commute, so each is multiplied into the map per degree beside it, and no grid sees them.

    Args:
        lmax: Highest degree of the features.
        channels: Channels in and out.
        hidden_channels: Channels on the grid.
        nonlinearity: One of two functions on the sphere (:mod:`atomeq.nn.activations`).
        grid_resolution: Polar angles and azimuths.

    Raises:
        ValueError: The nonlinearity does not take two functions.
    """

    def __init__(
        self,
        lmax: int,
        channels: int,
        hidden_channels: int,
        *,
        nonlinearity: Nonlinearity,
        grid_resolution: GridResolution,
    ) -> None:
        super().__init__()
        if nonlinearity not in PAIRED:
            raise ValueError(
                f"grid_mlp is of {', '.join(PAIRED)}, not of {nonlinearity!r}; for SiLU on the "
                "sphere there is feed_forward: grid_mlp"
            )
        self.activation = ScalarsAndSphere(
            nonlinearity, lmax, lmax, hidden_channels, grid_resolution=grid_resolution
        )
        width = self.activation.in_channels
        n_scalars, n_gates = self.activation.sizes
        self.first = SO3Linear(lmax, channels, hidden_channels)
        self.scalars = nn.Linear(channels, n_scalars) if n_scalars else None
        self.gates = nn.Linear(channels, n_gates) if n_gates else None
        self.grid_first = nn.Linear(hidden_channels, width, bias=False)
        self.grid_second = nn.Linear(hidden_channels, hidden_channels, bias=False)
        self.second = SO3Linear(lmax, hidden_channels, channels)

    def forward(self, x: NodeFeatures) -> NodeFeatures:
        """Map ``x`` (n_atoms, n_sph, channels) to the same shape."""
        act, invariants = self.activation, x[:, 0]
        inward, outward = self.grid_first.weight, self.grid_second.weight
        y = so3_linear(x, inward @ self.first.weight, inward @ self.first.bias)
        y = act.on_sphere(y)  # (n_atoms, n_sph, hidden)
        if self.gates is not None:
            y = y * torch.sigmoid(self.gates(invariants)).unsqueeze(1)
        y = so3_linear(y, self.second.weight @ outward)  # (n_atoms, n_sph, channels)
        if self.scalars is None:
            return with_scalars(y, y[:, 0] + self.second.bias)
        scalars = act.of_scalars(self.scalars(invariants))
        return act.meet(y, nn.functional.linear(scalars, self.second.weight[0], self.second.bias))
