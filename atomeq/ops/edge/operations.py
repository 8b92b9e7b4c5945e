"""The SO(2) form of an equivariant convolution (eSCN): rotate to the edge, mix, rotate back.

In the frame where an edge points to +y the only symmetry left is the rotation about y, under which
coefficients (l, +m) and (l, -m) turn into each other like the real and imaginary part of a complex
number, whatever l is. A linear map that respects it mixes degrees and channels freely within one
order m: O(lmax^3) work instead of the O(lmax^6) of the full tensor product (Passaro and Zitnick,
2023, arXiv:2302.03655).
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from atomeq.ops.dispatch import operation, size_of
from atomeq.ops.edge import escn_conv as layer
from atomeq.ops.edge import examples, reference, rotation, so2_map
from atomeq.ops.edge.frame import EdgeFrame, Side
from atomeq.ops.edge.so2_map import so2_shape
from atomeq.ops.orders import check_orders, m_primary_order
from atomeq.ops.specification import Size
from atomeq.typing import NodeFeatures

RowFeatures = Float[Tensor, "n_edges n_rows channels"]  # m-primary rows


def _verified_in(x: Tensor, frame: EdgeFrame, side: str) -> Size:
    _check_features(x, frame, (frame.n_atoms, (frame.lmax + 1) ** 2), "atoms")
    if side not in get_args(Side):
        raise ValueError(f"side {side!r} is unknown; choose source, target or both")
    return _size(x, frame)


@operation(_verified_in, by_kernels=rotation.to_edge, example=examples.into_frame)
def rotate_to_edge(
    x: NodeFeatures, frame: EdgeFrame, *, side: Side = "source"
) -> Float[Tensor, "n_edges n_rows c_out"]:
    """Gather the features of an atom of each edge and rotate them into the edge's frame.

    Differentiable any number of times in ``x`` and ``frame.vectors``; the latter through the
    torque identity, exact for anything equivariant about the edge that follows.

    Args:
        x: Features of the atoms, (n_atoms, n_sph, channels).
        frame: Frames of the edges.
        side: Which atom: ``source`` (neighbour), ``target`` (centre), or ``both``, source first,
            joined along the channels.

    Returns:
        Rows in m-primary order, (n_edges, n_rows, channels), or 2 * channels for ``both``.

    Raises:
        ValueError: If the features do not belong to the frame's degree or atoms, or side is
            unknown.
        TypeError: If the dtypes differ.
    """
    return reference.rotate_to_edge(x, frame, side)


def _verified_out(y: Tensor, frame: EdgeFrame, envelope: Tensor | None, reduce: str) -> Size:
    _check_features(y, frame, frame.wigner.shape[:2], "edges")
    if envelope is not None and envelope.shape != y.shape[:1]:
        raise ValueError(f"envelope is {tuple(envelope.shape)}; expected ({y.shape[0]},)")
    if reduce not in ("sum", "none"):
        raise ValueError(f"reduce {reduce!r} is unknown; choose sum or none")
    return _size(y, frame)


@operation(_verified_out, by_kernels=rotation.from_edge, example=examples.out_of_frame)
def rotate_from_edge(
    y: RowFeatures,
    frame: EdgeFrame,
    *,
    envelope: Float[Tensor, " n_edges"] | None = None,
    reduce: Literal["sum", "none"] = "sum",
) -> Float[Tensor, "n_out n_sph channels"]:
    """Rotate edge features back to the lab frame and sum them on the target atoms.

    Args:
        y: Rows in m-primary order, (n_edges, n_rows, channels).
        frame: Frames of the edges.
        envelope: Factor of each edge, (n_edges,).
        reduce: ``sum`` over the edges of each target, or ``none``.

    Returns:
        (n_atoms, n_sph, channels), or (n_edges, n_sph, channels) without the sum. Atoms without
        edges get zeros.

    Raises:
        ValueError: If the shapes do not belong to the frame or reduce is unknown.
        TypeError: If the dtypes differ.
    """
    return reference.rotate_from_edge(y, frame, envelope, total=reduce == "sum")


def so2_linear(
    x: RowFeatures,
    weights: Sequence[Tensor],
    *,
    lmax: int,
    mmax: int,
    bias: Float[Tensor, " features"] | None = None,
    scale: Float[Tensor, "n_edges scales"] | None = None,
) -> Float[Tensor, "n_edges n_rows c_out"]:
    """Apply the linear map that commutes with rotations about the edge.

    With n = lmax - m + 1 degrees of order m, flattened with the channel running fastest,

        m = 0:  y_0 = W_0 x_0 + bias,
        m > 0:  y_+ = W_1 x_+ - W_2 x_-,   y_- = W_2 x_+ + W_1 x_-.

    W_2 commutes with rotations alone: a reflection through the edge turns the sign of x_-. Weights
    without W_2 make the map commute with reflections too.

    Args:
        x: Rows in m-primary order, (n_edges, n_rows, c_in).
        weights: One per order: (n * c_out, n * c_in) for m = 0; for m > 0 likewise, W_1 alone, or
            (2, n * c_out, n * c_in), W_1 and W_2. See :func:`so2_linear_with_scalars` for a
            taller W_0.
        lmax: Highest degree.
        mmax: Highest order.
        bias: Added to the m = 0 outputs, which are invariant about the edge,
            ((lmax + 1) * c_out,).
        scale: Factors of the inputs, usually from the edge length, (n_edges, sum over m of
            n * c_in), m ascending; +m and -m share theirs.

    Returns:
        (n_edges, n_rows, c_out).

    Raises:
        ValueError: If the shapes do not fit together.
    """
    y, scalars = so2_linear_with_scalars(x, weights, lmax=lmax, mmax=mmax, bias=bias, scale=scale)
    if scalars.shape[1]:
        raise ValueError(
            f"weights[0] has {scalars.shape[1]} rows too many; so2_linear_with_scalars returns them"
        )
    return y


def _verified_map(
    x: Tensor,
    weights: Sequence[Tensor],
    lmax: int,
    mmax: int,
    scale: Tensor | None,
    n_scalars: int | None,
    **_: object,
) -> Size:
    check_orders(lmax, mmax)
    n_rows = len(m_primary_order(lmax, mmax))
    if x.ndim != 3 or x.shape[1] != n_rows:
        raise ValueError(f"x is {tuple(x.shape)}; lmax={lmax}, mmax={mmax} need {n_rows} rows")
    shape = so2_shape(x.shape[2], weights, lmax, mmax, n_scalars)
    if scale is not None and scale.shape != (x.shape[0], shape.n_scales):
        raise ValueError(
            f"scale is {tuple(scale.shape)}; expected ({x.shape[0]}, {shape.n_scales})"
        )
    return size_of(x, x.shape[0], lmax=lmax, mmax=mmax, channels=x.shape[2])


@operation(_verified_map, by_kernels=so2_map.linear, example=examples.so2_map)
def so2_linear_with_scalars(
    x: RowFeatures,
    weights: Sequence[Tensor],
    *,
    lmax: int,
    mmax: int,
    bias: Float[Tensor, " features"] | None = None,
    scale: Float[Tensor, "n_edges scales"] | None = None,
    n_scalars: int | None = None,
) -> tuple[Float[Tensor, "n_edges n_rows c_out"], Float[Tensor, "n_edges n_scalars"]]:
    """Apply :func:`so2_linear` with extra invariant outputs, for gates and attention logits.

    Args:
        x: As in :func:`so2_linear`.
        weights: As in :func:`so2_linear`, but W_0 has n_scalars rows more, at its top.
        lmax: Highest degree.
        mmax: Highest order.
        bias: Added to the m = 0 outputs, (n_scalars + (lmax + 1) * c_out,).
        scale: As in :func:`so2_linear`.
        n_scalars: Number of extra outputs; found from the weights of m = 1 where mmax > 0.

    Returns:
        The rows (n_edges, n_rows, c_out) and the scalars (n_edges, n_scalars).

    Raises:
        ValueError: If the shapes do not fit together.
    """
    shape = so2_shape(x.shape[2], weights, lmax, mmax, n_scalars)
    return reference.so2_map(x, weights, shape, bias, scale)


def _verified_layer(
    x: Tensor,
    frame: EdgeFrame,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    radial: Tensor | None,
    radial_map: tuple[Tensor, Tensor | None] | None,
    envelope: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],
    **_: object,
) -> Size:
    _check_features(x, frame, (frame.n_atoms, (frame.lmax + 1) ** 2), "atoms")
    lmax, mmax, n_edges = frame.lmax, frame.mmax, frame.vectors.shape[0]
    hidden = second[0].shape[-1] // (lmax + 1)
    shape = so2_shape(2 * x.shape[2], first, lmax, mmax, lmax * hidden)
    sizes = (shape.n_biases, so2_shape(hidden, second, lmax, mmax, 0).n_biases)
    for name, bias, n in zip(("first", "second"), biases, sizes, strict=True):
        if bias is not None and bias.shape != (n,):
            raise ValueError(f"bias of the {name} map is {tuple(bias.shape)}; expected ({n},)")
    if shape.c_out != hidden:
        raise ValueError(
            f"weights[0] of the first map is {tuple(first[0].shape)}; with {hidden} hidden "
            f"channels it has {lmax * hidden} rows of gates and {(lmax + 1) * hidden} others"
        )
    n_scales = shape.n_scales
    weight = None if radial_map is None else radial_map[0]
    width = n_scales if weight is None else weight.shape[-1]
    if radial is not None and radial.shape != (n_edges, width):
        raise ValueError(f"radial is {tuple(radial.shape)}; expected ({n_edges}, {width})")
    if weight is not None and (radial is None or weight.shape[0] != n_scales):
        raise ValueError(
            f"the weight of radial_map is {tuple(weight.shape)}; expected ({n_scales}, n_radial), "
            f"and radial of that width"
        )
    if envelope is not None and envelope.shape != (n_edges,):
        raise ValueError(f"envelope is {tuple(envelope.shape)}; expected ({n_edges},)")
    return size_of(x, n_edges, lmax=lmax, mmax=mmax, channels=x.shape[2])


@operation(_verified_layer, by_kernels=layer.conv, example=examples.layer)
def escn_conv(
    x: NodeFeatures,
    frame: EdgeFrame,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    *,
    radial: Float[Tensor, "n_edges n_radial"] | None = None,
    radial_map: tuple[Tensor, Tensor | None] | None = None,
    envelope: Float[Tensor, " n_edges"] | None = None,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    recompute: bool = False,
) -> Float[Tensor, "n_atoms n_sph c_out"]:
    """Apply a whole edge layer: both atoms, SO(2) map, gate, SO(2) map, sum on the targets.

    The same numbers as :func:`rotate_to_edge`, :func:`so2_linear_with_scalars`, SiLU on l = 0 with
    sigmoid gates on l > 0, :func:`so2_linear` and :func:`rotate_from_edge` one after the other,
    but of an edge only the outputs of the two maps are kept for the backward pass, or, with
    ``recompute``, nothing. Differentiable twice.

    Args:
        x: Features of the atoms, (n_atoms, n_sph, channels).
        frame: Frames of the edges.
        first: Weights of the first map as in :func:`so2_linear`, from 2 * channels to the hidden
            channels; the gates, lmax * hidden, are the top rows of W_0.
        second: Weights of the second map, from the hidden channels to c_out.
        radial: Factors of the first map's inputs, its ``scale``; or, with ``radial_map``, the
            values that give them.
        radial_map: Weight (n_scales, n_radial) and bias (n_scales,) of a last linear layer that
            gives the factors, which are then never written out for all edges.
        envelope: Factor of each edge's message, (n_edges,).
        biases: Of both maps, added to their outputs of m = 0, gates included.
        recompute: Keep nothing of an edge, at the price of computing both maps again.

    Returns:
        (n_atoms, n_sph, c_out).

    Raises:
        ValueError: If the shapes do not fit together.
        TypeError: If the dtypes differ.
    """
    if radial is not None and radial_map is not None:
        radial = torch.nn.functional.linear(radial, *radial_map)
    lmax, mmax = frame.lmax, frame.mmax
    hidden = second[0].shape[-1] // (lmax + 1)
    rows = rotate_to_edge(x, frame, side="both")
    rows, gates = so2_linear_with_scalars(
        *(rows, first),
        lmax=lmax,
        mmax=mmax,
        bias=biases[0],
        scale=radial,
        n_scalars=lmax * hidden,
    )
    rows = reference.gated(rows, gates, lmax, mmax)
    rows = so2_linear(rows, second, lmax=lmax, mmax=mmax, bias=biases[1])
    return rotate_from_edge(rows, frame, envelope=envelope)


def _size(x: Tensor, frame: EdgeFrame) -> Size:
    return size_of(x, frame.vectors.shape[0], lmax=frame.lmax, mmax=frame.mmax, channels=x.shape[2])


def _check_features(x: Tensor, frame: EdgeFrame, shape: Sequence[int], where: str) -> None:
    if x.ndim != 3 or x.shape[:2] != tuple(shape):
        raise ValueError(
            f"features of {where} are {tuple(x.shape)}; this frame (lmax={frame.lmax}, "
            f"mmax={frame.mmax}) needs ({shape[0]}, {shape[1]}, channels)"
        )
    if x.dtype != frame.wigner.dtype:
        raise TypeError(
            f"features are {x.dtype} but the edge vectors {frame.wigner.dtype}; cast one of them"
        )
