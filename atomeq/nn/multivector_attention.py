"""Products of the points of a tuple, and attention over the neighbours of an atom that reads them.

Spellings, Geometric algebra attention networks, arXiv:2110.02393. A product of an even number of
vectors is a scalar and a bivector, of an odd number a vector and a trivector.
"""

from typing import Literal

import torch
from torch import Tensor

from atomeq.ops.clifford.operations import geometric_product

#: Which products of the points r_1 r_2 ... of a tuple are taken: the whole one; all that begin with
#: the first point, the longest first; or the same for every first point.
Mode = Literal["single", "partial", "full"]
Product = tuple[Tensor, int]  # multivectors (*, 8), and of how many points they are the product


def products_of(points: list[Tensor], mode: Mode) -> list[Product]:
    """Return products of multivectors (*, 8) each, which broadcast, and their numbers of points."""
    found: list[Product] = []
    for start in range(len(points) if mode == "full" else 1):
        product, runs = points[start], [(points[start], 1)]
        for n, point in enumerate(points[start + 1 :], start=2):
            left, right = torch.broadcast_tensors(product, point)
            product = geometric_product(left[..., None], right[..., None])[..., 0]
            runs.append((product, n))
        found += reversed(runs)
    return found[:1] if mode == "single" else found


def invariants_of(product: Tensor, n_points: int, *, vector: bool, floor: float = 0.0) -> Tensor:
    """Return the invariants of a product; under mirrors the trivector changes its sign.

    Args:
        product: (*, 8).
        n_points: Vectors it is the product of.
        vector: Points are vectors: [|r|] of one of them, [scalar, |bivector|] of an even and
            [|vector|, trivector] of an odd number. Else [scalar, |vector|, |bivector|, trivector].
        floor: Added to squares under a root, which makes norms smooth; with one the trivector has
            a norm too and loses its sign.
    """
    scalar, trivector = product[..., :1], product[..., 7:]
    trivector = _norm(trivector, floor) if floor else trivector
    of_vector, of_bivector = (_norm(product[..., rows], floor) for rows in (_VECTOR, _BIVECTOR))
    if not vector:
        return torch.cat([scalar, of_vector, of_bivector, trivector], dim=-1)
    if n_points == 1:
        return of_vector
    parts = [of_vector, trivector] if n_points % 2 else [scalar, of_bivector]
    return torch.cat(parts, dim=-1)


def vectors_of(product: Tensor, n_points: int) -> Tensor:
    """Return the vector of a product (*, 8); of an even number of points its bivector's dual."""
    if n_points % 2:
        return product[..., _VECTOR]
    e12, e13, e23 = product[..., _BIVECTOR].unbind(-1)
    return torch.stack([e23, -e13, e12], dim=-1)


_VECTOR, _BIVECTOR = slice(1, 4), slice(4, 7)


def _norm(x: Tensor, floor: float) -> Tensor:
    squared = x.square().sum(dim=-1, keepdim=True)
    if floor:
        return (squared + floor).sqrt()
    safe = torch.where(squared > 0, squared, 1.0)  # the gradient of a root at 0 is none
    return torch.where(squared > 0, safe.sqrt(), 0.0)
