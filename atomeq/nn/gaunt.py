"""A tensor-product layer on the sphere: cheaper than Clebsch-Gordan paths, and less expressive."""

import math

import torch
from torch import Tensor, nn

from atomeq.ops.paths import tensor_product_paths
from atomeq.ops.sphere.gaunt import gaunt_product


class GauntProduct(nn.Module):
    """Multiply two features channel by channel as functions on the sphere.

    A choice where many-body products of high degree are the bottleneck: symmetric powers of one
    atom's features, say. It is no replacement of a Clebsch-Gordan layer with weights per path: the
    weight of path (l1, l2, l3) is v_l1 v'_l2 v''_l3 times the Gaunt coefficient, and paths of odd
    l1 + l2 + l3, the cross product first of all, do not exist (:mod:`atomeq.ops.sphere.gaunt`).

    At the start, independent inputs of unit variance give outputs of unit variance.

    Args:
        lmax1: Highest degree of the first features.
        lmax2: Highest degree of the second features.
        lmax_out: Highest degree of the product, at most lmax1 + lmax2.
        channels: Of both features and of the product.
    """

    norm: Tensor

    def __init__(self, lmax1: int, lmax2: int, lmax_out: int, channels: int) -> None:
        super().__init__()
        if not 0 <= lmax_out <= lmax1 + lmax2:
            raise ValueError(
                f"lmax_out is {lmax_out}; the product of degrees {lmax1} and {lmax2} has degrees 0 "
                f"to {lmax1 + lmax2}"
            )
        self.lmax_out = lmax_out
        self.first = nn.Parameter(torch.ones(lmax1 + 1, channels))
        self.second = nn.Parameter(torch.ones(lmax2 + 1, channels))
        self.third = nn.Parameter(torch.ones(lmax_out + 1, channels))
        norm = _unit_variance(lmax1, lmax2, lmax_out)
        self.register_buffer("norm", norm.to(self.third.dtype), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Multiply two features.

        Args:
            x: (n, (lmax1 + 1)^2, channels).
            y: (n, (lmax2 + 1)^2, channels).

        Returns:
            (n, (lmax_out + 1)^2, channels).
        """
        first, second, third = map(_by_row, self.factors)
        return gaunt_product(x * first, y * second, self.lmax_out) * third

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What each degree of both features and of their product is multiplied by, (l, channels).

        Linear maps per degree before and after may take them along.
        """
        return self.first, self.second, self.third * self.norm


def _by_row(weights: Tensor) -> Tensor:
    """Repeat the weights of each degree l for its 2 l + 1 rows."""
    sizes = 2 * torch.arange(len(weights), device=weights.device) + 1
    return weights.repeat_interleave(sizes, dim=0)


def _unit_variance(lmax1: int, lmax2: int, lmax_out: int) -> Tensor:
    """Return 1 / the standard deviation of each degree of a product of unit variances, (l, 1)."""
    variance = torch.zeros(lmax_out + 1, 1, dtype=torch.float64)
    for path in tensor_product_paths(lmax1, lmax2, lmax_out):
        # A Gaunt coefficient is sqrt((2 l1 + 1)(2 l2 + 1)(2 l3 + 1) / 4 pi) times the 3j symbol
        # times its element of m = 0; the squares of the symbols sum to 1 over all three m.
        polar = _polar_square(path.l1, path.l2, path.l3)
        degrees = (2 * path.l1 + 1) * (2 * path.l2 + 1)
        variance[path.l3] += degrees / (4 * math.pi) * polar
    return variance.rsqrt()


def _polar_square(*degrees: int) -> float:
    """Return the square of the 3j symbol whose m are all 0, in Racah's closed form."""
    total = sum(degrees)
    if total % 2:
        return 0.0
    square = 1 / math.factorial(total + 1)
    root = math.factorial(total // 2)
    for l in degrees:
        square *= math.factorial(total - 2 * l)
        root /= math.factorial(total // 2 - l)
    return square * root**2
