"""The operations on edges by kernels: what is registered with torch, under our own names."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from atomeq.ops.edge import escn_conv as layer
from atomeq.ops.edge import rotation, so2_map
from atomeq.ops.edge.frame import EdgeFrame, Side
from atomeq.ops.edge.kernel_sets import wants_segments
from atomeq.ops.edge.row_scale import scale_by_row
from atomeq.ops.edge.so2_shape import so2_shape


def rotate_to_edge(x: Tensor, frame: EdgeFrame, *, side: Side = "source", kernels: str) -> Tensor:
    """Gather, join the channels, rotate into the edge frames."""
    indices = frame.ends(side)
    return rotation.gather_rotate(
        *(x, frame.vectors, frame.wigner, None, list(indices)),
        *(_segments(frame, indices, kernels), frame.lmax, frame.mmax, kernels),
    )


def rotate_from_edge(
    y: Tensor,
    frame: EdgeFrame,
    *,
    envelope: Tensor | None = None,
    reduce: Literal["sum", "none"] = "sum",
    kernels: str,
) -> Tensor:
    """Rotate back to the lab frame and sum on the targets."""
    indices = (frame.target,) if reduce == "sum" else ()
    segments = _segments(frame, indices, kernels)
    return rotation.rotate_scatter(
        *(y, frame.vectors, frame.wigner, envelope, None, list(indices)),
        *(segments, frame.n_atoms, frame.lmax, frame.mmax, kernels),
    )


def so2_linear_with_scalars(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    lmax: int,
    mmax: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    n_scalars: int | None = None,
    kernels: str,
) -> tuple[Tensor, Tensor]:
    """Mix degrees and channels within each order."""
    shape = so2_shape(x, weights, lmax, mmax, n_scalars)
    if scale is not None:
        x = scale_by_row(x, scale, shape, kernels)
    return so2_map.so2_map(x, _views(weights), shape, bias, kernels)


def escn_conv(
    x: Tensor,
    frame: EdgeFrame,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    *,
    radial: Tensor | None = None,
    radial_map: tuple[Tensor, Tensor | None] | None = None,
    envelope: Tensor | None = None,
    recompute: bool = False,
    kernels: str,
) -> Tensor:
    """Return the whole edge layer as one operation."""
    weight, bias = radial_map if radial_map is not None else (None, None)
    inputs = (x, frame.vectors, radial, weight, bias, envelope, *first, *second)
    needs = any(tensor is not None and tensor.requires_grad for tensor in inputs)
    keep = needs and torch.is_grad_enabled() and not recompute
    given = {"x": x, "vectors": frame.vectors, "radial": radial, "envelope": envelope}
    for name, leaf in (("radial_weight", weight), ("radial_bias", bias)):
        given[name] = None if leaf is None else _views([leaf])[0]
    segments = _segments(frame, (frame.source, frame.target), kernels)
    edges = [frame.wigner, frame.source, frame.target, *segments]
    present, layout = layer.layer_arguments(given, frame.lmax, frame.mmax)
    weights = _views([*first, *second])
    total, *_ = layer.escn_conv(present, weights, edges, layout, keep, kernels)
    return total


def _segments(frame: EdgeFrame, indices: tuple[Tensor, ...], kernels: str) -> list[Tensor]:
    if not wants_segments(kernels):
        return []
    return [part for index in indices for part in frame.segments(index)]


def _views(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return views of the weights: of a leaf torch cannot tell whether its gradient is wanted."""
    return [weight.view_as(weight) if weight.requires_grad else weight for weight in weights]
