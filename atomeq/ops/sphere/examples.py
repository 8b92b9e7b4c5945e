"""Small random problems by which kernels prove themselves."""

from atomeq.ops.self_check import Example, random
from atomeq.ops.specification import Size
from atomeq.ops.sphere.grid import SphereGrid


def features(size: Size) -> Example:
    """Return coefficients and a grid of their degree."""
    grid = SphereGrid(size.lmax, size.mmax, order="m")
    x = random(size, 5, len(grid.from_matrix(like=random(size, 1))), size.channels)
    return [x], lambda operation, x: operation(x, grid)


def factors(size: Size) -> Example:
    """Return two functions of the same degree."""
    x, y = (random(size, 5, (size.lmax + 1) ** 2, size.channels) for _ in range(2))
    return [x, y], lambda operation, x, y: operation(x, y, size.lmax)
