"""Directions and frames of single atoms, smooth in the positions, that turn along with them.

A direction of an atom is that of a neighbour; a frame is spanned by two neighbours. Weights end at
a cutoff and where two neighbours lie in line, so sums over directions, and means over frames, are
smooth while neighbours come, go and become equivalent: Pozdnyakov and Ceriotti, Smooth, exact
rotational symmetrization for deep learning on point clouds, NeurIPS 2023, arXiv:2305.19302.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atomeq.ops.segment.operations import segment_sum
from atomeq.typing import EdgeVectors

_DECAY = 4  # power of the distance by which near neighbours count more
_SHARPNESS = 8  # of the power mean that stands for the largest weight
_SMALLEST = 0.1  # share of it below which a pair does not count
_BENT = 0.1  # sin² of the angle up to which two neighbours are nearly in line
_NEARLY_IN_LINE = 1e-12  # sin² below which the second axis has no derivative
_IN_LINE = 1e-24  # sin² below which two neighbours span nothing


class Directions(NamedTuple):
    """Directions of each atom, the first of them zero: that of no neighbour.

    Attributes:
        vectors: Unit vectors, or zero, (n_atoms, n_directions, 3).
        weights: In sums over the directions of an atom, (n_atoms, n_directions); 0 where it has
            fewer than others.
        edge: To which edge each belongs, (n_atoms, n_directions); -1 to none.
    """

    vectors: Float[Tensor, "n_atoms n_directions 3"]
    weights: Float[Tensor, "n_atoms n_directions"]
    edge: Int[Tensor, "n_atoms n_directions"]

    @property
    def present(self) -> Bool[Tensor, "n_atoms n_directions"]:
        """Which directions are those of neighbours."""
        return self.edge >= 0


def neighbour_directions(
    units: EdgeVectors, target: Tensor, weights: Tensor, n_atoms: int
) -> Directions:
    """Return the directions to all neighbours that have a weight.

    Args:
        units: From targets to sources, of length 1, (n_edges, 3).
        target: (n_edges,).
        weights: Zero from some distance on, (n_edges,).
        n_atoms: Number of atoms.
    """
    near = torch.nonzero(weights.detach() > 0)[:, 0]
    near = near[torch.argsort(target[near], stable=True)]
    atom = target[near]
    counts = _counts(atom, n_atoms)
    number = torch.arange(len(near), device=near.device) - (counts.cumsum(0) - counts)[atom]
    n_slots = 1 + (int(counts.max()) if n_atoms else 0)
    slot = atom * n_slots + 1 + number
    edge = near.new_full((n_atoms * n_slots,), -1).index_put((slot,), near)
    shares = weights.new_zeros(n_atoms * n_slots).index_put((slot,), weights.index_select(0, near))
    first = torch.arange(0, n_atoms * n_slots, n_slots, device=near.device)
    shares = shares.index_fill(0, first, 1.0)
    vectors = units.new_zeros(n_atoms * n_slots, 3)
    vectors = vectors.index_put((slot,), units.index_select(0, near))
    return Directions(
        vectors.view(n_atoms, n_slots, 3),
        shares.view(n_atoms, n_slots),
        edge.view(n_atoms, n_slots),
    )


class AtomFrames(NamedTuple):
    """Frames of atoms, more than one each.

    Attributes:
        matrices: Orthogonal, an axis in each column: x -> x R, (n_frames, 3, 3).
        atom: Whose they are, (n_frames,).
        weights: Those of an atom sum to 1, (n_frames,).
    """

    matrices: Float[Tensor, "n_frames 3 3"]
    atom: Int[Tensor, " n_frames"]
    weights: Float[Tensor, " n_frames"]


def neighbour_frames(
    vectors: EdgeVectors, target: Tensor, envelope: Tensor, n_atoms: int, *, proper: bool = False
) -> AtomFrames:
    """Return the frames that pairs of near neighbours span, with smooth weights.

    The first axis points to one neighbour, the second is the part across of the direction to
    another, the third their cross product and, unless ``proper``, its opposite too. A pair counts
    by the distances and by its angle, beside those that count most; where two are nearly in line,
    the second axis is taken with both signs, so that the mean has no kink as they pass the line.
    An atom whose neighbours all lie on one line, or that has none, gets any axes across it.

    Args:
        vectors: From targets to sources, (n_edges, 3), Å; frames and weights are differentiable.
        target: (n_edges,).
        envelope: Zero at the cutoff, (n_edges,).
        n_atoms: Number of atoms.
        proper: Rotations only, so that mirror images may differ.
    """
    lengths = torch.linalg.vector_norm(vectors, dim=1)
    units = vectors / lengths[:, None]
    nearness = envelope / lengths**_DECAY
    first, second = pairs_within(target, target, n_atoms)
    apart = first != second
    first, second = first[apart], second[apart]
    x, other = units.index_select(0, first), units.index_select(0, second)
    across = other - (other * x).sum(dim=1, keepdim=True) * x
    squared = (across * across).sum(dim=1)  # sin² of the angle
    weights = nearness.index_select(0, first) * nearness.index_select(0, second) * squared
    usable = squared.detach() > _IN_LINE
    usable &= weights.detach() > 0
    atom, chosen = target.index_select(0, first), torch.nonzero(usable)[:, 0]
    shares, kept = _shares(weights[chosen], atom[chosen], n_atoms)
    chosen, shares = chosen[kept], shares[kept]
    x, y, squared = x[chosen], across[chosen], squared[chosen]
    # Divided by so little, a derivative is rounding error; that of the mean vanishes there.
    y = torch.where((squared.detach() < _NEARLY_IN_LINE)[:, None], y.detach(), y)
    y = y / torch.linalg.vector_norm(y, dim=1, keepdim=True)
    flips = _switch(1 - squared / _BENT) / 2
    atoms, axes, parts = [atom[chosen]], [(x, y)], [shares * (1 - flips)]
    bent = torch.nonzero(flips.detach() > 0)[:, 0]
    atoms.append(atom[chosen][bent])
    axes.append((x[bent], -y[bent]))
    parts.append((shares * flips)[bent])
    lonely = torch.ones(n_atoms, dtype=torch.bool, device=target.device)
    lonely[atom[chosen]] = False
    atoms_in_line, in_line, shares_in_line = _on_a_line(units, nearness, target, lonely)
    for sign in (1.0, -1.0):
        atoms.append(atoms_in_line)
        axes.append((in_line[0], sign * in_line[1]))
        parts.append(shares_in_line / 2)
    x, y = (torch.cat([pair[k] for pair in axes]) for k in (0, 1))
    atom, shares = torch.cat(atoms), torch.cat(parts)
    z = torch.linalg.cross(x, y)
    matrices = torch.stack([x, y, z], dim=2)
    if proper:
        return AtomFrames(matrices, atom, shares)
    mirrored = torch.stack([x, y, -z], dim=2)
    return AtomFrames(
        torch.cat([matrices, mirrored]), atom.repeat(2), torch.cat([shares, shares]) / 2
    )


def _shares(weights: Tensor, atom: Tensor, n_atoms: int) -> tuple[Tensor, Tensor]:
    """Return weights that sum to 1 for each atom, and which of them are not zero."""
    peaks = weights.new_zeros(n_atoms).scatter_reduce(0, atom, weights.detach(), reduce="amax")
    relative = weights / peaks.index_select(0, atom)
    # A smooth stand-in for the largest, which would have a kink where two change places.
    largest = segment_sum(relative**_SHARPNESS, atom, n_atoms).index_select(0, atom)
    ratio = relative / largest ** (1 / _SHARPNESS)
    kept = _switch((ratio - _SMALLEST) / (1 - _SMALLEST))
    totals = segment_sum(kept, atom, n_atoms).index_select(0, atom)
    return kept / totals, torch.nonzero(kept.detach() > 0)[:, 0]


def _on_a_line(
    units: Tensor, nearness: Tensor, target: Tensor, lonely: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Return atoms, first and second axes and shares of frames where no two neighbours span any."""
    edges = torch.nonzero(lonely[target] & (nearness.detach() > 0))[:, 0]
    shares, kept = _shares(nearness[edges], target[edges], len(lonely))
    edges, shares = edges[kept], shares[kept]
    alone = lonely.clone()
    alone[target[edges]] = False
    alone = torch.nonzero(alone)[:, 0]
    x = torch.cat([units[edges], units.new_tensor([[1.0, 0.0, 0.0]]).expand(len(alone), 3)])
    least = torch.nn.functional.one_hot(x.detach().abs().argmin(dim=1), 3).to(x)
    y = torch.nn.functional.normalize(torch.linalg.cross(x, least), dim=1)
    return (
        torch.cat([target[edges], alone]),
        (x, y),
        torch.cat([shares, shares.new_ones(len(alone))]),
    )


def _switch(x: Tensor) -> Tensor:
    """Return a function with two continuous derivatives, 0 for x <= 0 and 1 for x >= 1."""
    x = x.clamp(0, 1)
    return x * x * x * (10 - 15 * x + 6 * x * x)


def pairs_within(
    first: Tensor, second: Tensor, n_segments: int
) -> tuple[Int[Tensor, " n_pairs"], Int[Tensor, " n_pairs"]]:
    """Return all pairs of members of two lists that belong to the same segment.

    Args:
        first: Segment of each member of the first list, (n_first,).
        second: Segment of each member of the second list, (n_second,).
        n_segments: Number of segments.

    Returns:
        Members of the first list, ascending, and of the second, each (n_pairs,).
    """
    order = torch.argsort(second, stable=True)
    counts = _counts(second, n_segments)
    starts = counts.cumsum(0) - counts
    repeats = counts[first]
    left = torch.repeat_interleave(repeats)
    number = torch.arange(len(left), device=left.device) - (repeats.cumsum(0) - repeats)[left]
    return left, order[starts[first[left]] + number]


def _counts(index: Tensor, n: int) -> Tensor:
    """Return how often each number below n occurs, (n,), without asking a device."""
    return index.new_zeros(n).index_add_(0, index, torch.ones_like(index))
