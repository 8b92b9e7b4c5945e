"""Functions of the edge length: radial bases and the envelope that ends them at the cutoff."""

import math

import torch
from torch import Tensor, nn

from atomeq.typing import EdgeLengths


class BesselBasis(nn.Module):
    """Spherical Bessel functions of order zero that vanish at the cutoff.

    b_n(r) = √(2/r_c) · sin(nπr/r_c)/r, n = 1 … num_radial (DimeNet, Gasteiger et al. 2020,
    arXiv:2003.03123, eq. 7), in the scale
    sin(nx)/x, x = πr/r_c, that makes values of order one.

    Args:
        num_radial: Number of functions.
        cutoff: r_c, Å.
    """

    orders: Tensor  # integers: the same basis in float32 and in float64

    def __init__(self, num_radial: int, cutoff: float) -> None:
        super().__init__()
        self.num_radial = num_radial
        self.cutoff = cutoff
        self.register_buffer("orders", torch.arange(1, num_radial + 1), persistent=False)

    def forward(self, lengths: EdgeLengths) -> Tensor:
        """Evaluate the basis at ``lengths`` (n_edges,), Å; returns (n_edges, num_radial)."""
        x = lengths[:, None] * (math.pi / self.cutoff)
        return torch.sin(x * self.orders) / x


class TrainedBesselBasis(nn.Module):
    """Bessel functions whose wave numbers are trained: b_n(r) = 2/r_c · sin(k_n r)/r.

    As in NequIP (arXiv:2101.03164); k_n starts at nπ/r_c.

    Args:
        num_radial: Number of functions.
        cutoff: r_c, Å.
    """

    def __init__(self, num_radial: int, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        orders = torch.arange(1, num_radial + 1)
        self.wave_numbers = nn.Parameter(orders * (math.pi / cutoff))  # 1/Å

    def forward(self, lengths: EdgeLengths) -> Tensor:
        """Evaluate the basis at ``lengths`` (n_edges,), Å; returns (n_edges, num_radial)."""
        r = lengths[:, None]
        return torch.sin(r * self.wave_numbers) * (2.0 / self.cutoff) / r


class GaussianBasis(nn.Module):
    """Gaussians on an even grid: exp(-½ ((r - μ_k)/(w Δ))²), μ_k from 0 to the cutoff.

    Args:
        num_radial: Number of Gaussians, at least 2.
        cutoff: Centre of the last one, Å.
        width: w, in units of the grid spacing Δ.
    """

    orders: Tensor

    def __init__(self, num_radial: int, cutoff: float, *, width: float = 1.0) -> None:
        super().__init__()
        if num_radial < 2:
            raise ValueError(f"a Gaussian basis needs at least 2 functions, got {num_radial}")
        self.num_radial = num_radial
        self.spacing = cutoff / (num_radial - 1)
        self.width = width
        self.register_buffer("orders", torch.arange(num_radial), persistent=False)

    def forward(self, lengths: EdgeLengths) -> Tensor:
        """Evaluate the basis at ``lengths`` (n_edges,), Å; returns (n_edges, num_radial)."""
        steps = lengths[:, None] / self.spacing - self.orders
        return torch.exp(-0.5 * (steps / self.width) ** 2)


class SigmoidBasis(nn.Module):
    """Steps on an even grid: s(w (r - μ_k)/Δ), s the logistic function, μ_k from 0 to the cutoff.

    Args:
        num_radial: Number of steps, at least 2.
        cutoff: Place of the last one, Å.
        width: w, in units of one over the grid spacing.
        slope: Adds this times the argument of s, so that no function saturates.
    """

    orders: Tensor

    def __init__(
        self, num_radial: int, cutoff: float, *, width: float = 1.0, slope: float = 0.0
    ) -> None:
        super().__init__()
        if num_radial < 2:
            raise ValueError(f"a basis of steps needs at least 2 functions, got {num_radial}")
        self.num_radial = num_radial
        self.spacing = cutoff / (num_radial - 1)
        self.width = width
        self.slope = slope
        self.register_buffer("orders", torch.arange(num_radial), persistent=False)

    def forward(self, lengths: EdgeLengths) -> Tensor:
        """Evaluate the basis at ``lengths`` (n_edges,), Å; returns (n_edges, num_radial)."""
        steps = self.width * (lengths[:, None] / self.spacing - self.orders)
        values = torch.sigmoid(steps)
        return values + self.slope * steps if self.slope else values


class LearnedBasis(nn.Module):
    """SiLU of affine functions of the length, with trained coefficients.

    Args:
        num_radial: Number of functions.
    """

    def __init__(self, num_radial: int) -> None:
        super().__init__()
        self.num_radial = num_radial
        self.affine = nn.Linear(2, num_radial)  # of (r, 1): published with two offsets

    def forward(self, lengths: EdgeLengths) -> Tensor:
        """Evaluate the basis at ``lengths`` (n_edges,), Å; returns (n_edges, num_radial)."""
        pairs = torch.stack([lengths, torch.ones_like(lengths)], dim=1)
        return nn.functional.silu(self.affine(pairs))


class PolynomialEnvelope(nn.Module):
    """A polynomial that goes from 1 at r = 0 to 0 at the cutoff with two continuous derivatives.

    u(x) = 1 - (p+1)(p+2)/2 x^p + p(p+2) x^(p+1) - p(p+1)/2 x^(p+2), x = r/r_c (DimeNet, eq. 8):
    u, u' and u'' vanish at x = 1, so energies, forces and Hessians are continuous there.

    Args:
        cutoff: r_c, Å.
        exponent: p; the larger, the later the decay sets in.
        height: What it is multiplied by.
    """

    def __init__(self, cutoff: float, *, exponent: int = 5, height: float = 1.0) -> None:
        super().__init__()
        self.height = height
        self.cutoff = cutoff
        self.exponent = exponent

    def forward(self, lengths: EdgeLengths) -> Tensor:
        """Evaluate u at ``lengths`` (n_edges,), Å; returns (n_edges,), zero beyond the cutoff."""
        p = self.exponent
        x = lengths / self.cutoff
        polynomial = self.height * (
            1.0
            - (p + 1) * (p + 2) / 2 * x**p
            + p * (p + 2) * x ** (p + 1)
            - p * (p + 1) / 2 * x ** (p + 2)
        )
        return torch.where(x < 1.0, polynomial, torch.zeros_like(x))


class XPLOREnvelope(nn.Module):
    """X-PLOR's switch: 1 up to an onset, from there to 0 at the cutoff, once differentiable.

    u(r) = (r_c² - r²)² (r_c² + 2r² - 3r_on²) / (r_c² - r_on²)³. u'' jumps at both ends, so forces
    are continuous and Hessians are not.

    Args:
        cutoff: r_c, Å.
        onset: r_on, Å.
    """

    def __init__(self, cutoff: float, *, onset: float) -> None:
        super().__init__()
        if not 0.0 <= onset < cutoff:
            raise ValueError(f"onset {onset} Å must lie between 0 and the cutoff, {cutoff} Å")
        self.cutoff = cutoff
        self.onset = onset

    def forward(self, lengths: EdgeLengths) -> Tensor:
        """Evaluate u at ``lengths`` (n_edges,), Å; returns (n_edges,), zero beyond the cutoff."""
        r2, end, start = lengths * lengths, self.cutoff**2, self.onset**2
        switch = (end - r2) ** 2 * (end + 2.0 * r2 - 3.0 * start) / (end - start) ** 3
        inside = torch.where(lengths < self.onset, torch.ones_like(switch), switch)
        return torch.where(lengths < self.cutoff, inside, torch.zeros_like(switch))
