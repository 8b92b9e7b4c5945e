"""Small random problems by which kernels prove themselves."""

from torch import Tensor

from atomeq.ops.coupling.symmetric_contraction_basis import form_of
from atomeq.ops.paths import tensor_product_paths
from atomeq.ops.self_check import Example, indices, random
from atomeq.ops.specification import Size

_ATOMS, _EDGES = 5, 24


def product(size: Size) -> Example:
    """Return features of edges, with weights of their own."""
    paths = tensor_product_paths(size.lmax, size.lmax, size.lmax)
    n_sph, channels = (size.lmax + 1) ** 2, size.channels
    x, y = random(size, _EDGES, n_sph, channels), random(size, _EDGES, n_sph)
    weights = random(size, _EDGES, len(paths), channels)
    if not size.weighted:
        return [x, y], lambda operation, x, y: operation(x, y, None, paths)
    return [x, y, weights], lambda operation, x, y, w: operation(x, y, w, paths)


def convolution(size: Size) -> Example:
    """Return features of atoms, one of which has no edge, and edges with weights of their own."""
    paths = tensor_product_paths(size.lmax, size.lmax, size.lmax)
    n_sph, channels = (size.lmax + 1) ** 2, size.channels
    edges = indices(size, _ATOMS, 2, _EDGES)
    x, y = random(size, _ATOMS, n_sph, channels), random(size, _EDGES, n_sph)
    weights = random(size, _EDGES, len(paths), channels)
    if not size.weighted:
        return [x, y], lambda operation, x, y: operation(x, y, None, edges, _ATOMS, paths)
    return [x, y, weights], lambda operation, x, y, w: operation(x, y, w, edges, _ATOMS, paths)


def contraction(size: Size) -> Example:
    """Return features of atoms of two elements, and weights of products of two."""
    degrees = tuple(range(min(size.lmax, 1) + 1))
    n_columns = form_of((size.lmax + 1) ** 2, degrees, 2).n_columns
    x = random(size, _ATOMS, (size.lmax + 1) ** 2, size.channels)
    weights, species = random(size, 2, n_columns, size.channels), indices(size, 3, _ATOMS)

    def compute(operation, x: Tensor, weights: Tensor) -> Tensor:
        return operation(x, weights, species, degrees=degrees, order=2)

    return [x, weights], compute
