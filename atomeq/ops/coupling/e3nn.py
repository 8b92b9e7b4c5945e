"""Adapter of e3nn: the oracle of the tests and the yardstick of the benchmarks, on any device.

It computes what e3nn computes, with its layout converted at each call: slower than the reference,
and served only when asked for by name.
"""

from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module

import torch
from torch import Tensor

from atomeq.ops.coupling.clebsch_gordan import Form, clebsch_gordan, form_of
from atomeq.ops.coupling.irreps import (
    from_mul_ir,
    highest_degree,
    output_channels,
    output_degrees,
    product_problem,
    to_mul_ir,
)
from atomeq.ops.harmonics.polynomials import Normalization, directions
from atomeq.ops.paths import Output, Path, RadialMap, made_weights
from atomeq.ops.specification import Mode, OpSpec

E3NN = "e3nn.o3"  # by a string: type checkers take the plain name for this very file
SERVED = ("spherical_harmonics", "tensor_product", "cg_conv")
HIGHEST_DEGREE = 11  # of e3nn's harmonics and of its tables of 3j symbols


def refusal(spec: OpSpec) -> str | None:
    """Return None for harmonics and Clebsch-Gordan products up to degree 11."""
    if spec.op == "edge_wigner":
        return "its Wigner matrices go through Euler angles, inaccurate for edges beside ±y"
    if spec.op not in SERVED:
        return "e3nn has no such operation"
    if spec.lmax > HIGHEST_DEGREE:
        return f"e3nn ends at degree {HIGHEST_DEGREE}, this call has lmax={spec.lmax}"
    return None


def spherical_harmonics(
    vectors: Tensor,
    lmax: int,
    normalize: bool,
    normalization: Normalization,
) -> Tensor:
    """Evaluate the harmonics by e3nn's generated polynomials, of our own directions."""
    # Imported here because it takes seconds and most models do not need it.
    o3 = import_module(E3NN)
    degrees = list(range(lmax + 1))
    points = directions(vectors)[0] if normalize else vectors
    return o3.spherical_harmonics(degrees, points, normalize=False, normalization=normalization)


def tensor_product(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    paths: Sequence[Path],
    mode: Mode,
    output: Output,
) -> Tensor:
    """Couple two features by ``o3.TensorProduct``."""
    form = form_of(paths, mode, output)
    y = y.unsqueeze(-1) if mode == "uvu" else y
    channels = (x.shape[-1], y.shape[-1], output_channels(x, weights, mode))
    weight_axes = 4 if mode == "uvw" else 2
    product = _product(
        form,
        (highest_degree(x.shape[-2]), highest_degree(y.shape[-2])),
        channels,
        weights is not None,
        weights is None or weights.ndim == weight_axes,
        x.dtype,
        x.device,
    )
    flat = None if weights is None else weights.flatten(-weight_axes)
    out = product(to_mul_ir(x), to_mul_ir(y), flat)
    return from_mul_ir(out, output_degrees(form.paths, stacked=form.stacked), channels[2])


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
    """Gather, couple, sum: three steps, as models built on e3nn write it."""
    weights = made_weights(weights, radial_map)
    gathered = x.index_select(0, edge_index[0])
    messages = tensor_product(gathered, y, weights, paths, mode=mode, output=output)
    totals = messages.new_zeros(n_atoms, *messages.shape[1:])
    return totals.index_add(0, edge_index[1], messages)


@lru_cache(maxsize=64)
def _product(
    form: Form,
    degrees: tuple[int, int],
    channels: tuple[int, int, int],
    weighted: bool,
    shared: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.nn.Module:
    problem = product_problem(
        form.paths, degrees, channels, form.mode, stacked=form.stacked, weighted=weighted
    )
    product = (
        import_module(E3NN)
        .TensorProduct(
            problem.irreps1,
            problem.irreps2,
            problem.irreps_out,
            problem.instructions,
            irrep_normalization="component",
            path_normalization="element",
            shared_weights=shared,
            internal_weights=False,
        )
        .to(device=device, dtype=dtype)
    )
    # e3nn makes its 3j symbols in torch's default dtype: in float64 they would be good to 1e-7.
    for name, symbols in product.named_buffers():
        *_, symbol = name.split("_w3j_")
        if symbol != name:
            symbols.copy_(clebsch_gordan(*map(int, symbol.split("_"))))
    return product
