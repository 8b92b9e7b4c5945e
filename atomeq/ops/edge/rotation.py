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

import torch
from torch import Tensor

from atomeq.ops.edge.kernel_sets import edge_kernels
from atomeq.ops.edge.wigner import flat_generators
from atomeq.ops.registration import registered
from atomeq.ops.tables import table_like


def _fake_rotated(call: SimpleNamespace) -> Tensor:
    channels = max(1, len(call.indices)) * call.x.shape[2]
    return call.x.new_empty(*call.wigner.shape[:2], channels)


def _rotated_gradient(
    saved: SimpleNamespace, wanted: set[str], grad: Tensor
) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {}
    if "x" in wanted:
        found["x"] = _scatter(saved, grad, saved.x.shape[0], None, saved.omega)
    found |= _turning_gradient(saved, wanted, saved.x, grad)
    return found


@registered(outputs=_fake_rotated, gradient=_rotated_gradient)
def gather_rotate(
    x: Tensor,
    vectors: Tensor,
    wigner: Tensor,
    omega: Tensor | None,
    indices: list[Tensor],
    segments: list[Tensor],
    lmax: int,
    mmax: int,
    kernels: str,
) -> Tensor:
    """Return A(x, omega), (n_edges, n_rows, S * channels); ``segments`` serve the gradient."""
    turned = turned_wigner(wigner, omega)
    return edge_kernels(kernels).gather_rotate(x, turned, indices, lmax=lmax, mmax=mmax)


def _fake_scattered(call: SimpleNamespace) -> Tensor:
    rows = call.rows
    n_results = call.n_atoms if call.indices else rows.shape[0]
    channels = rows.shape[2] // max(1, len(call.indices))
    return rows.new_empty(n_results, call.wigner.shape[2], channels)


def _scattered_gradient(
    saved: SimpleNamespace, wanted: set[str], grad: Tensor
) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {}
    if wanted & {"rows", "factor"}:
        rows = _rotate(saved, grad, saved.omega)
        if "factor" in wanted:
            found["factor"] = torch.linalg.vecdot(rows.flatten(1), saved.rows.flatten(1))
        scaled = rows if saved.factor is None else rows * saved.factor[:, None, None]
        found["rows"] = scaled if "rows" in wanted else None
    if wanted & {"vectors", "omega"}:
        rows = saved.rows if saved.factor is None else saved.rows * saved.factor[:, None, None]
        found |= _turning_gradient(saved, wanted, grad, rows)
    return found


@registered(
    outputs=_fake_scattered,
    gradient=_scattered_gradient,
    only_for={"rows": ("vectors", "factor", "omega")},
)
def rotate_scatter(
    rows: Tensor,
    vectors: Tensor,
    wigner: Tensor,
    factor: Tensor | None,
    omega: Tensor | None,
    indices: list[Tensor],
    segments: list[Tensor],
    n_atoms: int,
    lmax: int,
    mmax: int,
    kernels: str,
) -> Tensor:
    """Return B(rows, omega), (n_atoms, n_sph, channels), or per edge without indices."""
    return edge_kernels(kernels).rotate_scatter(
        rows,
        turned_wigner(wigner, omega),
        indices,
        segments,
        n_atoms,
        lmax=lmax,
        mmax=mmax,
        factor=factor,
    )


def _fake_torque(call: SimpleNamespace) -> Tensor:
    return call.x.new_empty(call.rows.shape[0], 3)


def _torque_gradient(
    saved: SimpleNamespace, wanted: set[str], grad: Tensor
) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {}
    if "x" in wanted:
        found["x"] = _scatter(saved, saved.rows, saved.x.shape[0], None, grad)
    if "rows" in wanted:
        found["rows"] = _rotate(saved, saved.x, grad)
    if "vectors" in wanted:
        turn = _turned_torque(saved, saved.x, saved.rows, grad)
        found["vectors"] = turn_gradient(-turn, saved.vectors)
    return found


@registered(outputs=_fake_torque, gradient=_torque_gradient)
def torque(
    x: Tensor,
    rows: Tensor,
    vectors: Tensor,
    wigner: Tensor,
    indices: list[Tensor],
    segments: list[Tensor],
    lmax: int,
    mmax: int,
    kernels: str,
) -> Tensor:
    """Return C(x, rows), (n_edges, 3)."""
    return edge_kernels(kernels).torque(x, rows, wigner, indices, lmax=lmax, mmax=mmax)


def turn_gradient(turn: Tensor, vectors: Tensor) -> Tensor:
    """Return dE/dv from the derivative with respect to a turn: only the direction feels it."""
    return torch.linalg.cross(turn, vectors) / vectors.square().sum(-1, keepdim=True)


def turning(omega: Tensor, n_sph: int) -> Tensor:
    """Return T(omega) = sum_k omega_k X_k, (n_edges, n_sph, n_sph)."""
    generators = table_like(flat_generators, math.isqrt(n_sph) - 1, like=omega)
    return (omega @ generators.T).unflatten(1, (n_sph, n_sph))


def _fake_turns(call: SimpleNamespace) -> Tensor:
    return call.omega.new_empty(call.omega.shape[0], call.n_sph, call.n_sph)


def _turns_gradient(
    saved: SimpleNamespace, wanted: set[str], grad: Tensor
) -> dict[str, Tensor | None]:
    return {"omega": turn_components(grad)}


@registered(outputs=_fake_turns, gradient=_turns_gradient)
def turn_matrices(omega: Tensor, n_sph: int) -> Tensor:
    """Return T(omega) in a gradient formula: a trace of one may not meet the table itself."""
    return turning(omega, n_sph)


def _fake_components(call: SimpleNamespace) -> Tensor:
    return call.matrices.new_empty(call.matrices.shape[0], 3)


def _components_gradient(
    saved: SimpleNamespace, wanted: set[str], grad: Tensor
) -> dict[str, Tensor | None]:
    return {"matrices": turn_matrices(grad, saved.matrices.shape[1])}


@registered(outputs=_fake_components, gradient=_components_gradient)
def turn_components(matrices: Tensor) -> Tensor:
    """Return <X_k, matrices>, (n_edges, 3): the transpose of :func:`turn_matrices`."""
    generators = table_like(flat_generators, math.isqrt(matrices.shape[1]) - 1, like=matrices)
    return matrices.flatten(1) @ generators


def _fake_turning(call: SimpleNamespace) -> Tensor:
    return torch.empty_like(call.wigner)


def _turning_wigner_gradient(
    saved: SimpleNamespace, wanted: set[str], grad: Tensor
) -> dict[str, Tensor | None]:
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


def gathered(x: Tensor, indices: list[Tensor]) -> Tensor:
    """Return G x, (n_edges, n_sph, S * channels)."""
    if not indices:
        return x
    parts = [x.index_select(0, index) for index in indices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _turning_gradient(
    saved: SimpleNamespace, wanted: set[str], x: Tensor, rows: Tensor
) -> dict[str, Tensor | None]:
    """Return the gradients of <rows, W T(omega) G x> with respect to omega and the vectors."""
    found: dict[str, Tensor | None] = {}
    if saved.omega is None:
        if "vectors" in wanted:
            found["vectors"] = turn_gradient(-_torque(saved, x, rows), saved.vectors)
        return found
    if "omega" in wanted:
        found["omega"] = _torque(saved, x, rows)
    if "vectors" in wanted:
        turn = _turned_torque(saved, x, rows, saved.omega)
        found["vectors"] = turn_gradient(-turn, saved.vectors)
    return found


def _turned_torque(saved: SimpleNamespace, x: Tensor, rows: Tensor, omega: Tensor) -> Tensor:
    """Return <W^T rows, X_k T(omega) G x>, with T(omega) G x written out for each edge."""
    lab = turn_matrices(omega, x.shape[1]) @ gathered(x, saved.indices)
    none: list[Tensor] = []
    return torque(
        lab, rows, saved.vectors, saved.wigner, none, none, saved.lmax, saved.mmax, saved.kernels
    )


def _torque(saved: SimpleNamespace, x: Tensor, rows: Tensor) -> Tensor:
    return torque(
        x,
        rows,
        saved.vectors,
        saved.wigner,
        saved.indices,
        saved.segments,
        saved.lmax,
        saved.mmax,
        saved.kernels,
    )


def _rotate(saved: SimpleNamespace, x: Tensor, omega: Tensor | None) -> Tensor:
    return gather_rotate(
        x,
        saved.vectors,
        saved.wigner,
        omega,
        saved.indices,
        saved.segments,
        saved.lmax,
        saved.mmax,
        saved.kernels,
    )


def _scatter(
    saved: SimpleNamespace, rows: Tensor, n_atoms: int, factor: Tensor | None, omega: Tensor | None
) -> Tensor:
    return rotate_scatter(
        rows,
        saved.vectors,
        saved.wigner,
        factor,
        omega,
        saved.indices,
        saved.segments,
        n_atoms,
        saved.lmax,
        saved.mmax,
        saved.kernels,
    )
