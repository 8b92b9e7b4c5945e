"""Frames: orientations that turn along with a structure, by which any model becomes invariant.

Frame averaging: Puny et al., ICLR 2022, arXiv:2110.03336, with the principal axes of the
structure; FAENet: Duval et al., ICML 2023, arXiv:2305.05577. The mean of a model over a structure's
frames does not change when the structure turns, for the frames turn with it.

The axes are eigenvectors of a covariance Σ w v vᵀ, defined up to their signs: 8 frames for O(3), 4
for SO(3), 4 and 2 in the plane. Where eigenvalues coincide the axes are not defined at all. Then
frames are built from the vectors themselves (:func:`tied_axes`), all that an observer without a
coordinate system could choose among, which keeps the mean invariant: a linear molecule, methane and
a cubic crystal have one energy each. What no set of finitely many frames can be is continuous
everywhere (Dym et al., arXiv:2402.16077): the energy jumps where eigenvalues cross.
"""

import math
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from atomeq.ops.segment.operations import segment_sum
from atomeq.ops.tables import constant_table, table_like

FrameMethod = Literal["all", "stochastic", "det"]
Vectors = Float[Tensor, "n_vectors 3"]
VectorIndex = Int[Tensor, " n_vectors"]

# Relative gap of eigenvalues below which axes are taken as undefined.
_GAP = 1e-6
# Eigenvalues below this, relative to the largest, are rounding errors.
_ROUNDING = 1e-13
# Relative difference of lengths that counts as none: symmetric structures come with 1e-8 Å at best.
_TIE = 1e-5


class FrameSet(NamedTuple):
    """Frames of a batch of structures; where a structure has fewer, the rest weigh nothing.

    Attributes:
        matrices: (n_frames, n_graphs, 3, 3), orthogonal, an axis in each column: x -> x R.
        weights: (n_frames, n_graphs); those of a structure sum to 1.
    """

    matrices: Tensor
    weights: Tensor


def principal_frames(
    vectors: Vectors,
    index: VectorIndex,
    *,
    n_graphs: int,
    weights: Float[Tensor, " n_vectors"] | None = None,
    labels: Int[Tensor, " n_vectors"] | None = None,
    dim: Literal[2, 3] = 3,
    proper: bool = False,
    method: FrameMethod = "all",
    generator: torch.Generator | None = None,
) -> FrameSet:
    """Return the frames along the principal axes of each structure's vectors.

    Args:
        vectors: Edge vectors, or positions from the centroid, (n_vectors, 3), Å. Frames are
            differentiable in them, also twice.
        index: Structure of each vector, (n_vectors,).
        n_graphs: Number of structures.
        weights: Of each vector in the covariance, (n_vectors,); 1 by default.
        labels: What tells vectors apart besides their length, such as elements, (n_vectors,).
        dim: 3, or 2: only turned about z, as slabs may be.
        proper: Only rotations, so that mirror images may differ: SE(3) instead of E(3).
        method: ``"all"`` frames; ``"stochastic"``: one of them drawn for each structure; ``"det"``:
            one with signs taken from the sum of the components, as published. That sum belongs to
            the world's axes: ``"det"`` is NOT invariant and with ``proper`` not even a rotation.
        generator: Of the draw.

    Raises:
        ValueError: ``"stochastic"`` without a generator.
    """
    flat = vectors[:, :dim]
    weighted = flat if weights is None else flat * weights[:, None]
    outer = weighted[:, :, None] * flat[:, None, :]  # (n_vectors, dim, dim)
    values, axes = PrincipalAxes.apply(segment_sum(outer, index, n_graphs))
    if method == "det":
        signs = torch.where(axes.detach().sum(dim=1, keepdim=True) >= 0, 1.0, -1.0)
        return FrameSet(_embedded(axes * signs)[None], values.new_ones(1, n_graphs))
    turns, shares = _resolved(values, axes.detach(), flat.detach(), index, labels)
    axes = axes @ turns  # (n_ties, n_graphs, dim, dim)
    if proper:
        mirror = torch.linalg.det(axes.detach()).sign()
        axes = torch.cat([axes[..., :-1], axes[..., -1:] * mirror[..., None, None]], dim=-1)
    signs = table_like(_signs, dim, proper, like=axes)
    frames = axes * signs[:, None, None, None, :]
    frames = frames.reshape(-1, n_graphs, dim, dim)  # signs x ties
    shares = shares.repeat(len(signs), 1) / len(signs)
    frames = FrameSet(_embedded(frames), shares)
    return drawn(frames, generator) if method == "stochastic" else frames


def drawn(frames: FrameSet, generator: torch.Generator | None) -> FrameSet:
    """Return one frame for each structure, drawn by weight.

    Raises:
        ValueError: There is no generator.
    """
    if generator is None:
        raise ValueError("stochastic frames are drawn from a torch.Generator; give generator=")
    choice = torch.multinomial(frames.weights.mT.cpu(), 1, generator=generator)[:, 0]
    graphs = torch.arange(len(choice))
    matrices = frames.matrices[choice.to(frames.matrices.device), graphs.to(frames.matrices.device)]
    return FrameSet(matrices[None], torch.ones_like(frames.weights[:1]))


class PrincipalAxes(torch.autograd.Function):
    """Eigenvalues, descending, and eigenvectors; degenerate ones have finite derivatives.

    dU = U (F ∘ Uᵀ dC U) with F_ij = 1/(λ_j - λ_i), and 0 where the two coincide: a turn inside a
    degenerate subspace changes no mean over its frames. Made of plain operations, so the derivative
    can be derived again.
    """

    @staticmethod
    def forward(ctx: Any, covariance: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return values (n, d) and axes (n, d, d) of symmetric matrices (n, d, d)."""
        values, axes = torch.linalg.eigh(covariance)
        values, axes = values.flip(-1), axes.flip(-1)
        ctx.save_for_backward(values, axes)
        return values, axes

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, grad_axes: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradient in the covariance."""
        values, axes = ctx.saved_tensors
        apart = values[:, None, :] - values[:, :, None]  # λ_j - λ_i
        same = _coincide(values)
        factors = torch.where(same, 0.0, 1.0 / torch.where(same, 1.0, apart))
        inner = factors * (axes.mT @ grad_axes) + torch.diag_embed(grad_values)
        gradient = axes @ inner @ axes.mT
        return (gradient + gradient.mT) / 2


def tied_axes(vectors: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """Complete a set of axes by directions of the vectors, in every way that none outranks.

    Each next axis is the part across the known ones of the shortest vector that has one; among
    equally long ones of that with the highest label, then the largest part. Vectors that tie in all
    of this are equivalent by symmetry, or as good as: each makes a set of its own.

    Args:
        vectors: (n, d).
        labels: (n,).
        known: Orthonormal columns, (d, n_known).

    Returns:
        (n_sets, d, d), known columns first.
    """
    d, n_known = known.shape
    if n_known >= d - 1:
        return _completed(known)[None]
    across = vectors - vectors @ known @ known.mT
    lengths = torch.linalg.vector_norm(vectors, dim=1)
    parts = torch.linalg.vector_norm(across, dim=1)
    chosen = (parts > 1e-11 * lengths.amax(0)) if len(parts) else parts.bool()
    if not bool(chosen.any()):  # all lie along the known axes: the others make no difference
        return _completed(known)[None]
    # Of a nearly linear chain the part across is small but it is all there is.
    chosen &= parts >= min(0.1, float((parts / lengths)[chosen].max()) * (1 - _TIE)) * lengths
    for rank in (-lengths, labels.to(lengths), parts):
        best = rank[chosen].max()
        chosen &= rank >= best - _TIE * best.abs()
    directions = across[chosen] / parts[chosen][:, None]
    # Once more: what is left of a nearly parallel vector has the rounding error of the whole.
    directions = torch.nn.functional.normalize(directions - directions @ known @ known.mT, dim=1)
    return torch.cat(
        [
            tied_axes(vectors, labels, torch.cat([known, direction[:, None]], dim=1))
            for direction in _distinct_lines(directions)
        ]
    )


def _resolved(
    values: Tensor, axes: Tensor, vectors: Tensor, index: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return turns (n_ties, n_graphs, d, d) inside degenerate subspaces, and their weights."""
    n_graphs, d = values.shape
    turns = torch.eye(d, dtype=axes.dtype, device=axes.device).expand(1, n_graphs, d, d)
    shares = values.new_ones(1, n_graphs)
    same = _coincide(values).diagonal(offset=1, dim1=1, dim2=2)  # (n_graphs, d - 1)
    found: dict[int, Tensor] = {}
    # How many frames there are is for the host to know: this is the one question to the device.
    for graph, ties in enumerate(same.tolist()):
        if not any(ties):
            continue
        mine = index == graph
        label = labels[mine] if labels is not None else index[mine]
        free = same[graph].new_zeros(d)
        free[:-1] |= same[graph]
        free[1:] |= same[graph]
        order = torch.cat([torch.nonzero(~free)[:, 0], torch.nonzero(free)[:, 0]])
        known = axes[graph][:, ~free]
        sets = tied_axes(vectors[mine], label, known)[:, :, order.argsort()]
        found[graph] = axes[graph].mT @ sets
    if found:
        n_ties = max(len(sets) for sets in found.values())
        turns = turns.repeat(n_ties, 1, 1, 1)
        shares = torch.nn.functional.pad(shares, (0, 0, 0, n_ties - 1))
        for graph, sets in found.items():
            turns[: len(sets), graph] = sets
            shares[:, graph] = 0.0
            shares[: len(sets), graph] = 1.0 / len(sets)
    return turns, shares


def _coincide(values: Tensor) -> Tensor:
    """Return which eigenvalues (n, d) count as equal, (n, d, d); all do where there are none."""
    pair = torch.maximum(values[:, :, None].abs(), values[:, None, :].abs())
    gap = (values[:, :, None] - values[:, None, :]).abs()
    return gap <= _GAP * pair + _ROUNDING * values[:, :1, None].abs()


def _completed(known: Tensor) -> Tensor:
    d, n_known = known.shape
    eye = torch.eye(d, dtype=known.dtype, device=known.device)
    basis = torch.linalg.qr(torch.cat([known, eye], dim=1)).Q
    return torch.cat([known, basis[:, n_known:]], dim=1)


def _distinct_lines(directions: Tensor) -> list[Tensor]:
    lines: list[Tensor] = []
    for direction in directions:
        if all(float((direction @ line).abs()) < 1.0 - _TIE for line in lines):
            lines.append(direction)
    return lines


def _embedded(frames: Tensor) -> Tensor:
    if frames.shape[-1] == 3:
        return frames
    z = frames.new_zeros(*frames.shape[:-2], 3, 3)
    z[..., 2, 2] = 1.0
    return z + torch.nn.functional.pad(frames, (0, 1, 0, 1))


@constant_table
def _signs(dim: int, proper: bool) -> Tensor:
    """Return the signs that axes can have, (n_signs, dim); if ``proper``, an even number of -1."""
    signs = product((1.0, -1.0), repeat=dim)
    return torch.tensor([s for s in signs if not proper or math.prod(s) > 0], dtype=torch.float64)
