"""Adapter of NVIDIA's cuEquivariance: its CUDA kernels for what one channel index can express.

Its segmented polynomials take our layout (it calls it ir_mul) and our own coupling coefficients, so
neither its irreps nor its normalisation enter. Where the tensors are on a CPU it serves too, by its
``naive`` method: correct, differentiable and slow, to test this adapter by.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from atomeq.ops.coupling.clebsch_gordan import Form, clebsch_gordan, form_of
from atomeq.ops.coupling.irreps import highest_degree, output_channels, output_degrees
from atomeq.ops.harmonics.polynomials import Normalization, directions
from atomeq.ops.paths import Output, Path, RadialMap, made_weights
from atomeq.ops.specification import Mode, OpSpec
from atomeq.ops.tables import constant_table, table_like

Polynomial = Any  # cuequivariance.SegmentedPolynomial
Module = Callable[..., list[Tensor]]  # cuequivariance_torch.SegmentedPolynomial
CUEQUIVARIANCE = "cuequivariance"  # by a string: type checkers take the name for this very file
SERVED = ("spherical_harmonics", "tensor_product", "cg_conv")
DTYPES = (torch.float32, torch.float64)
HIGHEST_HARMONIC = 5
# Axes of weights, x, y and output by mode: i, j, k are orders m, u, v, w channels.
SUBSCRIPTS: dict[Mode, str] = {
    "uvu": "u,iu,j,ku+ijk",
    "uuu": "u,iu,ju,ku+ijk",
    "uvw": "uvw,iu,jv,kw+ijk",
}


def refusal(spec: OpSpec) -> str | None:
    """Return None for float32 and float64 harmonics and products that its kernels serve."""
    if find_spec("cuequivariance_torch") is None:
        return "cuequivariance-torch is not installed: pip install atomeq[cuequivariance]"
    if spec.op not in SERVED:
        return "cuEquivariance has no such operation"
    if spec.dtype not in DTYPES:
        return f"this adapter serves float32 and float64, the call is {spec.dtype}"
    if spec.op == "spherical_harmonics" and spec.lmax > HIGHEST_HARMONIC:
        return f"building its polynomials takes minutes from degree {HIGHEST_HARMONIC + 1} on"
    if spec.n_edges == 0:
        return "there is nothing to launch a kernel for"
    if spec.device.type == "cpu":
        return None
    return _cuda_refusal(spec)


def spherical_harmonics(
    vectors: Tensor,
    lmax: int,
    normalize: bool,
    normalization: Normalization,
) -> Tensor:
    """Evaluate the harmonics, one homogeneous polynomial for all degrees."""
    polynomial = _harmonics(lmax, vectors.device)
    points = directions(vectors)[0] if normalize else vectors
    (flat,) = polynomial([points.reshape(-1, 3)])
    scale = table_like(_scales, lmax, normalization, like=vectors)
    return (flat * scale).reshape(*vectors.shape[:-1], flat.shape[1])


def tensor_product(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    paths: Sequence[Path],
    mode: Mode,
    output: Output,
) -> Tensor:
    """Couple two features item by item."""
    form = form_of(paths, mode, output)
    batch = x.shape[:-2]
    polynomial = _coupling(x, y, weights, form)
    inputs = [x.reshape(-1, x.shape[-2:].numel()), _flat(y, len(batch))]
    (flat,) = polynomial([_weights(x, weights, form), *inputs])
    return flat.unflatten(-1, (-1, output_channels(x, weights, mode))).unflatten(0, batch)


def cg_conv(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    edge_index: Tensor,
    n_atoms: int,
    paths: Sequence[Path],
    mode: Mode,
    output: Output,
    radial_map: RadialMap | None,
) -> Tensor:
    """Gather, couple and sum in one kernel."""
    form = form_of(paths, mode, output)
    weights = made_weights(weights, radial_map)
    polynomial = _coupling(x, y, weights, form)
    (flat,) = polynomial(
        [_weights(x, weights, form), x.flatten(1), _flat(y, 1)],
        input_indices={1: edge_index[0]},
        output_indices={0: edge_index[1]},
        output_shapes={0: x.new_empty(n_atoms, 1)},  # it reads the length and nothing else
    )
    return flat.unflatten(-1, (-1, output_channels(x, weights, mode)))


def _cuda_refusal(spec: OpSpec) -> str | None:
    if spec.device.type != "cuda":
        return f"it runs on cuda, and for tests on cpu; the call is on {spec.device}"
    if find_spec("cuequivariance_ops_torch") is None:
        return (
            "its CUDA kernels are not installed: pip install cuequivariance-ops-torch-cu12 or -cu13"
        )
    if spec.mode == "uvw":
        return "mode uvw has three channel indices, its uniform_1d kernel serves one"
    if torch.are_deterministic_algorithms_enabled():
        return "its sums over edges are not known to be repeatable, and torch is asked for that"
    return None


def _method(device: torch.device) -> str:
    return "uniform_1d" if device.type == "cuda" else "naive"


def _flat(y: Tensor, batch_axes: int) -> Tensor:
    """Join all but the batch axes, and those into one."""
    return y.flatten(batch_axes).reshape(-1, y.shape[batch_axes:].numel())


def _weights(x: Tensor, weights: Tensor | None, form: Form) -> Tensor:
    """Return weights (n_items, n_paths * channels...), or one row where all items share them."""
    if weights is None:
        return x.new_ones(1, len(form.paths) * x.shape[-1])
    return weights.reshape(-1, weights.shape[-4 if form.mode == "uvw" else -2 :].numel())


def _coupling(x: Tensor, y: Tensor, weights: Tensor | None, form: Form) -> Module:
    mode = form.mode
    degrees = (highest_degree(x.shape[-2]), highest_degree(y.shape[-1 if mode == "uvu" else -2]))
    channels2 = 1 if mode == "uvu" else y.shape[-1]
    channels = (x.shape[-1], channels2, output_channels(x, weights, mode))
    return _module(form, degrees, channels, x.device)


@lru_cache(maxsize=64)
def _module(
    form: Form, degrees: tuple[int, int], channels: tuple[int, int, int], device: torch.device
) -> Module:
    import cuequivariance_torch

    polynomial = product_polynomial(form.paths, degrees, channels, form.mode, stacked=form.stacked)
    return cuequivariance_torch.SegmentedPolynomial(polynomial, method=_method(device)).to(device)


def product_polynomial(
    paths: tuple[Path, ...],
    degrees: tuple[int, int],
    channels: tuple[int, int, int],
    mode: Mode,
    *,
    stacked: bool,
) -> Polynomial:
    """Return a product as a polynomial of weights, x and y, with our layout and coefficients.

    Args:
        paths: Which degrees couple, in the order of the weights.
        degrees: Highest degree of x and of y.
        channels: Of x, of y (1 in mode uvu) and of the output.
        mode: How channels couple.
        stacked: Each path has an output of its own; else paths of equal l3 share one.
    """
    cuequivariance = import_module(CUEQUIVARIANCE)
    product = cuequivariance.SegmentedTensorProduct.from_subscripts(SUBSCRIPTS[mode])
    u, v, w = channels
    for _ in paths:
        product.add_segment(0, channels if mode == "uvw" else (u,))
    for l in range(degrees[0] + 1):
        product.add_segment(1, (2 * l + 1, u))
    for l in range(degrees[1] + 1):
        product.add_segment(2, (2 * l + 1,) if mode == "uvu" else (2 * l + 1, v))
    for l in output_degrees(paths, stacked=stacked):
        product.add_segment(3, (2 * l + 1, w))
    n_terms = u * v if mode == "uvw" else 1
    for number, path in enumerate(paths):
        slot = number if stacked else path.l3
        n_summed = 1 if stacked else sum(other.l3 == path.l3 for other in paths)
        norm = math.sqrt((2 * path.l3 + 1) / (n_summed * n_terms))
        coefficients = clebsch_gordan(*path) * norm
        product.add_path(number, path.l1, path.l2, slot, c=coefficients.numpy())
    return cuequivariance.SegmentedPolynomial.eval_last_operand(product)


@lru_cache(maxsize=16)
def _harmonics(lmax: int, device: torch.device) -> Module:
    import cuequivariance_torch

    cuequivariance = import_module(CUEQUIVARIANCE)

    described = cuequivariance.descriptors.spherical_harmonics(
        cuequivariance.SO3(1), list(range(lmax + 1))
    )
    return cuequivariance_torch.SegmentedPolynomial(
        described.polynomial, method=_method(device)
    ).to(device)


@constant_table
def _scales(lmax: int, normalization: Normalization) -> Tensor:
    """Return the factor of each column, from cuEquivariance's 'component' harmonics."""
    sizes = 2 * torch.arange(lmax + 1, dtype=torch.float64, device="cpu") + 1
    factors = {
        "component": torch.ones_like(sizes),
        "norm": sizes.rsqrt(),
        "integral": torch.full_like(sizes, 1 / math.sqrt(4 * math.pi)),
    }
    return factors[normalization].repeat_interleave(sizes.long())
