"""Adapter of OpenEquivariance: its fused CUDA convolution of gather, uvu product and sum.

It takes our layout as it is (ir_mul) and its weights in our order; kernels for three orders of
derivatives come with it. It has no CPU path, so whatever is not on a GPU is refused.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from atomeq.ops.coupling.clebsch_gordan import form_of
from atomeq.ops.coupling.irreps import highest_degree, product_problem
from atomeq.ops.paths import Output, Path, RadialMap, made_weights
from atomeq.ops.specification import Mode, OpSpec

OPENEQUIVARIANCE = "openequivariance"  # by a string: type checkers take the name for this file
DTYPES: dict[torch.dtype, type[np.floating]] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
}


def refusal(spec: OpSpec) -> str | None:
    """Return None for weighted uvu convolutions in float32 and float64 on CUDA."""
    if find_spec("openequivariance") is None:
        return "openequivariance is not installed: pip install atomeq[openequivariance]"
    if spec.op != "cg_conv":
        return "OpenEquivariance has no such operation, or not in this layout"
    if spec.device.type != "cuda":
        return f"it runs on cuda, the call is on {spec.device}"
    if spec.dtype not in DTYPES:
        return f"its kernels are float32 and float64, the call is {spec.dtype}"
    if spec.mode != "uvu":
        return f"its kernels for this layout have mode uvu, the call has {spec.mode}"
    if not spec.weighted:
        return "its paths must have weights"
    return _condition_refusal(spec)


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
    """Gather, couple and sum in one kernel, with atomic additions."""
    form = form_of(paths, mode, output)
    weights = made_weights(weights, radial_map)
    assert weights is not None, "refused before"
    sources, flat_y, flat_weights, n_padded = convolution_arguments(x, y, weights, n_atoms)
    degrees = (highest_degree(x.shape[1]), highest_degree(y.shape[1]))
    with torch.cuda.device_of(x):  # its workspace is made on the current device
        convolution = _convolution(form.paths, degrees, x.shape[2], form.stacked, x.dtype, x.device)
    # rows are where the sum goes, columns where it comes from
    out = convolution(sources, flat_y, flat_weights, edge_index[1], edge_index[0])
    assert out.shape[0] == n_padded
    return out[:n_atoms].unflatten(1, (-1, x.shape[2]))


def convolution_arguments(
    x: Tensor, y: Tensor, weights: Tensor, n_atoms: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return features, harmonics and weights as matrices, and how many atoms they stand for.

    Its graphs have as many targets as sources, so atoms without features get zeros. Weights that
    all edges share are repeated for each.

    Args:
        x: Features, (n_sources, n1, channels).
        y: Harmonics, (n_edges, n2).
        weights: (n_edges, n_paths, channels) or (n_paths, channels).
        n_atoms: Number of targets.
    """
    n_padded = max(n_atoms, x.shape[0])
    rows1 = (highest_degree(x.shape[1]) + 1) ** 2
    rows2 = (highest_degree(y.shape[1]) + 1) ** 2
    features = x[:, :rows1].flatten(1)
    if n_padded > x.shape[0]:
        features = torch.nn.functional.pad(features, (0, 0, 0, n_padded - x.shape[0]))
    per_edge = weights.expand(y.shape[0], *weights.shape[-2:]).flatten(1)
    return features.contiguous(), y[:, :rows2].contiguous(), per_edge.contiguous(), n_padded


def _condition_refusal(spec: OpSpec) -> str | None:
    if spec.n_edges == 0:
        return "there is nothing to launch a kernel for"
    if torch.are_deterministic_algorithms_enabled():
        return "this adapter lets it sum in any order, and torch is asked for repeatable sums"
    openequivariance = import_module(OPENEQUIVARIANCE)
    if not openequivariance.BUILT_EXTENSION:
        return f"its extension was not built: {openequivariance.BUILT_EXTENSION_ERROR}"
    return None


@lru_cache(maxsize=64)
def _convolution(
    paths: tuple[Path, ...],
    degrees: tuple[int, int],
    channels: int,
    stacked: bool,
    dtype: torch.dtype,
    device: torch.device,  # part of the key: the workspace lives there
) -> Callable[..., Tensor]:
    openequivariance = import_module(OPENEQUIVARIANCE)
    problem = product_problem(
        paths, degrees, (channels, 1, channels), "uvu", stacked=stacked, weighted=True
    )
    described = openequivariance.TPProblem(
        problem.irreps1,
        problem.irreps2,
        problem.irreps_out,
        problem.instructions,
        shared_weights=False,
        internal_weights=False,
        irrep_dtype=DTYPES[dtype],
        weight_dtype=DTYPES[dtype],
        layout="ir_mul",
    )
    return openequivariance.TensorProductConv(described, deterministic=False)
