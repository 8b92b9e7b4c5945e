"""LieTransformer in an exact form: attention between atoms lifted to a group.

Hutchinson et al., LieTransformer: Equivariant self-attention for Lie Groups, ICML 2021,
arXiv:2012.10885. Each atom is lifted to elements g = (x, R) of the group; what
attention sees of a pair is g_i⁻¹ g_j, which no motion of the whole changes.

It differs from the paper on purpose:

* the published lift draws random rotations, so predictions are random (by 1.5 to 1.9 % with two
  draws). Here SE(3) lifts an atom to the frames that its near neighbours span, with weights
  (:mod:`atomeq.nn.local_frames`), and T(3) to none: inside
  :class:`~atomeq.models.frame_averaged.FrameAveraged` or
  :class:`~atomeq.models.local_frames.LocalFrames` that is the average over one lift of the whole;
* rotations enter as matrices: the published logarithm and quaternions jump at half a turn;
* weights of attention are a perceptron of pair and features without softmax, as in the published
  runs, but end in an envelope and are divided by a constant, not by the number of neighbours;
* the readout is a sum over atoms; forces are the derivative of the energy, through frames too.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import InvariantReadout, refuse_nonpositive
from atomeq.nn.local_frames import AtomFrames, neighbour_frames, pairs_within
from atomeq.nn.mlp import MLP
from atomeq.nn.pair_mlp import PairFeatures, RadialMLP
from atomeq.nn.radial import BesselBasis, PolynomialEnvelope
from atomeq.ops.segment.operations import segment_sum
from atomeq.typing import EdgeIndex

Group = Literal["T(3)", "SE(3)"]


class LieTransformer(InvariantReadout):
    """Self-attention on a group, with conservative forces.

    Args:
        cutoff: Radius of the graph, Å.
        group: ``"SE(3)"``, invariant by its lift, at the cost of all pairs of frames of two
            neighbours; ``"T(3)"``, translations only: put it into a wrapper with frames.
        proper: Of SE(3): lift to rotations only, so that mirror images may differ.
        frame_cutoff: Neighbours up to here span frames, Å.
        num_layers: Blocks of attention and perceptron.
        hidden_channels: Channels of atoms.
        num_heads: Of attention; divides ``hidden_channels``.
        kernel_channels: Hidden channels of the perceptron of pairs.
        num_radial: Bessel functions of the edge length.
        avg_num_neighbors: Sums over neighbours are divided by its square root.
        num_elements: Atomic numbers below this are embedded.
    """

    recordable = False  # how many frames there are is asked

    def __init__(
        self,
        cutoff: float = 5.0,
        *,
        group: Group = "SE(3)",
        proper: bool = False,
        frame_cutoff: float = 2.0,
        num_layers: int = 3,
        hidden_channels: int = 64,
        num_heads: int = 4,
        kernel_channels: int = 32,
        num_radial: int = 8,
        avg_num_neighbors: float = 20.0,
        num_elements: int = 119,
    ) -> None:
        super().__init__()
        refuse_nonpositive(avg_num_neighbors=avg_num_neighbors)
        if group not in get_args(Group):
            raise ValueError(f"group {group!r} is unknown; there are {', '.join(get_args(Group))}")
        if hidden_channels % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {hidden_channels} hidden_channels")
        if frame_cutoff > cutoff:
            raise ValueError(f"frame_cutoff {frame_cutoff} Å is beyond the cutoff, {cutoff} Å")
        self.keep_arguments(locals())
        self.receptive_depth = num_layers + (group == "SE(3)")  # frames are of neighbours
        self.cutoff, self.group, self.proper = cutoff, group, proper
        if group == "T(3)":
            reason = "T(3) has translations only"
            self.exempt_laws: Mapping[str, str] = dict.fromkeys(("rotation", "reflection"), reason)
        self.embedding = nn.Embedding(num_elements, hidden_channels)
        self.basis = BesselBasis(num_radial, cutoff)
        self.envelope = PolynomialEnvelope(cutoff)
        self.frame_envelope = PolynomialEnvelope(frame_cutoff)
        n_pair = num_radial + (3 if group == "T(3)" else 12)
        self.layers = nn.ModuleList(
            LieAttentionBlock(
                hidden_channels, n_pair, num_heads, kernel_channels, avg_num_neighbors
            )
            for _ in range(num_layers)
        )
        self.final_norm = nn.LayerNorm(hidden_channels)
        self.energy = MLP((hidden_channels, hidden_channels, 1), zero_output=True)

    def node_features(self, graph: AtomGraph) -> Tensor:
        """Return the mean over the lifts of each atom, (n_atoms, hidden_channels)."""
        vectors = graph.edge_vectors()
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        frames = self._lift(vectors, lengths, graph)
        pairs = self._pairs(vectors, lengths.to(self.dtype), frames, graph.edge_index)
        h = self.with_state(self.embedding(graph.atomic_numbers), graph)  # (n_atoms, C)
        h = h.index_select(0, frames.atom)  # (n_points, C)
        for layer in self.layers:
            h = layer(h, pairs)
        weights = frames.weights.to(h.dtype)[:, None]
        return segment_sum(weights * self.final_norm(h), frames.atom, graph.n_atoms)

    def _lift(self, vectors: Tensor, lengths: Tensor, graph: AtomGraph) -> AtomFrames:
        if self.group == "SE(3)":
            envelope = self.frame_envelope(lengths)
            target = graph.edge_index[1]
            return neighbour_frames(vectors, target, envelope, graph.n_atoms, proper=self.proper)
        world = torch.eye(3, dtype=vectors.dtype, device=vectors.device)
        atoms = torch.arange(graph.n_atoms, device=vectors.device)
        return AtomFrames(world.expand(len(atoms), 3, 3), atoms, vectors.new_ones(len(atoms)))

    def _pairs(
        self, vectors: Tensor, lengths: Tensor, frames: AtomFrames, edge_index: EdgeIndex
    ) -> "LiftedPairs":
        """Return g_i⁻¹ g_j of every edge and all lifts of both of its ends."""
        source, target = edge_index
        n_atoms = int(frames.atom.max()) + 1 if len(frames.atom) else 0
        edge, to = pairs_within(target, frames.atom, n_atoms)
        through, of = pairs_within(source.index_select(0, edge), frames.atom, n_atoms)
        edge, to = edge[through], to[through]
        turns = frames.matrices.index_select(0, to)
        place = (vectors.index_select(0, edge)[:, None] @ turns)[:, 0] / self.cutoff
        features = [self.basis(lengths).index_select(0, edge), place.to(lengths.dtype)]
        if self.group == "SE(3)":
            relative = turns.mT @ frames.matrices.index_select(0, of)
            features.append(relative.flatten(1).to(lengths.dtype))
        weights = frames.weights.index_select(0, of).to(lengths.dtype)
        weights = weights * self.envelope(lengths).index_select(0, edge)
        return LiftedPairs(torch.cat(features, dim=1), weights, torch.stack([of, to]))


class LiftedPairs(NamedTuple):
    """Pairs of lifted atoms.

    Attributes:
        features: Of g_i⁻¹ g_j, (n_pairs, any).
        weights: Share of the source's lift times the envelope, (n_pairs,).
        edge_index: Points; row 0 is j, row 1 is i.
    """

    features: Tensor
    weights: Tensor
    edge_index: EdgeIndex


class LieAttentionBlock(nn.Module):
    """Attention whose weights a perceptron makes of pair and features; then one of each point."""

    def __init__(
        self, channels: int, n_pair: int, num_heads: int, n_kernel: int, avg_num_neighbors: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = 1 / math.sqrt(avg_num_neighbors)
        self.norm_1, self.norm_2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.query = nn.Linear(channels, n_kernel)
        self.key = nn.Linear(channels, n_kernel)
        self.value = nn.Linear(channels, channels)
        self.kernel = RadialMLP((n_pair + 2 * n_kernel, n_kernel, n_kernel, num_heads))
        self.output = nn.Linear(channels, channels)
        self.update = MLP((channels, channels, channels))

    def forward(self, h: Tensor, pairs: LiftedPairs) -> Tensor:
        """Return points (n_points, C), updated."""
        source, target = pairs.edge_index
        y = self.norm_1(h)
        given = PairFeatures(pairs.features, self.key(y), self.query(y), pairs.edge_index)
        weights = self.kernel(given) * (pairs.weights * self.scale)[:, None]  # (n_pairs, heads)
        values = self.value(y).unflatten(1, (self.num_heads, -1))
        messages = values.index_select(0, source) * weights[:, :, None]
        h = h + self.output(segment_sum(messages, target, len(h)).flatten(1))
        return h + self.update(self.norm_2(h))
