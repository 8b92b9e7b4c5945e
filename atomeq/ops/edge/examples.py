"""Small random problems by which kernels prove themselves."""

import torch
from torch import Tensor

from atomeq.ops.edge.frame import EdgeFrame
from atomeq.ops.edge.wigner import build_edge_frame
from atomeq.ops.self_check import Example, indices, random
from atomeq.ops.specification import Size

_ATOMS, _EDGES = 5, 24


def into_frame(size: Size) -> Example:
    """Return features of atoms and the edges between them."""
    edges = indices(size, _ATOMS, 2, _EDGES)
    x = random(size, _ATOMS, (size.lmax + 1) ** 2, size.channels)

    def compute(operation, x: Tensor, vectors: Tensor) -> Tensor:
        return operation(x, _frame(size, vectors, edges), side="both")

    return [x, random(size, _EDGES, 3)], compute


def out_of_frame(size: Size) -> Example:
    """Return rows of edges."""
    edges, vectors = indices(size, _ATOMS, 2, _EDGES), random(size, _EDGES, 3)
    n_rows = _frame(size, vectors, edges).wigner.shape[1]

    def compute(operation, y: Tensor, vectors: Tensor) -> Tensor:
        frame = _frame(size, vectors, edges)
        return torch.cat((operation(y, frame), operation(y, frame, reduce="none")))

    return [random(size, _EDGES, n_rows, size.channels), vectors], compute


def so2_map(size: Size) -> Example:
    """Return rows of edges, and weights that keep the number of channels."""
    weights = _weights(size, size.channels, size.channels, 0)
    n_rows = sum((size.lmax - m + 1) * (2 if m else 1) for m in range(size.mmax + 1))
    x = random(size, _EDGES, n_rows, size.channels)
    scale = random(size, _EDGES, (n_rows + size.lmax + 1) // 2 * size.channels)

    def compute(operation, x: Tensor, scale: Tensor, *weights: Tensor) -> Tensor:
        given = {"lmax": size.lmax, "mmax": size.mmax, "scale": scale, "n_scalars": 0}
        return operation(x, weights, **given)[0]

    return [x, scale, *weights], compute


def layer(size: Size) -> Example:
    """Return all of an edge layer, with as many hidden channels as others."""
    edges, channels = indices(size, _ATOMS, 2, _EDGES), size.channels
    first = _weights(size, 2 * channels, channels, size.lmax * channels)
    second = _weights(size, channels, channels, 0)
    x = random(size, _ATOMS, (size.lmax + 1) ** 2, channels)
    n_scales = 2 * sum(size.lmax + 1 - m for m in range(size.mmax + 1)) * channels
    mapped = [random(size, *shape) for shape in ((_EDGES, 64), (n_scales, 64), (n_scales,))]
    mapped[1] /= 8.0

    def compute(operation, x: Tensor, vectors: Tensor, *others: Tensor) -> Tensor:
        radial, weight, bias, envelope, *maps = others
        given = x, _frame(size, vectors, edges), maps[: len(first)], maps[len(first) :]
        return operation(*given, radial=radial, radial_map=(weight, bias), envelope=envelope)

    return [x, random(size, _EDGES, 3), *mapped, random(size, _EDGES), *first, *second], compute


def _frame(size: Size, vectors: Tensor, edges: Tensor) -> EdgeFrame:
    return build_edge_frame(vectors, edges, n_atoms=_ATOMS, lmax=size.lmax, mmax=size.mmax)


def _weights(size: Size, c_in: int, c_out: int, n_scalars: int) -> list[Tensor]:
    weights = []
    for m in range(size.mmax + 1):
        n = size.lmax - m + 1
        shape = (2, n * c_out, n * c_in) if m else (n_scalars + n * c_out, n * c_in)
        weights.append(random(size, *shape) / (n * c_in) ** 0.5)
    return weights
