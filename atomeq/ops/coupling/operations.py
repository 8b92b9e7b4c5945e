"""The Clebsch-Gordan tensor product and its convolution: gather, couple, sum.

Degrees l1 of x and l2 of y couple to degree l3 by Wigner's 3j symbols, one path (l1, l2, l3) at a
time. The result has e3nn's ``component`` normalisation with ``element`` path weights: if the
inputs and weights have unit variance, so does every component of the output.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from atomeq.ops.coupling import examples, registered
from atomeq.ops.coupling.clebsch_gordan import Form, form_of
from atomeq.ops.coupling.radial import couple_radially
from atomeq.ops.coupling.reference import coupled
from atomeq.ops.dispatch import operation
from atomeq.ops.edge.frame import checked_edges
from atomeq.ops.paths import Output, Path, RadialMap, made_weights
from atomeq.ops.segment.operations import segment_sum
from atomeq.ops.specification import Mode, Size, size_of
from atomeq.typing import EdgeIndex, NodeFeatures

Features = Float[Tensor, "*batch n_sph channels"]


def _verified_product(
    x: Features,
    y: Float[Tensor, "..."],
    weights: Float[Tensor, "..."] | None,
    paths: Sequence[Path],
    *,
    mode: Mode = "uvu",
    output: Output = "sum",
) -> Size:
    batch = tuple(x.shape[:-2])
    return _verified(batch, x, y, weights, form_of(paths, mode, output))


def _product_by_kernels(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    paths: Sequence[Path],
    *,
    mode: Mode = "uvu",
    output: Output = "sum",
    kernels: str,
) -> Tensor:
    x, y, weights = _promoted(x, y, weights)
    batch = x.shape[:-2]
    n_edges = batch.numel()
    # By itself a batch has axes of any number; the form has edges.
    flat_x = x.reshape(n_edges, *x.shape[-2:])
    flat_y = y.reshape(n_edges, *y.shape[len(batch) :])
    if weights is not None and weights.ndim > (4 if mode == "uvw" else 2):
        weights = weights.reshape(n_edges, *weights.shape[len(batch) :])
    form = form_of(paths, mode, output)
    product = registered.couple(flat_x, flat_y, weights, (), n_edges, form, kernels)
    return product.reshape(*batch, *product.shape[1:])


@operation(_verified_product, by_kernels=_product_by_kernels, example=examples.product)
def tensor_product(
    x: Features,
    y: Float[Tensor, "..."],
    weights: Float[Tensor, "..."] | None,
    paths: Sequence[Path],
    *,
    mode: Mode = "uvu",
    output: Output = "sum",
) -> Float[Tensor, "*batch n_out c_out"]:
    """Couple two features.

    ======  ===============  ===========================  ===========================
    mode    y                weights                      output channel
    ======  ===============  ===========================  ===========================
    uvu     (*, n2)          ([*,] n_paths, U)            w_u (x_u . y)
    uuu     (*, n2, U)       ([*,] n_paths, U)            w_u (x_u . y_u)
    uvw     (*, n2, V)       ([*,] n_paths, U, V, W)      sum_uv w_uvw (x_u . y_v)
    ======  ===============  ===========================  ===========================

    Args:
        x: First features, (*, n1, U).
        y: Second features, see above; spherical harmonics of an edge mostly.
        weights: See above; None for weights of 1, except in uvw.
        paths: Which degrees couple, in the order of the weights.
        mode: How channels couple.
        output: ``sum`` adds the paths of equal l3, ``paths`` stacks all paths in their order.

    Returns:
        (*, (l3 max + 1)^2, channels) for ``sum``, (*, sum of 2 l3 + 1, channels) for ``paths``.

    Raises:
        ValueError: If a path breaks the triangle rule or the shapes do not fit together.
    """
    return coupled(x, y, weights, form_of(paths, mode, output))


def _verified_conv(
    x: NodeFeatures,
    y: Float[Tensor, "n_edges ..."],
    weights: Float[Tensor, "..."] | None,
    edge_index: EdgeIndex,
    n_atoms: int,
    paths: Sequence[Path],
    *,
    mode: Mode = "uvu",
    output: Output = "sum",
    radial_map: RadialMap | None = None,
) -> Size:
    if edge_index.shape != (2, y.shape[0]):
        raise ValueError(f"edge_index is {tuple(edge_index.shape)} but y has {y.shape[0]} edges")
    checked_edges(edge_index, x.shape[0], n_atoms)
    given = weights
    if radial_map is not None:  # an expanded view has the shape that the weights would have
        given = _check_radial(y.shape[0], weights, radial_map)
    return _verified((y.shape[0],), x, y, given, form_of(paths, mode, output))


def _conv_by_kernels(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    edge_index: Tensor,
    n_atoms: int,
    paths: Sequence[Path],
    *,
    mode: Mode = "uvu",
    output: Output = "sum",
    radial_map: RadialMap | None = None,
    kernels: str,
) -> Tensor:
    source, target = edge_index.long().unbind()
    form = form_of(paths, mode, output)
    weight, bias = radial_map or (None, None)
    x, y, weights, weight, bias = _promoted(x, y, weights, weight, bias)
    if weight is not None and weights is not None:
        ends, layer = (source, target), (weight, bias)
        return couple_radially(x, y, weights, layer, ends, n_atoms, form, kernels)
    return registered.couple(x, y, weights, (source, target), n_atoms, form, kernels)


@operation(_verified_conv, by_kernels=_conv_by_kernels, example=examples.convolution)
def cg_conv(
    x: NodeFeatures,
    y: Float[Tensor, "n_edges ..."],
    weights: Float[Tensor, "..."] | None,
    edge_index: EdgeIndex,
    n_atoms: int,
    paths: Sequence[Path],
    *,
    mode: Mode = "uvu",
    output: Output = "sum",
    radial_map: RadialMap | None = None,
) -> Float[Tensor, "n_targets n_out c_out"]:
    """Convolve: gather x on the sources, couple it with y by the edge's weights, sum on targets.

    Args:
        x: Features of the atoms, (n_atoms, n1, U).
        y: Features of the edges, (n_edges, n2) or (n_edges, n2, channels).
        weights: As in :func:`tensor_product`, per edge or shared; with ``radial_map`` the values
            that give them, (n_edges, n_radial).
        edge_index: Row 0 is the source, row 1 the target, (2, n_edges); any order.
        n_atoms: Number of atoms.
        paths: Which degrees couple.
        mode: How channels couple.
        output: ``sum`` or ``paths``.
        radial_map: Weight (n_paths, U, n_radial), or (n_paths, U, V, W, n_radial) in uvw, and bias
            (n_paths, ...) of a last linear layer that gives the weights. Where kernels serve, these
            are then made for some edges at a time and never kept.

    Returns:
        As :func:`tensor_product`, (n_atoms, rows, channels). Atoms without edges get zeros.

    Raises:
        ValueError: If a path breaks the triangle rule or the shapes do not fit together.

    Example:
        An EGNN-like coordinate update sums w_ij (r_j - r_i) by the path 0 x 1 -> 1:

        >>> import torch
        >>> ones, y = torch.ones(2, 1, 1), torch.tensor([[1.0, 0.0, 0.0, 2.0]])
        >>> edge, weight = torch.tensor([[1], [0]]), torch.full((1, 1, 1), 0.5)
        >>> cg_conv(ones, y, weight, edge, 2, [Path(0, 1, 1)], output="paths").squeeze(-1)
        tensor([[0., 0., 1.],
                [0., 0., 0.]])
    """
    source, target = edge_index.long().unbind()
    weights = made_weights(weights, radial_map)
    messages = coupled(x.index_select(0, source), y, weights, form_of(paths, mode, output))
    return segment_sum(messages, target, n_atoms)


def _check_radial(n_edges: int, radial: Tensor | None, radial_map: RadialMap) -> Tensor:
    """Refuse a radial layer that does not fit; return a tensor of the shape of its weights."""
    weight, bias = radial_map
    if radial is None or radial.shape != (n_edges, weight.shape[-1]):
        shape = None if radial is None else tuple(radial.shape)
        raise ValueError(
            f"weights are {shape}; radial_map reads ({n_edges}, {weight.shape[-1]}) and makes them"
        )
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise ValueError(f"the bias is {tuple(bias.shape)}, the weight {tuple(weight.shape)}")
    return weight[..., 0].expand(n_edges, *weight.shape[:-1])


def _promoted(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return tensors in one dtype: autocast mixes them, and a kernel would read one as another."""
    given = [tensor for tensor in tensors if tensor is not None]
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in given))
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def _verified(
    batch: tuple[int, ...], x: Tensor, y: Tensor, weights: Tensor | None, form: Form
) -> Size:
    """Refuse what does not fit."""
    paths, mode = form.paths, form.mode
    dtypes = [tensor.dtype for tensor in (x, y, weights) if tensor is not None]
    if len(set(dtypes)) > 1 and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x, y and the weights are {dtypes}; cast them to one dtype")
    n1 = (max(path.l1 for path in paths) + 1) ** 2
    n2 = (max(path.l2 for path in paths) + 1) ** 2
    rows2 = -1 if mode == "uvu" else -2
    if x.shape[-2] < n1 or y.shape[rows2] < n2 or tuple(y.shape[:rows2]) != batch:
        raise ValueError(
            f"x is {tuple(x.shape)} and y {tuple(y.shape)}; mode {mode} with these paths needs at "
            f"least (*, {n1}, channels) and (*, {n2}{'' if mode == 'uvu' else ', channels'})"
        )
    _check_weights(batch, x.shape[-1], y.shape[-1], weights, len(paths), mode)
    highest, n_edges = max(max(path) for path in paths), math.prod(batch)
    weighted = weights is not None
    return size_of(x, n_edges, lmax=highest, channels=x.shape[-1], mode=mode, weighted=weighted)


def _check_weights(
    batch: tuple[int, ...],
    channels1: int,
    channels2: int,
    weights: Tensor | None,
    n_paths: int,
    mode: Mode,
) -> None:
    if mode == "uuu" and channels1 != channels2:
        raise ValueError(f"mode uuu needs equal channels; x has {channels1} and y {channels2}")
    if weights is None:
        if mode == "uvw":
            raise ValueError("mode uvw needs weights")
        return
    shape = tuple(weights.shape)
    expected = (n_paths, channels1)
    if mode == "uvw":
        expected, shape = (*expected, channels2), shape[:-1]
    # Lengths first: tuples are compared number by number, which would bind a trace to its sizes.
    if shape != (expected if len(shape) == len(expected) else (*batch, *expected)):
        more = ", W" if mode == "uvw" else ""
        raise ValueError(
            f"weights are {tuple(weights.shape)}; mode {mode} with {n_paths} paths needs "
            f"([*,] {', '.join(map(str, expected))}{more})"
        )
