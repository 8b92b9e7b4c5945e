"""Layers on multivectors: linear maps by grade, gates, normalisations and weighted products.

Ruhe, Brandstetter and Forré, Clifford group equivariant neural networks, arXiv:2305.11141; with
:class:`GeometricBlock` of ``sharing="quaternion"`` the layers of GLGENN (arXiv:2506.09625), whose
weights are shared by grades modulo four. Multivectors are (n, 2^dimension, channels).
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from atomeq.ops.clifford.algebra import Sharing, algebra_of, grade_index, quadratic_signs
from atomeq.ops.clifford.operations import geometric_product, number_of_paths
from atomeq.ops.tables import table_like

Signature = tuple[int, int]
PUBLISHED_FLOOR = 1e-16  # of squared quadratic forms under a root
_NORM_EPSILON = 1e-6


class GradeLinear(nn.Module):
    """Mix the channels of each grade by a matrix of its own; a bias on the scalars.

    Args:
        signature: Of the algebra.
        in_channels: Channels in.
        out_channels: Channels out.
        by_grade: False takes one matrix for all grades.
        bias: Whether scalars have biases.
    """

    def __init__(
        self,
        signature: Signature,
        in_channels: int,
        out_channels: int,
        *,
        by_grade: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.sizes = grade_sizes(signature)
        n_matrices = len(self.sizes) if by_grade else 1
        weight = torch.randn(n_matrices, in_channels, out_channels) / math.sqrt(in_channels)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (n, 2^d, in_channels)."""
        return grade_linear(x, self.weight, self.bias, self.sizes)


def grade_sizes(signature: Signature) -> tuple[int, ...]:
    """Return how many blades each grade has."""
    dimension = algebra_of(signature).dimension
    return tuple(math.comb(dimension, grade) for grade in range(dimension + 1))


def grade_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...]) -> Tensor:
    """Multiply the channels of each grade by its matrix.

    Args:
        x: (n, 2^d, C).
        weight: (n_grades, C, C_out), or (1, C, C_out) for all grades.
        bias: Of the scalars, (C_out,).
        sizes: Blades of each grade.
    """
    if len(weight) == 1:
        y = x @ weight[0]
        return y if bias is None else torch.cat([y[:, :1] + bias, y[:, 1:]], dim=1)
    parts = [part @ matrix for part, matrix in zip(x.split(sizes, dim=1), weight, strict=True)]
    if bias is not None:
        parts[0] = parts[0] + bias
    return torch.cat(parts, dim=1)


def grade_squares(x: Tensor, signature: Signature) -> Tensor:
    """Return the scalar part of reverse(x) x of each grade, (n, n_grades, C)."""
    squares = x.square()
    if signature[1]:
        squares = squares * table_like(quadratic_signs, *signature, like=x)[:, None]
    parts = squares.split(grade_sizes(signature), dim=1)
    return torch.cat([part.sum(dim=1, keepdim=True) for part in parts], dim=1)


def by_blade(values: Tensor, signature: Signature) -> Tensor:
    """Repeat values of the grades (n, n_grades, C) for each of their blades, (n, 2^d, C)."""
    return values.index_select(1, table_like(grade_index, sum(signature), like=values))


def rooted(form: Tensor, floor: float) -> Tensor:
    """Return the root of the size of a quadratic form, smooth through 0: (q² + floor)^(1/4)."""
    return (form.square() + floor).sqrt().sqrt()


class GradeSiLU(nn.Module):
    """Gates: each grade times sigmoid(a s + b), s the scalar itself or the grade's form.

    Args:
        signature: Of the algebra.
        channels: Channels.
        invariant: ``mag2``: the quadratic form of the grade, ``norm``: its root.
        floor: Of the root.
    """

    def __init__(
        self,
        signature: Signature,
        channels: int,
        *,
        invariant: Literal["mag2", "norm"] = "mag2",
        floor: float = PUBLISHED_FLOOR,
    ) -> None:
        super().__init__()
        self.signature = signature
        self.invariant = invariant
        self.floor = floor
        n_grades = len(grade_sizes(signature))
        self.a = nn.Parameter(torch.ones(n_grades, channels))
        self.b = nn.Parameter(torch.zeros(n_grades, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Gate x, (n, 2^d, channels)."""
        sizes = grade_squares(x, self.signature)
        if self.invariant == "norm":
            sizes = rooted(sizes, self.floor)
        invariants = torch.cat([x[:, :1], sizes[:, 1:]], dim=1)
        return x * by_blade(torch.sigmoid(self.a * invariants + self.b), self.signature)


class GradeNorm(nn.Module):
    """Divide each grade by its own norm, as far as a trained number between 0 and 1 says.

    Args:
        signature: Of the algebra.
        channels: Channels.
        floor: Of the root.
    """

    def __init__(
        self, signature: Signature, channels: int, *, floor: float = PUBLISHED_FLOOR
    ) -> None:
        super().__init__()
        self.signature = signature
        self.floor = floor
        self.a = nn.Parameter(torch.zeros(len(grade_sizes(signature)), channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (n, 2^d, channels)."""
        norms = rooted(grade_squares(x, self.signature), self.floor)
        divisors = torch.sigmoid(self.a) * (norms - 1.0) + (1.0 + _NORM_EPSILON)
        return x * by_blade(divisors.reciprocal(), self.signature)


class MultivectorNorm(nn.Module):
    """Divide multivectors by the mean norm of their channels.

    Args:
        signature: Of the algebra.
        channels: Channels.
        floor: Of the root.
    """

    def __init__(
        self, signature: Signature, channels: int, *, floor: float = PUBLISHED_FLOOR
    ) -> None:
        super().__init__()
        self.signature = signature
        self.floor = floor
        self.a = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, (n, 2^d, channels)."""
        form = grade_squares(x, self.signature).sum(dim=1, keepdim=True)
        mean = rooted(form, self.floor).mean(dim=2, keepdim=True)
        return x * (self.a / (mean + _NORM_EPSILON))


class SteerableProduct(nn.Module):
    """The weighted geometric product of x with a normalised linear map of itself.

    y = (linear_left x + x w r)/√2, r the normalised linear_right x.

    Args:
        signature: Of the algebra.
        channels: Channels in.
        out_channels: Channels out; None couples channel by channel, else each output sums the
            products of all channels (the reference's fully connected layer).
        sharing: Which paths have one weight.
        first_order: Add the linear term; GLGENN does not.
        floor: Of the root.
    """

    def __init__(
        self,
        signature: Signature,
        channels: int,
        out_channels: int | None = None,
        *,
        sharing: Sharing = "grade",
        first_order: bool = True,
        floor: float = PUBLISHED_FLOOR,
    ) -> None:
        super().__init__()
        self.signature = signature
        self.sharing: Sharing = sharing
        self.out_channels = out_channels
        self.linear_right = GradeLinear(signature, channels, channels, bias=False)
        n_out = channels if out_channels is None else out_channels
        self.linear_left = GradeLinear(signature, channels, n_out) if first_order else None
        self.normalization = GradeNorm(signature, channels, floor=floor)
        shape = (channels,) if out_channels is None else (out_channels, channels)
        n_terms = (1 if out_channels is None else channels) * (sum(signature) + 1)
        paths = number_of_paths(signature, sharing)
        self.weight = nn.Parameter(torch.randn(paths, *shape) / math.sqrt(n_terms))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x, (n, 2^d, channels)."""
        right = self.normalization(self.linear_right(x))
        if self.out_channels is None:
            y = self._product(x, right, self.weight)
        else:
            pairs = self.weight.flatten(1)
            left, right = (part.repeat(1, 1, self.out_channels) for part in (x, right))
            y = self._product(left, right, pairs).unflatten(2, (self.out_channels, -1)).sum(dim=3)
        if self.linear_left is None:
            return y
        return (self.linear_left(x) + y) * math.sqrt(0.5)

    def _product(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        return geometric_product(x, y, weights, signature=self.signature, sharing=self.sharing)


class GeometricBlock(nn.Module):
    """Linear, gates, product and normalisation; of GLGENN's sharing linear and product alone.

    Args:
        signature: Of the algebra.
        channels: Channels of the linear map's result, and out.
        in_channels: Channels in; None leaves the linear map to the caller.
        sharing: ``quaternion`` for GLGENN's form: weights shared by grades modulo four, and no
            bias, gates, linear term or normalisation of the result.
        floor: Of the roots.
    """

    def __init__(
        self,
        signature: Signature,
        channels: int,
        in_channels: int | None = None,
        *,
        sharing: Sharing = "grade",
        floor: float = PUBLISHED_FLOOR,
    ) -> None:
        super().__init__()
        full = sharing == "grade"
        self.linear = (
            None
            if in_channels is None
            else GradeLinear(signature, in_channels, channels, bias=full)
        )
        self.gate = GradeSiLU(signature, channels, floor=floor) if full else None
        self.product = SteerableProduct(
            signature, channels, sharing=sharing, first_order=full, floor=floor
        )
        self.norm = MultivectorNorm(signature, channels, floor=floor) if full else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x, (n, 2^d, in_channels or channels), to (n, 2^d, channels)."""
        for layer in (self.linear, self.gate, self.product, self.norm):
            x = x if layer is None else layer(x)
        return x
