"""Every operation of atomeq.ops as a function of its inputs, for tests of them all."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from edge_layers import POLES
from torch import Tensor

from atomeq.ops.atoms.operations import gated_update, rms_norm
from atomeq.ops.clifford.operations import geometric_product
from atomeq.ops.coupling.operations import cg_conv, tensor_product
from atomeq.ops.coupling.symmetric_contraction import symmetric_contraction
from atomeq.ops.dispatch import use_backend
from atomeq.ops.edge.frame import EdgeFrame
from atomeq.ops.edge.operations import escn_conv, rotate_from_edge, rotate_to_edge, so2_linear
from atomeq.ops.edge.wigner import build_edge_frame
from atomeq.ops.harmonics.operations import spherical_harmonics
from atomeq.ops.pairs.operations import pair_functions
from atomeq.ops.paths import Path
from atomeq.ops.segment.operations import segment_mean, segment_softmax, segment_sum
from atomeq.ops.sphere.gaunt import gaunt_product
from atomeq.ops.sphere.grid import SphereGrid
from atomeq.ops.sphere.operations import sphere_pointwise, sphere_silu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

C = 16
EDGES = torch.tensor([[0, 1, 2, 1, 0], [2, 0, 0, 2, 2]], device=DEVICE)  # of 4 atoms, 2 have none
INDEX = EDGES[1]
PATHS = [Path(0, 1, 1), Path(1, 0, 1), Path(1, 1, 0), Path(1, 1, 1)]
SPECIES = torch.tensor([1, 0, 1], device=DEVICE)
GRID = SphereGrid(1, 1, order="m")


class Operation(NamedTuple):
    """A function of tensors and their shapes; ``vectors`` are the edges whose poles are tried."""

    compute: Callable[..., Tensor]
    shapes: Sequence[tuple[int, ...]]
    vectors: int | None = None


def frame_of(vectors: Tensor) -> EdgeFrame:
    return build_edge_frame(vectors, EDGES, n_atoms=4, lmax=1, mmax=1)


def rotate_both(x: Tensor, vectors: Tensor) -> Tensor:
    return rotate_to_edge(x, frame_of(vectors), side="both")


def rotate_back_and_sum(y: Tensor, vectors: Tensor, envelope: Tensor) -> Tensor:
    return rotate_from_edge(y, frame_of(vectors), envelope=envelope)


def rotate_back(y: Tensor, vectors: Tensor) -> Tensor:
    return rotate_from_edge(y, frame_of(vectors), reduce="none")


def mix(x: Tensor, zero: Tensor, one: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return so2_linear(x, [zero, one], lmax=1, mmax=1, bias=bias, scale=scale)


def edge_layer(x: Tensor, vectors: Tensor, radial: Tensor, *weights: Tensor) -> Tensor:
    return escn_conv(x, frame_of(vectors), weights[:2], weights[2:], radial=radial)


def functions_of_pairs(vectors: Tensor) -> Tensor:
    polynomials = fixed(2, 2, 3, 6, 7, like=vectors)
    kinds = torch.tensor([0, 1, 1, 0], device=DEVICE)
    parts = pair_functions(vectors, EDGES, kinds, polynomials, step=0.5, widths=[4, 3])
    return torch.cat(parts, dim=1)


def normalise(x: Tensor) -> Tensor:
    return rms_norm(x, fixed(2, C, like=x), fixed(C, like=x))


def update(x: Tensor, first: Tensor, gates: Tensor, bias: Tensor, second: Tensor) -> Tensor:
    return gated_update(x, (first, bias), (gates, bias), (second, None))


def update_by_fixed(x: Tensor) -> Tensor:
    shapes = [(2, 5, C), (5, C), (5,), (2, C, 5)]
    return update(x, *(fixed(*shape, like=x) for shape in shapes))


def convolve(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return cg_conv(x, y, weights, EDGES, 4, PATHS, output="paths")


def convolve_radially(x: Tensor, y: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return cg_conv(x, y, h, EDGES, 4, PATHS, output="paths", radial_map=(weight, bias))


def couple(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return tensor_product(x, y, weights, PATHS)


def contract(x: Tensor, weights: Tensor) -> Tensor:
    return symmetric_contraction(x, weights, SPECIES, degrees=(0, 1), order=2)


OPERATIONS: dict[str, Operation] = {
    "rotate_to_edge": Operation(rotate_both, [(4, 4, C), (5, 3)], 1),
    "rotate_from_edge": Operation(rotate_back_and_sum, [(5, 4, C), (5, 3), (5,)], 1),
    "rotate_from_edge per edge": Operation(rotate_back, [(5, 4, C), (5, 3)], 1),
    "so2_linear": Operation(mix, [(5, 4, C), (2 * C, 2 * C), (2, C, C), (2 * C,), (5, 3 * C)]),
    "escn_conv": Operation(
        edge_layer,
        [
            *((4, 4, C), (5, 3), (5, 6 * C)),
            *((3 * C, 4 * C), (2, C, 2 * C), (2 * C, 2 * C), (C, C)),
        ],
        1,
    ),
    "cg_conv": Operation(convolve, [(4, 4, C), (5, 4), (5, 4, C)]),
    "cg_conv of shared weights": Operation(convolve, [(4, 4, C), (5, 4), (4, C)]),
    "cg_conv of a radial layer": Operation(
        convolve_radially, [(4, 4, C), (5, 4), (5, 3), (4, C, 3), (4, C)]
    ),
    "tensor_product": Operation(couple, [(5, 4, C), (5, 4), (5, 4, C)]),
    "geometric_product": Operation(geometric_product, [(5, 8, C), (5, 8, C), (20, C)]),
    "symmetric_contraction": Operation(contract, [(3, 4, C), (2, 5, C)]),
    "spherical_harmonics": Operation(lambda v: spherical_harmonics(v, 3), [(5, 3)], 0),
    "pair_functions": Operation(functions_of_pairs, [(5, 3)]),
    "rms_norm": Operation(lambda x, w, b: rms_norm(x, w[0], b), [(3, 4, C), (1, 2, C), (C,)]),
    "rms_norm of fixed weights": Operation(normalise, [(3, 4, C)]),
    "gated_update": Operation(update, [(3, 4, C), (2, 5, C), (5, C), (5,), (2, C, 5)]),
    "gated_update of fixed weights": Operation(update_by_fixed, [(3, 4, C)]),
    "segment_sum": Operation(lambda x: segment_sum(x, INDEX, 4), [(5, 3)]),
    "segment_mean": Operation(lambda x: segment_mean(x, INDEX, 4), [(5, 2, 3)]),
    "segment_softmax": Operation(lambda x: segment_softmax(x, INDEX, 4), [(5, 3)]),
    "sphere_pointwise": Operation(lambda x: sphere_pointwise(x, torch.tanh, GRID), [(3, 4, C)]),
    "sphere_silu": Operation(lambda x: sphere_silu(x, GRID), [(3, 4, C)]),
    "sphere_product": Operation(lambda x, y: gaunt_product(x, y, 1), [(2, 4, C), (2, 1, C)]),
}


def fixed(*shape: int, like: Tensor) -> Tensor:
    """Return a weight that is not trained."""
    numbers = torch.arange(math.prod(shape), dtype=torch.float64).sin()
    return numbers.view(shape).to(like)


def leaves_of(operation: Operation, dtype: torch.dtype) -> list[Tensor]:
    """Return random inputs, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    leaves = []
    for place, shape in enumerate(operation.shapes):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if place == operation.vectors:
            values[: len(POLES)] = torch.tensor(POLES, dtype=torch.float64)
        leaves.append(values.to(DEVICE, dtype).requires_grad_())
    return leaves


def step(compute: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return the value, its gradients, and the gradients of a loss on them: force training."""
    out = compute(*leaves)
    first = torch.autograd.grad((out.square() + out.sin()).sum(), leaves, create_graph=True)
    loss = torch.stack([(g.square() + g.sin()).sum() for g in first]).sum()
    second = torch.autograd.grad(loss, leaves)
    return [tensor.detach() for tensor in (out, *first, *second)]


def derivatives(backend: str, operation: Operation, dtype: torch.dtype) -> list[Tensor]:
    """Return :func:`step` of an operation served by one backend."""
    with use_backend(backend):
        return step(operation.compute, leaves_of(operation, dtype))
