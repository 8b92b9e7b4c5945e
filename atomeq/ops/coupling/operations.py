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

from atomeq.ops.coupling import registered
from atomeq.ops.coupling.clebsch_gordan import Coupling, Form, coupling_table, couplings, form_of
from atomeq.ops.coupling.radial import couple_radially
from atomeq.ops.dispatch import operation, size_of
from atomeq.ops.edge.frame import checked_edges
from atomeq.ops.paths import Output, Path, RadialMap, made_weights, tensor_product_paths
from atomeq.ops.segment.operations import segment_sum
from atomeq.ops.self_check import Example, indices, random
from atomeq.ops.specification import Mode, Size
from atomeq.ops.tables import table_like
from atomeq.typing import EdgeIndex, NodeFeatures

Features = Float[Tensor, "*batch n_sph channels"]


def _verified_product(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    paths: Sequence[Path],
    mode: Mode,
    output: Output,
) -> Size:
    return _verified(tuple(x.shape[:-2]), x, y, weights, form_of(paths, mode, output))


def _product_by_kernels(
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    paths: Sequence[Path],
    mode: Mode,
    output: Output,
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


def _example_product(size: Size) -> Example:
    """Return features of edges, with weights of their own."""
    paths = tensor_product_paths(size.lmax, size.lmax, size.lmax)
    n_sph, channels = (size.lmax + 1) ** 2, size.channels
    x, y = random(size, 24, n_sph, channels), random(size, 24, n_sph)
    weights = random(size, 24, len(paths), channels)
    if not size.weighted:
        return [x, y], lambda operation, x, y: operation(x, y, None, paths)
    return [x, y, weights], lambda operation, x, y, w: operation(x, y, w, paths)


@operation(_verified_product, by_kernels=_product_by_kernels, example=_example_product)
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
    x: Tensor,
    y: Tensor,
    weights: Tensor | None,
    edge_index: Tensor,
    n_atoms: int,
    paths: Sequence[Path],
    mode: Mode,
    output: Output,
    radial_map: RadialMap | None,
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
    mode: Mode,
    output: Output,
    radial_map: RadialMap | None,
    kernels: str,
) -> Tensor:
    source, target = edge_index.long().unbind()
    ends, form = (source, target), form_of(paths, mode, output)
    weight, bias = radial_map or (None, None)
    x, y, weights, weight, bias = _promoted(x, y, weights, weight, bias)
    if weight is not None and weights is not None:
        return couple_radially(x, y, weights, (weight, bias), ends, n_atoms, form, kernels)
    return registered.couple(x, y, weights, ends, n_atoms, form, kernels)


def _example_conv(size: Size) -> Example:
    """Return features of atoms, one of which has no edge, and edges with weights of their own."""
    paths = tensor_product_paths(size.lmax, size.lmax, size.lmax)
    n_sph, channels = (size.lmax + 1) ** 2, size.channels
    edges = indices(size, 5, 2, 24)
    x, y = random(size, 5, n_sph, channels), random(size, 24, n_sph)
    weights = random(size, 24, len(paths), channels)
    if not size.weighted:
        return [x, y], lambda operation, x, y: operation(x, y, None, edges, 5, paths)
    return [x, y, weights], lambda operation, x, y, w: operation(x, y, w, edges, 5, paths)


@operation(_verified_conv, by_kernels=_conv_by_kernels, example=_example_conv)
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


def coupled(x: Tensor, y: Tensor, weights: Tensor | None, form: Form) -> Tensor:
    """Couple groups of paths by one matrix each, weight them and sum those of equal l3.

    Args:
        x: (*, n1, U).
        y: (*, n2), or (*, n2, channels).
        weights: ([*,] n_paths, ...); None for weights of 1.
        form: What is coupled.

    Returns:
        (*, rows, channels).
    """
    paths, mode = form.paths, form.mode
    n_terms = form.n_terms(x.shape[-1], y.shape[-1])
    products: dict[int, Tensor] = {}
    for coupling in couplings(paths, mode):
        table = table_like(coupling_table, form, coupling, n_terms, like=x)
        rows = _coupled(x, y, table, coupling, mode)  # (*, rows of these paths, channels)
        sizes = [2 * paths[number].l3 + 1 for number in coupling.numbers]
        for number, part in zip(coupling.numbers, rows.split(sizes, dim=-2), strict=True):
            products[number] = _weighted(part, weights, number, mode)
    ordered = [products[number] for number in range(len(paths))]
    return torch.cat(ordered, dim=-2) if form.stacked else _summed(ordered, paths)


def _coupled(x: Tensor, y: Tensor, table: Tensor, coupling: Coupling, mode: Mode) -> Tensor:
    """Contract a group of paths with its table, (rows of y, rows of output, 2 l1 + 1)."""
    first, last = coupling.rows2
    left = x[..., coupling.l1**2 : (coupling.l1 + 1) ** 2, :]
    if mode == "uvu":
        return (y[..., first:last] @ table.flatten(1)).unflatten(-1, table.shape[1:]) @ left
    right = y[..., first:last, :]
    if mode == "uuu":
        outer = right.unsqueeze(-2) * left.unsqueeze(-3)  # (*, d2, d1, channels)
    else:
        outer = (right[..., :, None, None, :] * left[..., None, :, :, None]).flatten(-2)
    return table.transpose(0, 1).flatten(1) @ outer.flatten(-3, -2)  # (*, rows, channels)


def _weighted(part: Tensor, weights: Tensor | None, number: int, mode: Mode) -> Tensor:
    if weights is None:
        return part
    if mode == "uvw":
        return part @ weights[..., number, :, :, :].flatten(-3, -2)
    return part * weights[..., number, None, :]


def _summed(products: list[Tensor], paths: tuple[Path, ...]) -> Tensor:
    """Sum the paths of equal l3; a degree that no path reaches is zero."""
    totals: dict[int, Tensor] = {}
    for product, path in zip(products, paths, strict=True):
        totals[path.l3] = totals[path.l3] + product if path.l3 in totals else product
    *batch, _, channels = products[0].shape
    for l in range(max(totals)):
        if l not in totals:
            totals[l] = products[0].new_zeros(*batch, 2 * l + 1, channels)
    return torch.cat([totals[l] for l in range(len(totals))], dim=-2)
