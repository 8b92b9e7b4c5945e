"""Rotation into and out of the edge frames as registered operations; the gradient is a torque.

The stack between the two rotations is equivariant to rotations about the edge, so the energy
depends on the direction of an edge only through the torque its features feel. Let W be the rotation
into the frame, G the gather of the atoms, X_k the generators of so(3) and T(w) = sum_k w_k X_k.

    A(x, w)  =  W T(w) G x            gather_rotate (T absent without w)
    B(y, w)  =  G^T T(w)^T W^T f y    rotate_scatter, f a factor of each edge
    C(x, y)  =  <W^T y, X_k G x>      torque, (n_edges, 3)

A turn of the edge by a small angle t makes W into W (1 - T(t)), so with h the cotangent of A

    dE/dx = B(h, w),   dE/dw = C(x, h),
    dE/dt = -<W^T h, X_k T(w) G x>,   dE/dv = dE/dt x v / |v|^2,

and alike for B, whose transpose is A, and for C, whose derivatives are A and B with w the cotangent
of C. The three are closed: no Wigner matrix is ever differentiated, the roll of the frame is free,
and no 1/sin(beta) appears.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from atomeq.ops.edge.frame import EdgeFrame, Side
from atomeq.ops.edge.wigner import flat_generators
from atomeq.ops.registration import WANT_SEGMENTS, kernel, kernels_of, registered
from atomeq.ops.tables import table_like

Gradients = dict[str, Tensor | list[Tensor] | list[Tensor | None] | None]


def to_edge(x: Tensor, frame: EdgeFrame, side: Side, kernels: str) -> Tensor:
    """Gather, join the channels, rotate into the edge frames by some kernels."""
    ends = list(frame.ends(side))
    segments = frame.segments_for(ends) if kernels in WANT_SEGMENTS else []
    return gather_rotate(x, None, frame.vectors, frame.wigner, ends, segments, kernels)


def from_edge(
    y: Tensor, frame: EdgeFrame, envelope: Tensor | None, reduce: str, kernels: str
) -> Tensor:
    """Rotate back to the lab frame and sum on the targets by some kernels."""
    ends = [frame.target] if reduce == "sum" else []
    segments = frame.segments_for(ends) if kernels in WANT_SEGMENTS else []
    return rotate_scatter(
        *(y, None, envelope, frame.n_atoms, frame.vectors, frame.wigner, ends, segments, kernels)
    )


def _same(saved: SimpleNamespace) -> tuple[Any, ...]:
    """Return the arguments that all three operations have last."""
    return (saved.vectors, saved.wigner, saved.indices, saved.segments, saved.kernels)


def _fake_rotated(call: SimpleNamespace) -> Tensor:
    channels = max(1, len(call.indices)) * call.x.shape[2]
    return call.x.new_empty(*call.wigner.shape[:2], channels)


def _rotated_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> Gradients:
    found = _turning_gradient(saved, wanted, saved.x, grad)
    if "x" in wanted:
        n_atoms = saved.x.shape[0]
        found["x"] = rotate_scatter(grad, saved.omega, None, n_atoms, *_same(saved))
    return found


@registered(outputs=_fake_rotated, gradient=_rotated_gradient)
def gather_rotate(
    x: Tensor,
    omega: Tensor | None,
    vectors: Tensor,
    wigner: Tensor,
    indices: list[Tensor],
    segments: list[Tensor],
    kernels: str,
) -> Tensor:
    """Return A(x, omega), (n_edges, n_rows, S * channels); ``segments`` serve the gradient."""
    return kernels_of("edge", kernels).gather_rotate(x, turned_wigner(wigner, omega), indices)


def _fake_scattered(call: SimpleNamespace) -> Tensor:
    rows = call.rows
    n_results = call.n_atoms if call.indices else rows.shape[0]
    channels = rows.shape[2] // max(1, len(call.indices))
    return rows.new_empty(n_results, call.wigner.shape[2], channels)


def _scattered_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> Gradients:
    found: Gradients = {}
    factor = None if saved.factor is None else saved.factor[:, None, None]
    if wanted & {"vectors", "omega"}:
        rows = saved.rows if factor is None else saved.rows * factor
        found = _turning_gradient(saved, wanted, grad, rows)
    if wanted & {"rows", "factor"}:
        rows = gather_rotate(grad, saved.omega, *_same(saved))
        if "factor" in wanted:
            found["factor"] = torch.linalg.vecdot(rows.flatten(1), saved.rows.flatten(1))
        if "rows" in wanted:
            found["rows"] = rows if factor is None else rows * factor
    return found


@registered(
    outputs=_fake_scattered,
    gradient=_scattered_gradient,
    only_for={"rows": ("vectors", "factor", "omega")},
)
def rotate_scatter(
    rows: Tensor,
    omega: Tensor | None,
    factor: Tensor | None,
    n_atoms: int,
    vectors: Tensor,
    wigner: Tensor,
    indices: list[Tensor],
    segments: list[Tensor],
    kernels: str,
) -> Tensor:
    """Return B(rows, omega), (n_atoms, n_sph, channels), or per edge without indices."""
    turned = turned_wigner(wigner, omega)
    by = kernels_of("edge", kernels)
    return by.rotate_scatter(rows, turned, indices, segments, n_atoms, factor=factor)


def _fake_torque(call: SimpleNamespace) -> Tensor:
    return call.x.new_empty(call.rows.shape[0], 3)


def _torque_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> Gradients:
    found: Gradients = {}
    if "x" in wanted:
        found["x"] = rotate_scatter(saved.rows, grad, None, saved.x.shape[0], *_same(saved))
    if "rows" in wanted:
        found["rows"] = gather_rotate(saved.x, grad, *_same(saved))
    if "vectors" in wanted:
        turn = _turned_torque(saved, saved.x, saved.rows, grad)
        found["vectors"] = turn_gradient(turn, saved.vectors, saved.kernels, sign=-1.0)
    return found


@registered(outputs=_fake_torque, gradient=_torque_gradient)
def torque(
    x: Tensor,
    rows: Tensor,
    vectors: Tensor,
    wigner: Tensor,
    indices: list[Tensor],
    segments: list[Tensor],
    kernels: str,
) -> Tensor:
    """Return C(x, rows), (n_edges, 3)."""
    return kernels_of("edge", kernels).torque(x, rows, wigner, indices)


def turn_gradient(
    turn: Tensor, vectors: Tensor, kernels: str | None = None, *, sign: float = 1.0
) -> Tensor:
    """Return dE/dv from the derivative with respect to a turn: only the direction feels it.

    Args:
        turn: That derivative, times the sign; of a torque it is -1, (n_edges, 3).
        vectors: Of the edges, (n_edges, 3).
        kernels: Where the result is not to be differentiated, theirs make it.
        sign: Of the turn.
    """
    if kernels is not None and not torch.is_grad_enabled():
        return vector_gradient(turn, vectors, sign, kernels)
    turn = turn if sign > 0 else -turn
    return torch.linalg.cross(turn, vectors) / vectors.square().sum(-1, keepdim=True)


@kernel(outputs=lambda call: torch.empty_like(call.vectors))
def vector_gradient(turn: Tensor, vectors: Tensor, sign: float, kernels: str) -> Tensor:
    """Return sign t x v / |v|^2, (n_edges, 3)."""
    ...


def turning(omega: Tensor, n_sph: int) -> Tensor:
    """Return T(omega) = sum_k omega_k X_k, (n_edges, n_sph, n_sph)."""
    generators = table_like(flat_generators, math.isqrt(n_sph) - 1, like=omega)
    return (omega @ generators.T).unflatten(1, (n_sph, n_sph))


def _fake_turns(call: SimpleNamespace) -> Tensor:
    return call.omega.new_empty(call.omega.shape[0], call.n_sph, call.n_sph)


def _turns_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> Gradients:
    return {"omega": turn_components(grad)}


@registered(outputs=_fake_turns, gradient=_turns_gradient)
def turn_matrices(omega: Tensor, n_sph: int) -> Tensor:
    """Return T(omega) in a gradient formula: a trace of one may not meet the table itself."""
    return turning(omega, n_sph)


def _fake_components(call: SimpleNamespace) -> Tensor:
    return call.matrices.new_empty(call.matrices.shape[0], 3)


def _components_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> Gradients:
    return {"matrices": turn_matrices(grad, saved.matrices.shape[1])}


@registered(outputs=_fake_components, gradient=_components_gradient)
def turn_components(matrices: Tensor) -> Tensor:
    """Return <X_k, matrices>, (n_edges, 3): the transpose of :func:`turn_matrices`."""
    generators = table_like(flat_generators, math.isqrt(matrices.shape[1]) - 1, like=matrices)
    return matrices.flatten(1) @ generators


def _fake_turning(call: SimpleNamespace) -> Tensor:
    return torch.empty_like(call.wigner)


def _turning_wigner_gradient(saved: SimpleNamespace, wanted: set[str], grad: Tensor) -> Gradients:
    turn = turn_components(turning_wigner(saved.vectors, saved.wigner).mT @ grad)
    return {"vectors": turn_gradient(-turn, saved.vectors)}


@registered(outputs=_fake_turning, gradient=_turning_wigner_gradient)
def turning_wigner(vectors: Tensor, wigner: Tensor) -> Tensor:
    """Return W as a function of the vectors: a turn by t makes it W (1 - T(t)).

    This is all that the reference knows of a frame's derivative.
    """
    return wigner.clone()


def turned_wigner(wigner: Tensor, omega: Tensor | None) -> Tensor:
    """Return W T(omega), a matrix of the same blocks as W."""
    return wigner if omega is None else torch.bmm(wigner, turning(omega, wigner.shape[2]))


def _turning_gradient(
    saved: SimpleNamespace, wanted: set[str], x: Tensor, rows: Tensor
) -> Gradients:
    """Return the gradients of <rows, W T(omega) G x> with respect to omega and the vectors."""
    found: Gradients = {}
    if "omega" in wanted:
        found["omega"] = torque(x, rows, *_same(saved))
    if "vectors" in wanted:
        if saved.omega is None:
            turn = torque(x, rows, *_same(saved))
        else:
            turn = _turned_torque(saved, x, rows, saved.omega)
        found["vectors"] = turn_gradient(turn, saved.vectors, saved.kernels, sign=-1.0)
    return found


def _turned_torque(saved: SimpleNamespace, x: Tensor, rows: Tensor, omega: Tensor) -> Tensor:
    """Return <W^T rows, X_k T(omega) G x>, with T(omega) G x written out for each edge."""
    members = [x.index_select(0, index) for index in saved.indices]
    lab = turn_matrices(omega, x.shape[1]) @ (torch.cat(members, dim=2) if members else x)
    none: list[Tensor] = []
    return torque(lab, rows, saved.vectors, saved.wigner, none, none, saved.kernels)
