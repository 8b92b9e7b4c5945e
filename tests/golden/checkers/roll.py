"""The roll of edge frames under the rule of the reference codes, whose forces go through it.

Energies of networks with SiLU on a grid in the edge frame depend on the roll, so the reference's
forces have a part that goes through the rule which chooses it. Ours leave it out: the rule drawn
here is random there, and its derivative means nothing. To compare forces, the checkers add it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

Maps = Sequence[tuple[nn.Module, nn.Module]]  # the first and the second map in the edge frames


def reference_rotation(vectors: Tensor, gauge: Sequence[float]) -> Tensor:
    """Return the rotations to +y, (n_edges, 3, 3), by the rule of the references.

    Args:
        vectors: Of edges, (n_edges, 3).
        gauge: What the random numbers in [0, 1) were.
    """
    unit = normalize(vectors, dim=1)
    x, y, z = normalize(torch.tensor(gauge).to(vectors) - 0.5, dim=0)
    chosen = torch.stack((x, y, z)).expand_as(unit)
    for other in (torch.stack((-y, x, z)), torch.stack((x, -z, y))):
        along = [(candidate * unit).sum(1).abs() for candidate in (chosen, other)]
        chosen = torch.where((along[0] > along[1])[:, None], other, chosen)
    third = normalize(torch.linalg.cross(unit, chosen), dim=1)
    second = normalize(torch.linalg.cross(unit, third), dim=1)
    return torch.stack((third, unit, -second), dim=1)


@contextmanager
def rolling(maps: Maps, lmax: int, mmax: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Let what is between two maps follow the roll of differentiable rotations.

    Yields a function of rotations (n_edges, 3, 3), to be called before the model: it returns them
    detached, and from then on messages turn by an angle of zero that carries the roll's gradient.
    """
    angle = torch.zeros(0)

    def follow(rotation: Tensor) -> Tensor:
        nonlocal angle
        turn = rotation @ rotation.detach().mT  # 1 + [omega], omega_y is the roll
        angle = (turn[:, 0, 2] - turn[:, 2, 0]) / 2
        return rotation.detach()

    def to_edge(_module: nn.Module, given: tuple) -> tuple:
        return about_edge(given[0], angle.to(given[0]), lmax, mmax), *given[1:]

    def from_edge(_module: nn.Module, _given: tuple, result: tuple[Tensor, Tensor]) -> tuple:
        return about_edge(result[0], -angle.to(result[0]), lmax, mmax), result[1]

    hooks = [first.register_forward_pre_hook(to_edge) for first, _ in maps]
    hooks += [second.register_forward_hook(from_edge) for _, second in maps]
    yield follow
    for hook in hooks:
        hook.remove()


def about_edge(rows: Tensor, angle: Tensor, lmax: int, mmax: int) -> Tensor:
    """Turn m-primary rows (n_edges, n_rows, channels) about +y by angles (n_edges,)."""
    sizes = [lmax + 1 - m for m in range(mmax + 1) for _ in range(min(m + 1, 2))]
    parts = rows.split(sizes, dim=1)
    turned = [parts[0]]
    for m in range(1, mmax + 1):
        plus, minus = parts[2 * m - 1 : 2 * m + 1]
        cosine, sine = ((m * angle).cos()[:, None, None], (m * angle).sin()[:, None, None])
        turned += [cosine * plus - sine * minus, sine * plus + cosine * minus]
    return torch.cat(turned, dim=1)
