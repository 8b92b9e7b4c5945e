"""Clifford algebras Cl(p, q): their blades, and the terms of the geometric product.

A multivector of n = p + q dimensions has 2^n components, one for each blade, a product of some of
the orthogonal unit vectors e_1 ... e_n; the first p of them square to 1, the others to -1. Blades
are ordered by their grade, the number of their vectors, and by them: 1, e1, e2, e3, e12, e13, e23,
e123.
"""

from functools import cache
from itertools import combinations
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from atomeq.ops.tables import constant_table

LARGEST_DIMENSION = 5
#: Which products of grades have one weight: each its own, or those equal modulo four.
Sharing = Literal["grade", "quaternion"]
Blade = tuple[int, ...]


class Algebra(NamedTuple):
    """A signature, and how the paths of its product share weights.

    Attributes:
        p: Unit vectors that square to 1.
        q: Unit vectors that square to -1.
        sharing: ``grade``: a path is a triple of grades (left, output, right); ``quaternion``: of
            grades modulo four (GLGENN, arXiv:2506.09625), which below four dimensions is the same.
    """

    p: int
    q: int
    sharing: Sharing = "grade"

    @property
    def dimension(self) -> int:
        """Dimension of the space, n."""
        return self.p + self.q

    @property
    def n_blades(self) -> int:
        """Components of a multivector, 2^n."""
        return 2 ** (self.p + self.q)

    @property
    def n_paths(self) -> int:
        """Weights of a product, one for each path."""
        return len(set(self.path_numbers().values()))

    def path_numbers(self) -> dict[tuple[int, int, int], int]:
        """Return the number of the path of each triple of grades: left, output, right."""
        triples = sorted({term[:3] for term in _graded_terms(self.p, self.q)})
        period = 4 if self.sharing == "quaternion" else self.dimension + 1
        keys = [tuple(grade % period for grade in triple) for triple in triples]
        numbers = {key: number for number, key in enumerate(sorted(set(keys)))}
        return {triple: numbers[key] for triple, key in zip(triples, keys, strict=True)}


def algebra_of(signature: tuple[int, int], sharing: Sharing = "grade") -> Algebra:
    """Return the algebra of a signature.

    Raises:
        ValueError: There is none, or it has more than five dimensions.
    """
    p, q = signature
    if min(p, q) < 0 or not 1 <= p + q <= LARGEST_DIMENSION:
        raise ValueError(
            f"signature {tuple(signature)}: p and q count the vectors that square to 1 and to -1, "
            f"1 to {LARGEST_DIMENSION} together"
        )
    if sharing not in get_args(Sharing):
        raise ValueError(f"sharing {sharing!r} is unknown; choose {' or '.join(get_args(Sharing))}")
    return Algebra(p, q, sharing)


@cache
def blades(dimension: int) -> tuple[Blade, ...]:
    """Return the vectors of each blade, in order."""
    vectors = range(dimension)
    return tuple(blade for k in range(dimension + 1) for blade in combinations(vectors, k))


@cache
def grades(dimension: int) -> tuple[int, ...]:
    """Return the grade of each blade."""
    return tuple(len(blade) for blade in blades(dimension))


class Term(NamedTuple):
    """sign * weight[path] * x[left] * y[right], one of those that are summed to a component."""

    left: int
    right: int
    output: int
    path: int
    sign: int


@cache
def terms(algebra: Algebra) -> tuple[Term, ...]:
    """Return all non-zero terms: for each output and each left blade there is one right blade."""
    place = {blade: number for number, blade in enumerate(blades(algebra.dimension))}
    degree, paths = grades(algebra.dimension), algebra.path_numbers()
    found = []
    for output in place:
        for left in place:
            right = tuple(sorted(set(left) ^ set(output)))
            i, j, k = place[left], place[output], place[right]
            sign = _sign(left, right, algebra.p)
            found.append(Term(i, k, j, paths[degree[i], degree[j], degree[k]], sign))
    return tuple(found)


def _graded_terms(p: int, q: int) -> list[tuple[int, int, int]]:
    names = blades(p + q)
    return [(len(a), len(set(a) ^ set(b)), len(b)) for a in names for b in names]


def _sign(left: Blade, right: Blade, p: int) -> int:
    """Return the sign of a product of blades: of the swaps that sort it, and of squares to -1."""
    swaps = sum(a > b for a in left for b in right)
    negative = sum(vector >= p for vector in set(left) & set(right))
    return (-1) ** (swaps + negative)


@constant_table
def right_blades(algebra: Algebra) -> Tensor:
    """Return the right blade of each term, (outputs, left blades)."""
    return _square([term.right for term in terms(algebra)], algebra)


@constant_table
def term_paths(algebra: Algebra) -> Tensor:
    """Return the path of each term, (outputs, left blades)."""
    return _square([term.path for term in terms(algebra)], algebra)


@constant_table
def term_signs(algebra: Algebra) -> Tensor:
    """Return the sign of each term, (outputs, left blades) float64."""
    return _square([term.sign for term in terms(algebra)], algebra).double()


@constant_table
def reversal_signs(dimension: int) -> Tensor:
    """Return what the reverse of a multivector multiplies its components by, (2^n,) float64."""
    return torch.tensor([(-1.0) ** (k * (k - 1) // 2) for k in grades(dimension)]).double()


@constant_table
def quadratic_signs(p: int, q: int) -> Tensor:
    """Return the sign of each square in the scalar part of reverse(x) x, (2^n,) float64."""
    names = blades(p + q)
    return torch.tensor([(-1.0) ** sum(v >= p for v in blade) for blade in names]).double()


@constant_table
def grade_index(dimension: int) -> Tensor:
    """Return the grade of each blade, (2^n,)."""
    return torch.tensor(grades(dimension))


def _square(values: list[int], algebra: Algebra) -> Tensor:
    return torch.tensor(values).view(algebra.n_blades, algebra.n_blades)
