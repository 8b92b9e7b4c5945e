"""EquiformerV2: Improved Equivariant Transformer for Scaling to Higher-Degree Representations.

Liao, Wood, Das and Smidt, ICLR 2024, arXiv:2306.12059. A transformer whose attention values are
eSCN convolutions: messages are made in a frame whose polar axis is their edge.

Our default form differs from the published one on purpose, each time by an option:

* ``envelope``: attention weights end in a polynomial, so the energy is smooth at the cutoff, and
  ``max_neighbors`` is off: a cap makes the energy jump when two neighbours swap ranks;
* ``activation`` and ``feed_forward`` are gates, not SiLU on a grid on the sphere: equivariance is
  exact and the roll of the edge frame cannot be seen;
* ``chiral`` is off: SO(2) maps have real weights, so mirror images have one energy;
* ``direct_forces`` is off: forces and stress are derivatives of the energy;
* the energy is a plain sum over atoms (``energy_divisor``), ``radial_basis`` is Bessel's.

The published form, to which :mod:`atomeq.potential.import_official` translates a configuration,
is compatible with published weights. In both the frame's roll is fixed, where the reference code
draws it at random; ``edge_rotation`` feeds one in.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import outputs_of, refuse_nonpositive
from atomeq.models.transformer import EquivariantTransformer
from atomeq.nn.activations import ActivationName
from atomeq.nn.attention import Weighing
from atomeq.nn.feed_forward import FeedForward, Nonlinearity
from atomeq.nn.norms import NormName
from atomeq.nn.stress import StressHead, stress_head_of
from atomeq.ops.orders import check_orders
from atomeq.typing import NodeFeatures


class EquiformerV2(EquivariantTransformer):
    """Equivariant transformer; conservative by default, with a force head as published.

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
        ffn_hidden_channels: Channels inside feed-forward networks.
        edge_channels: Width of networks of the edge length and of element embeddings in them.
        num_elements: Atomic numbers below this are embedded.
        radial_basis: ``bessel`` or ``gaussian``.
        num_radial: Functions in it.
        norm: ``layer_norm``, ``layer_norm_sh`` or ``rms_norm_sh`` (:mod:`atomeq.nn.norms`).
        activation: Of messages: ``gate``, ``product``, as published ``s2`` or ``separable_s2``
            (:mod:`atomeq.nn.activations`).
        feed_forward: ``gate``, ``product``, as published ``s2``, ``separable_s2``, ``grid_mlp`` or
            ``separable_grid_mlp`` (:class:`~atomeq.nn.feed_forward.FeedForward`).
        grid_resolution: Polar angles and azimuths of the grids on the sphere; even and at least
            2 (lmax + 1). None is the least that resolves the features. No weight depends on it: a
            finer one makes a trained model more equivariant.
        element_pairs: Embed the elements of an edge ``per_block``, ``shared`` by all, or ``none``.
        shared_radial: Use one radial weight for all m of a degree.
        attn_renorm: Layer normalisation in front of attention logits.
        chiral: Let +m and -m mix, which commutes with rotations but not with reflections.
        envelope: End messages smoothly at the cutoff.
        max_neighbors: Keep this many nearest neighbours; None keeps all.
        strict_neighbors: Keep exactly so many, and not equally far ones beyond
            (:class:`~atomeq.graph.builders.NearestNeighborGraph`).
        direct_forces: Forces from a head of their own, no derivative of the energy.
        stress_head: Stress from a head of its own: ``equivariant``, or as published, which is not:
            the options of :class:`~atomeq.nn.stress.Rank2Stress`. None derives it, where forces are
            derived.
        linear_reference: Add a constant for each element to its atoms' energies.
        avg_degree: Typical count of neighbours, dividing their sum in the degree embedding.
        energy_divisor: Divides the energy; as published a typical count of atoms.
        energy_reduce: ``sum`` over atoms by that divisor, or their ``mean``.
        alpha_drop: Dropout of attention weights.
        drop_path: Probability that a structure skips a block's branch.
        proj_drop: Dropout of channels after each branch.

    Raises:
        ValueError: ``mmax`` is not between 0 and ``lmax``, or an option is none of those above.
    """

    feed_forward: Nonlinearity
    energy_reduce: Literal["sum", "mean"]

    def __init__(
        self,
        cutoff: float = 6.0,
        *,
        lmax: int = 3,
        mmax: int = 2,
        num_layers: int = 4,
        sphere_channels: int = 64,
        attn_hidden_channels: int = 64,
        num_heads: int = 8,
        attn_alpha_channels: int = 64,
        attn_value_channels: int = 16,
        ffn_hidden_channels: int = 128,
        edge_channels: int = 64,
        num_elements: int = 119,
        radial_basis: Literal["bessel", "gaussian"] = "bessel",
        num_radial: int = 8,
        norm: NormName = "rms_norm_sh",
        activation: ActivationName = "gate",
        feed_forward: Nonlinearity = "gate",
        grid_resolution: int | None = None,
        element_pairs: Literal["per_block", "shared", "none"] = "per_block",
        shared_radial: bool = False,
        attn_renorm: bool = True,
        chiral: bool = False,
        envelope: bool = True,
        max_neighbors: int | None = None,
        strict_neighbors: bool = True,
        direct_forces: bool = False,
        stress_head: StressHead = None,
        linear_reference: bool = False,
        avg_degree: float = 40.0,
        energy_divisor: float = 1.0,
        energy_reduce: Literal["sum", "mean"] = "sum",
        alpha_drop: float = 0.0,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(cutoff)
        check_orders(lmax, mmax)
        _refuse_unknown(element_pairs=element_pairs, energy_reduce=energy_reduce)
        refuse_nonpositive(avg_degree=avg_degree, energy_divisor=energy_divisor)
        self.keep_arguments(locals())
        self.receptive_depth = num_layers + 1 if energy_reduce == "sum" else None
        self.outputs = outputs_of(forces=direct_forces, stress=stress_head is not None)
        self._make_trunk(
            Weighing(norm="layer_norm" if attn_renorm else "none"),
            grid_resolution,
            own_elements=num_elements if element_pairs == "per_block" else None,
            shared_elements=element_pairs == "shared",
        )
        self.energy = self._feed_forward(1)
        head = (1, activation, grid_resolution)
        self.forces = self._attention(*head) if direct_forces else None
        self.stress = stress_head_of(stress_head, lmax, sphere_channels, ffn_hidden_channels, norm)
        linear = nn.Parameter(torch.zeros(num_elements), requires_grad=False)
        self.linear_energies = linear if linear_reference else None

    def _energies(self, x: NodeFeatures, graph: AtomGraph) -> tuple[Tensor, Tensor]:
        divisor = graph.natoms[graph.batch] if self.energy_reduce == "mean" else self.energy_divisor
        energies, features = self.energy.invariants(x)
        energies = energies[:, 0] / divisor
        if self.linear_energies is not None:
            energies = energies + self.linear_energies[graph.atomic_numbers]
        return energies, features

    def _feed_forward(self, out_channels: int | None = None) -> FeedForward:
        return FeedForward(
            self.lmax,
            self.sphere_channels,
            self.ffn_hidden_channels,
            self.sphere_channels if out_channels is None else out_channels,
            nonlinearity=self.feed_forward,
            grid_resolution=self.grid_resolution,
        )


_CHOICES = {"element_pairs": ("per_block", "shared", "none"), "energy_reduce": ("sum", "mean")}


def _refuse_unknown(**arguments: str) -> None:
    for name, value in arguments.items():
        if value not in _CHOICES[name]:
            raise ValueError(f"{name} is one of {', '.join(_CHOICES[name])}, not {value!r}")
