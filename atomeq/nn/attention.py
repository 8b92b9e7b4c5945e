"""Equivariant graph attention of EquiformerV2: messages in the edge frame, weighed by a softmax."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from atomeq.nn.activations import ActivationName, activation_of
from atomeq.nn.edge_network import EdgeNetwork, EdgeScalars, degree_rescale
from atomeq.nn.so3 import SO2Convolution, SO3Linear
from atomeq.nn.sphere import GridResolution
from atomeq.ops.edge.frame import EdgeFrame
from atomeq.ops.edge.operations import rotate_from_edge, rotate_to_edge
from atomeq.ops.orders import radial_rows
from atomeq.ops.segment.operations import segment_softmax, segment_sum
from atomeq.ops.tables import table_like
from atomeq.typing import NodeFeatures


@dataclass(frozen=True, slots=True)
class Weighing:
    """How the shares of edges in an attention are made of their invariants.

    Attributes:
        norm: Of the invariants: ``layer_norm``, ``rms_norm`` or ``none``.
        silu: SiLU of them in place of a smooth leaky ReLU.
        softcap: c bounds logits a to c tanh(a / c).
        epsilon: EquiformerV3 as published: no empty seat, this beside the sum of the shares (in
            units of the largest), and the envelope once more on each. None gives our softmax.
    """

    norm: Literal["layer_norm", "rms_norm", "none"] = "layer_norm"
    silu: bool = False
    softcap: float | None = None
    epsilon: float | None = None

    def build_norm(self, channels: int) -> nn.Module:
        """Return the normalisation of invariants.

        Raises:
            ValueError: It is unknown.
        """
        norms: dict[str, Callable[[], nn.Module]] = {
            "layer_norm": lambda: nn.LayerNorm(channels),
            "rms_norm": lambda: nn.RMSNorm(channels, eps=1e-5),
            "none": nn.Identity,
        }
        if self.norm not in norms:
            raise ValueError(f"norm of logits {self.norm!r} is unknown; one of {', '.join(norms)}")
        return norms[self.norm]()


_WEIGHING = Weighing()
_MOST = 69.0  # of a shifted logit: only where u < exp(-69) is there more, and exp would overflow


class EquivariantAttention(nn.Module):
    """Multi-head attention over neighbours; values are messages made by SO(2) convolutions.

    Liao et al., EquiformerV2, arXiv:2306.12059, section 4.1, with its attention re-normalisation.

    Args:
        lmax: Highest degree of the features.
        mmax: Highest order in the edge frame.
        channels: Channels in.
        out_channels: Channels out.
        hidden_channels: Channels of the messages.
        num_heads: Heads.
        alpha_channels: Invariants of each head from which its logit is made.
        value_channels: Channels of each head's values.
        num_basis: Width of the radial basis.
        edge_channels: Width of the network of the edge length.
        num_elements: For its embeddings; None leaves the elements out.
        activation: Of messages (:func:`~atomeq.nn.activations.activation_of`).
        grid_resolution: Of the grid.
        shared_radial: Use one radial weight for all m of a degree.
        add_merge: Add the features of both atoms, each times its radial weights; else they lie side
            by side.
        weighing: How the weights of the sum are made.
        chiral: Let +m and -m mix, as published (:class:`~atomeq.nn.so3.SO2Convolution`).
        dropout: Probability that an attention weight is dropped.
    """

    def __init__(
        self,
        lmax: int,
        mmax: int,
        channels: int,
        out_channels: int,
        *,
        hidden_channels: int,
        num_heads: int,
        alpha_channels: int,
        value_channels: int,
        num_basis: int,
        edge_channels: int,
        num_elements: int | None,
        activation: ActivationName,
        grid_resolution: GridResolution,
        shared_radial: bool,
        add_merge: bool = False,
        weighing: Weighing = _WEIGHING,
        chiral: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.lmax = lmax
        self.mmax = mmax
        self.heads = (num_heads, alpha_channels, value_channels)
        self.shared_radial = shared_radial
        self.add_merge = add_merge
        self.weighing = weighing
        self.dropout = dropout
        self.activation = activation_of(
            *(activation, lmax, mmax, hidden_channels), order="m", grid_resolution=grid_resolution
        )
        self.n_scalars = (num_heads * alpha_channels, self.activation.n_scalars)
        self.first = SO2Convolution(
            lmax, mmax, channels if add_merge else 2 * channels, self.activation.in_channels,
            extra_scalars=sum(self.n_scalars), chiral=chiral, bias=True,
        )  # fmt: skip
        pairs = lmax + 1 if shared_radial else self.first.n_radial_weights // self.first.in_channels
        n_radial = pairs * 2 * channels
        self.radial = EdgeNetwork(num_basis, edge_channels, n_radial, num_elements)
        self.logit_norm = weighing.build_norm(alpha_channels)
        bound = 1 / math.sqrt(alpha_channels)
        self.logit_weight = nn.Parameter(torch.empty(num_heads, alpha_channels))
        nn.init.uniform_(self.logit_weight, -bound, bound)
        n_values = num_heads * value_channels
        self.second = SO2Convolution(
            lmax, mmax, hidden_channels, n_values, chiral=chiral, bias=True
        )
        self.projection = SO3Linear(lmax, n_values, out_channels)

    def forward(self, x: NodeFeatures, frame: EdgeFrame, edges: EdgeScalars) -> NodeFeatures:
        """Return the attention over the neighbours of each atom, (n_atoms, n_sph, out_channels)."""
        message = rotate_to_edge(x, frame, side="both")  # (n_edges, n_rows, 2 channels)
        message, scalars = self._first_map(message, self._radial_weights(edges))
        invariants, gates = scalars.split(self.n_scalars, dim=1)
        message, _ = self.second(self.activation(message, gates))  # (n_edges, n_rows, n_values)
        weights = self._weights(invariants, frame, edges.envelope)  # (n_edges, num_heads)
        message = message * weights.repeat_interleave(self.heads[2], dim=1).unsqueeze(1)
        total = rotate_from_edge(message, frame)  # (n_atoms, n_sph, n_values)
        rescale = table_like(degree_rescale, self.lmax, self.mmax, like=total)
        return self.projection(total * rescale)

    def _first_map(self, message: Tensor, radial: Tensor) -> tuple[Tensor, Tensor]:
        """Map both atoms' features (n_edges, n_rows, 2 channels) by edge."""
        if not self.add_merge:
            return self.first(message, radial)
        rows = table_like(radial_rows, self.lmax, self.mmax, like=message)
        message = message * radial.unflatten(1, (-1, message.shape[2])).index_select(1, rows)
        source, target = message.chunk(2, dim=2)
        return self.first(source + target)

    def _radial_weights(self, edges: EdgeScalars) -> Tensor:
        """Return the factors of the first convolution's input, (n_edges, n_radial_weights)."""
        weights = self.radial(edges)
        if not self.shared_radial:
            return weights
        # One for all m of a degree commutes with the rotation, so it may as well come after it.
        per_degree = weights.unflatten(1, (self.lmax + 1, -1))
        return torch.cat([per_degree[:, m:].flatten(1) for m in range(self.mmax + 1)], dim=1)

    def logits(self, invariants: Tensor) -> Tensor:
        """Return (n_edges, num_heads) of invariants (n_edges, num_heads * alpha_channels)."""
        num_heads, alpha_channels, _ = self.heads
        invariants = self.logit_norm(invariants.view(-1, num_heads, alpha_channels))
        activate = nn.functional.silu if self.weighing.silu else smooth_leaky_relu
        logits = (activate(invariants) * self.logit_weight).sum(dim=2)
        softcap = self.weighing.softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def _weights(self, invariants: Tensor, frame: EdgeFrame, envelope: Tensor | None) -> Tensor:
        """Return the share of each edge in each head of its target, (n_edges, num_heads)."""
        logits, epsilon = self.logits(invariants), self.weighing.epsilon
        if epsilon is not None:
            weights = relative_softmax(logits, envelope, frame.target, frame.n_atoms, epsilon)
            weights = weights if envelope is None else weights * envelope[:, None]
        elif envelope is None:
            weights = segment_softmax(logits, frame.target, frame.n_atoms)
        else:
            weights = smooth_softmax(logits, envelope, frame.target, frame.n_atoms)
        return nn.functional.dropout(weights, self.dropout, self.training)


def smooth_leaky_relu(x: Tensor, *, slope: float = 0.2) -> Tensor:
    """Return a leaky ReLU without a kink: (1 + s)/2 x + (1 - s)/2 x (2 σ(x) - 1)."""
    return 0.5 * (1 + slope) * x + 0.5 * (1 - slope) * x * (2 * torch.sigmoid(x) - 1)


def smooth_softmax(logits: Tensor, envelope: Tensor, index: Tensor, n_segments: int) -> Tensor:
    """Return u_k exp(a_k) / (1 + Σ u exp(a)), which forgets an edge smoothly as u goes to 0.

    The 1 is an empty seat: without it the last neighbour left would have weight 1 until it is gone.

    Args:
        logits: a, (n_edges, num_heads).
        envelope: u, (n_edges,).
        index: Segment of each edge, (n_edges,).
        n_segments: Number of segments.

    Returns:
        (n_edges, num_heads).
    """
    # Rounding leaves envelopes just below 0 at the cutoff; nobody sits there.
    envelope = envelope.clamp(min=0)[:, None]
    # The shift, the largest a + log u, cancels in the ratio, so it needs no gradient. It keeps exp
    # from overflowing, and an edge without weight from taking all the others' with it.
    rows = index[:, None].expand_as(logits)
    counted = logits.detach() + envelope.detach().log()
    peaks = logits.new_zeros(n_segments, logits.shape[1])
    peaks = peaks.scatter_reduce(0, rows, counted, reduce="amax")
    weights = envelope * (logits - peaks.index_select(0, index)).clamp(max=_MOST).exp()
    totals = torch.exp(-peaks) + segment_sum(weights, index, n_segments)
    return weights / totals.index_select(0, index)


def relative_softmax(
    logits: Tensor, envelope: Tensor | None, index: Tensor, n_segments: int, epsilon: float
) -> Tensor:
    """Return u_k exp(a_k) / (ε exp(max a) + Σ u exp(a)), as EquiformerV3 publishes it.

    Args:
        logits: a, (n_edges, num_heads).
        envelope: u, (n_edges,); None is 1.
        index: Segment of each edge, (n_edges,).
        n_segments: Number of segments.
        epsilon: ε.

    Returns:
        (n_edges, num_heads).
    """
    rows = index[:, None].expand_as(logits)
    peaks = logits.new_full((n_segments, logits.shape[1]), -torch.inf)
    peaks = peaks.scatter_reduce(0, rows, logits.detach(), reduce="amax")
    weights = (logits - peaks.index_select(0, index)).exp()
    weights = weights if envelope is None else weights * envelope[:, None]
    totals = segment_sum(weights, index, n_segments) + epsilon
    return weights / totals.index_select(0, index)
