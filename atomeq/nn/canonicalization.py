"""A small network whose vectors orient a structure: the equivariant half of canonicalization.

Kaba et al., ICML 2023, arXiv:2211.06489: h(x) picks an orientation that turns along with x, and any
network behind it becomes invariant. Scalars and vectors are passed along edges as in PaiNN (Schütt
et al., arXiv:2102.03150), three vectors are pooled and made orthonormal.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from atomeq.nn.mlp import MLP
from atomeq.nn.radial import BesselBasis, PolynomialEnvelope
from atomeq.ops.segment.operations import segment_sum
from atomeq.typing import AtomicNumbers, BatchIndex, EdgeIndex, EdgeVectors

# A vector shorter than this, relative to what it was summed or projected from, has no direction.
_NO_DIRECTION = 1e-4


class CanonicalVectors(nn.Module):
    """Three polar vectors of each structure.

    Args:
        cutoff: Messages end smoothly here, Å.
        channels: Channels of scalars and of vectors.
        num_layers: Rounds of messages.
        num_radial: Bessel functions of the edge length.
        num_elements: Atomic numbers below this are embedded.
    """

    def __init__(
        self,
        cutoff: float,
        *,
        channels: int,
        num_layers: int,
        num_radial: int,
        num_elements: int,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_elements, channels)
        self.basis = BesselBasis(num_radial, cutoff)
        self.envelope = PolynomialEnvelope(cutoff)
        self.layers = nn.ModuleList(VectorLayer(channels, num_radial) for _ in range(num_layers))
        self.weight = MLP((channels, channels, channels))
        self.mix = nn.Linear(channels, 3, bias=False)

    def forward(
        self,
        atomic_numbers: AtomicNumbers,
        vectors: EdgeVectors,
        edge_index: EdgeIndex,
        *,
        batch: BatchIndex,
        n_graphs: int,
    ) -> Float[Tensor, "n_graphs 3 3"]:
        """Return three vectors in columns, as fractions of what they were summed from.

        Where all cancels, as in a crystal whose atoms are inversion centres, rounding errors are
        left, and only by this measure are they small.

        Args:
            atomic_numbers: (n_atoms,).
            vectors: From each target to its source, (n_edges, 3), Å.
            edge_index: (2, n_edges).
            batch: Structure of each atom, (n_atoms,).
            n_graphs: Number of structures.
        """
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        envelope = self.envelope(lengths)[:, None]
        basis, directions = self.basis(lengths), vectors / lengths[:, None]
        scalars = self.embedding(atomic_numbers)  # (n_atoms, C)
        polar = scalars.new_zeros(len(scalars), 3, scalars.shape[1])  # (n_atoms, 3, C)
        spread = scalars.new_zeros(len(scalars))
        for layer in self.layers:
            scalars, polar, sizes = layer(scalars, polar, directions, basis, envelope, edge_index)
            spread = spread + sizes
        weights = self.weight(scalars)
        polar = self.mix(polar * weights[:, None])  # (n_atoms, 3, 3)
        # Frames do not depend on lengths, so this scale needs no derivative.
        typical = spread[:, None] * weights.detach().abs() @ self.mix.weight.detach().abs().T
        scale = segment_sum(typical, batch, n_graphs)[:, None].clamp_min(1e-30)
        return segment_sum(polar, batch, n_graphs) / scale


class VectorLayer(nn.Module):
    """One round of messages between scalars and vectors, then an update of each atom."""

    def __init__(self, channels: int, num_radial: int) -> None:
        super().__init__()
        self.message = MLP((2 * channels + num_radial, channels, 3 * channels))
        self.left = nn.Linear(channels, channels, bias=False)
        self.right = nn.Linear(channels, channels, bias=False)
        self.update = MLP((2 * channels, channels, 2 * channels))

    def forward(
        self,
        scalars: Tensor,
        polar: Tensor,
        directions: Tensor,
        basis: Tensor,
        envelope: Tensor,
        edge_index: EdgeIndex,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scalars (n_atoms, C) and vectors (n_atoms, 3, C), updated, and sizes (n_atoms,).

        The sizes are those of an atom's vector messages, summed without cancelling each other.
        """
        source, target = edge_index
        ends = torch.cat([scalars[target], scalars[source], basis], dim=1)
        plain, along, through = (self.message(ends) * envelope).chunk(3, dim=1)
        message = directions[:, :, None] * along[:, None] + polar[source] * through[:, None]
        scalars = scalars + segment_sum(plain, target, len(scalars))
        polar = polar + segment_sum(message, target, len(scalars))
        left, right = self.left(polar), self.right(polar)
        invariants = torch.cat([scalars, (left * right).sum(dim=1)], dim=1)
        plain, gate = self.update(invariants).chunk(2, dim=1)
        sizes = torch.linalg.vector_norm(message.detach(), dim=1).mean(dim=1)  # (n_edges,)
        sizes = segment_sum(sizes, target, len(scalars))
        return scalars + plain, polar + left * torch.sigmoid(gate)[:, None], sizes


def canonical_frames(
    vectors: Float[Tensor, "n_graphs 3 3"], *, proper: bool = False
) -> tuple[Float[Tensor, "n_graphs 3 3"], Bool[Tensor, " n_graphs"]]:
    """Make vectors orthonormal by Gram and Schmidt.

    Args:
        vectors: In columns; of order one, or without direction where they are far smaller.
        proper: Replace the third by the cross product of the first two.

    Returns:
        Axes in columns (n_graphs, 3, 3), and the structures (n_graphs,) whose vectors are too short
        or too nearly parallel to have axes: theirs are those of the world.
    """
    with torch.no_grad():
        _, lengths = _gram_schmidt(vectors, proper=proper)
        degenerate = ~(lengths > _NO_DIRECTION).all(dim=1)
    # The exchange comes before the divisions, which would give infinite derivatives.
    world = torch.eye(3, dtype=vectors.dtype, device=vectors.device)
    frames, _ = _gram_schmidt(torch.where(degenerate[:, None, None], world, vectors), proper=proper)
    return frames, degenerate


def _gram_schmidt(vectors: Tensor, *, proper: bool) -> tuple[Tensor, Tensor]:
    axes: list[Tensor] = []
    lengths: list[Tensor] = []
    for column in range(2 if proper else 3):
        vector = vectors[:, :, column]
        rest = vector
        for axis in axes:
            rest = rest - (rest * axis).sum(dim=1, keepdim=True) * axis
        length = torch.linalg.vector_norm(rest, dim=1, keepdim=True)
        axes.append(rest / length)
        before = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        lengths += [before, length / before] if axes[:-1] else [before]
    if proper:
        axes.append(torch.linalg.cross(axes[0], axes[1]))
    return torch.stack(axes, dim=2), torch.cat(lengths, dim=1)
