"""Learning Smooth and Expressive Interatomic Potentials for Physical Property Prediction (eSEN).

Fu, Wood, Barroso-Luque, Levine, Gao, Dzamba and Zitnick, ICML 2025, arXiv:2502.12147. Messages are
eSCN convolutions behind a smooth envelope, atoms are updated by gated linear maps, and forces and
stress are derivatives of the energy: a network made for energy conservation.

Our default form differs from the published one on purpose, each time by an option:

* ``chiral`` and ``bias`` are off: SO(2) maps have real weights, so mirror images have one energy,
  and a whole edge layer is one operation;
* ``feed_forward`` is a gate that can close; published gates pass SiLU before the sigmoid;
* ``envelope`` is on and ``max_neighbors`` off: the energy is smooth at the cutoff;
* ``skip_isolated`` is off: the energy has no step as the last edge of a structure goes;
* ``radial_basis`` is Bessel's.

In both forms the derivative with respect to an edge's direction is a torque, exact for every
direction: the published code differentiates the edge frame and cuts that gradient within 0.08
degrees of the y axis, where its transverse forces are wrong. With ``separable_s2`` messages, which
see the roll of the frame, forces leave the roll out; they are as exact as the grid is fine.
"""

import math
from typing import Literal, cast

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import outputs_of
from atomeq.models.spherical import Edges, MessageBlock, SphericalNetwork, radial_basis_of
from atomeq.nn.activations import ActivationName
from atomeq.nn.edge_convolution import EdgeConvolution
from atomeq.nn.edge_network import DegreeEmbedding
from atomeq.nn.feed_forward import FeedForward, Nonlinearity
from atomeq.nn.mlp import MLP
from atomeq.nn.norms import NormName, equivariant_norm
from atomeq.nn.pair_mlp import RadialMLP
from atomeq.nn.pair_networks import PairNetworks
from atomeq.nn.radial import PolynomialEnvelope
from atomeq.nn.so3 import SO3Linear
from atomeq.nn.stress import StressHead, stress_head_of
from atomeq.ops.orders import check_orders
from atomeq.typing import EdgeLengths, NodeFeatures

RadialBasis = Literal["bessel", "gaussian", "enveloped_bessel"]
DEGREE_SCALE = 5.0  # divides the embedding of neighbourhoods, whatever the data


class ESEN(SphericalNetwork):
    """Equivariant smooth energy network; conservative, or with a linear head for forces.

    Args:
        cutoff: Radius of the graph, Å.
        lmax: Highest degree of the atom features.
        mmax: Highest order kept in the edge frame, at most ``lmax``.
        num_layers: Blocks of a message and an update.
        sphere_channels: Channels of the atom features.
        hidden_channels: Channels inside messages, updates and the energy head.
        edge_channels: Width of the networks of the edge length and of element embeddings in them.
        num_elements: Atomic numbers below this are embedded.
        radial_basis: ``bessel``; as published ``gaussian`` or ``enveloped_bessel``.
        num_radial: Functions in it.
        norm: ``layer_norm``, ``layer_norm_sh`` or ``rms_norm_sh`` (:mod:`atomeq.nn.norms`).
        activation: Of messages: ``gate``, ``product``, as published ``gate`` or ``separable_s2``
            (:mod:`atomeq.nn.activations`).
        feed_forward: Update of atoms: ``gate``, ``product``, as published ``silu_gate`` or
            ``grid_mlp`` (:class:`~atomeq.nn.feed_forward.FeedForward`).
        grid_resolution: Polar angles and azimuths of the grids on the sphere. No weight depends on
            it.
        chiral: Let +m and -m mix, which commutes with rotations but not with reflections.
        bias: Add biases in messages to what is invariant about the edge.
        envelope: End messages smoothly at the cutoff.
        max_neighbors: Keep about this many nearest neighbours; None keeps all.
        skip_isolated: Leave the atoms of a structure without edges as they were embedded.
        direct_forces: Forces from a head of their own, no derivative of the energy.
        stress_head: Stress from a head of its own: ``equivariant``, or as published, which is not:
            the options of :class:`~atomeq.nn.stress.Rank2Stress`. None derives it, where forces are
            derived.
        energy_reduce: The energy is the ``sum`` or the ``mean`` over the atoms.

    Raises:
        ValueError: ``mmax`` is not between 0 and ``lmax``, or an option is none of those above.
    """

    hidden_channels: int
    edge_channels: int
    norm: NormName
    activation: ActivationName
    feed_forward: Nonlinearity
    chiral: bool
    bias: bool
    skip_isolated: bool
    stress_head: StressHead
    energy_reduce: Literal["sum", "mean"]

    def __init__(
        self,
        cutoff: float = 6.0,
        *,
        lmax: int = 3,
        mmax: int = 2,
        num_layers: int = 4,
        sphere_channels: int = 64,
        hidden_channels: int = 64,
        edge_channels: int = 64,
        num_elements: int = 119,
        radial_basis: RadialBasis = "bessel",
        num_radial: int = 8,
        norm: NormName = "rms_norm_sh",
        activation: ActivationName = "gate",
        feed_forward: Nonlinearity = "gate",
        grid_resolution: int | None = None,
        chiral: bool = False,
        bias: bool = False,
        envelope: bool = True,
        max_neighbors: int | None = None,
        skip_isolated: bool = False,
        direct_forces: bool = False,
        stress_head: StressHead = None,
        energy_reduce: Literal["sum", "mean"] = "sum",
    ) -> None:
        super().__init__(cutoff)
        check_orders(lmax, mmax)
        if energy_reduce not in ("sum", "mean"):
            raise ValueError(f"energy_reduce is sum or mean, not {energy_reduce!r}")
        if direct_forces and not lmax:
            raise ValueError("direct_forces are vectors, which features of lmax=0 do not hold")
        self.keep_arguments(locals())
        self.receptive_depth = num_layers + 1 if energy_reduce == "sum" else None
        self.outputs = outputs_of(forces=direct_forces, stress=stress_head is not None)

        self.embedding = nn.Embedding(num_elements, sphere_channels)
        self.source_embedding = nn.Embedding(num_elements, edge_channels)
        self.target_embedding = nn.Embedding(num_elements, edge_channels)
        self.basis = radial_basis_of(
            radial_basis, num_radial, cutoff, enveloped_bessel=EnvelopedBesselBasis
        )
        self.cut = PolynomialEnvelope(cutoff) if envelope else None
        n_edge_scalars = num_radial + 2 * edge_channels
        sizes = (n_edge_scalars, edge_channels, edge_channels, (lmax + 1) * sphere_channels)
        radial = RadialMLP(sizes, layer_norm=True)
        self.neighborhood = DegreeEmbedding(lmax, sphere_channels, radial)
        self.blocks = nn.ModuleList(self._block(n_edge_scalars) for _ in range(num_layers))
        self.norm_out = equivariant_norm(norm, lmax, sphere_channels)
        self.energy = MLP((sphere_channels, hidden_channels, hidden_channels, 1))
        self.forces = SO3Linear(1, sphere_channels, 1) if direct_forces else None
        self.stress = stress_head_of(stress_head, lmax, sphere_channels, hidden_channels, norm)

    def _block(self, n_edge_scalars: int) -> MessageBlock:
        return MessageBlock(
            message_norm=equivariant_norm(self.norm, self.lmax, self.sphere_channels),
            message=EdgeConvolution(
                self.lmax,
                self.mmax,
                self.sphere_channels,
                self.hidden_channels,
                self.edge_channels,
                n_edge_scalars,
                activation=self.activation,
                chiral=self.chiral,
                bias=self.bias,
                grid_resolution=self.grid_resolution,
            ),
            update_norm=equivariant_norm(self.norm, self.lmax, self.sphere_channels),
            update=FeedForward(
                self.lmax,
                self.sphere_channels,
                self.hidden_channels,
                self.sphere_channels,
                nonlinearity=self.feed_forward,
                normalization="integral",
                grid_resolution=self.grid_resolution,
            ),
        )

    def _energies(self, x: NodeFeatures, graph: AtomGraph) -> tuple[Tensor, Tensor]:
        energies, features = self.energy.with_hidden(x[:, 0])
        energies = energies[:, 0]
        if self.energy_reduce == "mean":
            energies = energies / graph.natoms[graph.batch]
        return energies, features

    def _forces(self, x: NodeFeatures, graph: AtomGraph, edges: Edges) -> Tensor | None:
        # l = 1 is (x, y, z)
        return None if self.forces is None else self.forces(x[:, :4])[:, 1:, 0]

    def _atoms(self, graph: AtomGraph, edges: Edges) -> NodeFeatures:
        embedded = x = self._with_elements(self.neighborhood(*edges) / DEGREE_SCALE, graph)
        for block in self.blocks:
            x = block(x, *edges)
        if self.skip_isolated:
            connected = torch.zeros(graph.n_graphs, dtype=torch.bool, device=x.device)
            connected[graph.batch[graph.edge_index[1]]] = True
            x = torch.where(connected[graph.batch][:, None, None], x, embedded)
        return self.norm_out(x)

    def _pair_networks(self) -> PairNetworks:
        blocks = cast("list[MessageBlock]", list(self.blocks))  # a ModuleList has no types
        return PairNetworks(
            self.basis,
            self.cut,
            (self.source_embedding, self.target_embedding),
            self.neighborhood.radial,
            tuple(block.message.radial for block in blocks),
        )


class EnvelopedBesselBasis(nn.Module):
    """Bessel functions with trained frequencies, times the envelope.

    b_n(r) = u(s) · √(2/r_c³) · sin(f_n s)/s, s = r/r_c; f_n starts at nπ.

    Args:
        num_radial: Number of functions.
        cutoff: r_c, Å.
    """

    def __init__(self, num_radial: int, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.envelope = PolynomialEnvelope(cutoff)
        self.frequencies = nn.Parameter(math.pi * torch.arange(1, num_radial + 1))

    def forward(self, lengths: EdgeLengths) -> Tensor:
        """Evaluate the basis at ``lengths`` (n_edges,), Å; returns (n_edges, num_radial)."""
        s = (lengths / self.cutoff)[:, None]
        scale = self.envelope(lengths)[:, None] * math.sqrt(2 / self.cutoff**3)
        return scale * torch.sin(self.frequencies * s) / s
