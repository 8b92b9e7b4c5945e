"""Which degrees couple in a Clebsch-Gordan tensor product, and how channels do."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Output = Literal["sum", "paths"]
# Weight and bias of a last linear layer, with the axes of the weights that it makes for an edge.
RadialMap = tuple[Tensor, Tensor | None]


class Path(NamedTuple):
    """Degree l1 of x times degree l2 of y gives degree l3."""

    l1: int
    l2: int
    l3: int


def tensor_product_paths(
    lmax1: int, lmax2: int, lmax3: int, *, pseudotensors: bool = False
) -> tuple[Path, ...]:
    """Return every path between features up to the given degrees, sorted by (l1, l2, l3).

    Args:
        lmax1: Highest degree of x.
        lmax2: Highest degree of y.
        lmax3: Highest degree of the output.
        pseudotensors: Also return the paths of odd l1 + l2 + l3, such as the cross product: they
            change sign under inversion where their output degree must not, so a model that has
            them is equivariant to rotations only.
    """
    return tuple(
        Path(l1, l2, l3)
        for l1 in range(lmax1 + 1)
        for l2 in range(lmax2 + 1)
        for l3 in range(abs(l1 - l2), min(l1 + l2, lmax3) + 1)
        if pseudotensors or (l1 + l2 + l3) % 2 == 0
    )


def made_weights(weights: Tensor | None, radial_map: RadialMap | None) -> Tensor | None:
    """Return the weights of a convolution, those of all edges made at once if they are to be."""
    if radial_map is None or weights is None:
        return weights
    weight, bias = radial_map
    bias = None if bias is None else bias.flatten()
    flat = torch.nn.functional.linear(weights, weight.flatten(0, -2), bias)
    return flat.unflatten(1, weight.shape[:-1])
