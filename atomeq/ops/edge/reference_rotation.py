"""Rotation into and out of the edge frames in plain torch, with the torque identity as gradient.

The stack between the two rotations is equivariant to rotations about the edge, so the energy
depends on the direction of an edge only through the torque its features feel. With X_k the
generators of so(3), h the cotangent of a feature x in the lab frame and v the edge vector,

    tau_k = -<h, X_k x>  (into the frame),   tau_k = +<h, X_k x>  (out of it),
    dE/dv = (tau x v) / |v|^2.

The Wigner matrices thus need no gradient: the roll of the frame is free, no 1/sin(beta) appears
and three numbers per edge replace the gradient of a matrix. Each backward pass below is made of
the same functions and plain torch, so it can be differentiated any number of times.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from atomeq.ops.blocks import blocks
from atomeq.ops.edge.wigner import flat_generators
from atomeq.ops.tables import table_like


def gather_rotate(
    x: Tensor, vectors: Tensor, wigner: Tensor, lmax: int, indices: tuple[Tensor, ...]
) -> Tensor:
    """Gather atoms by each index, join them along channels and rotate them into the edge frames."""
    return _GatherRotate.apply(x, vectors, wigner, lmax, *indices)  # type: ignore[no-any-return]


def rotate_scatter(
    y: Tensor,
    vectors: Tensor,
    envelope: Tensor | None,
    wigner: Tensor,
    lmax: int,
    target: Tensor,
    n_atoms: int,
) -> Tensor:
    """Rotate edge features back to the lab frame, scale them and sum them on the target atoms."""
    return _RotateScatter.apply(y, vectors, envelope, wigner, lmax, target, n_atoms)  # type: ignore[no-any-return]


def rotate_back(y: Tensor, vectors: Tensor, wigner: Tensor, lmax: int) -> Tensor:
    """Rotate edge features back to the lab frame, one result per edge."""
    return _RotateEdges.apply(y, vectors, wigner, lmax, True)  # type: ignore[no-any-return]


class _RotateEdges(Function):
    """``W x`` into the frame, or ``W^T x`` back to the lab, for features that live on edges."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, vectors: Tensor, wigner: Tensor, lmax: int, back: bool
    ) -> Tensor:
        rotated = torch.bmm(wigner.mT if back else wigner, x)
        ctx.lmax, ctx.back = lmax, back
        ctx.save_for_backward(rotated if back else x, vectors, wigner)  # the one in the lab frame
        return rotated

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        lab, vectors, wigner = ctx.saved_tensors
        grad_x = grad_vectors = None
        if ctx.back:
            if ctx.needs_input_grad[0]:
                grad_x = _RotateEdges.apply(grad, vectors, wigner, ctx.lmax, False)
            if ctx.needs_input_grad[1]:
                grad_vectors = _turn(torque_of(grad, lab, ctx.lmax), vectors)
        elif any(ctx.needs_input_grad[:2]):
            grad_x = rotate_back(grad, vectors, wigner, ctx.lmax)
            if ctx.needs_input_grad[1]:
                grad_vectors = _turn(torque_of(lab, grad_x, ctx.lmax), vectors)
        return grad_x, grad_vectors, None, None, None


class _GatherRotate(Function):
    """The same with the gather inside: only the atoms' features are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, vectors: Tensor, wigner: Tensor, lmax: int, *indices: Tensor
    ) -> Tensor:
        ctx.lmax = lmax
        ctx.save_for_backward(x, vectors, wigner, *indices)
        channels = len(indices) * x.shape[2]
        rotated = x.new_empty(*wigner.shape[:2], channels)
        for part in blocks(rotated.shape[0], x.shape[1] * channels, x.device):
            members = gathered(x, tuple(index[part] for index in indices))
            torch.bmm(wigner[part], members, out=rotated[part])
        return rotated

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, vectors, wigner, *indices = ctx.saved_tensors
        lab_grad = rotate_back(grad, vectors, wigner, ctx.lmax)  # (n_edges, n_sph, channels)
        grad_x = grad_vectors = None
        if ctx.needs_input_grad[0]:
            grad_x = scattered(lab_grad, indices, x.shape[0])
        if ctx.needs_input_grad[1]:
            # <x, X h> = -<h, X x>: the generators are antisymmetric.
            grad_vectors = _turn(torque_of(gathered(x, indices), lab_grad, ctx.lmax), vectors)
        return grad_x, grad_vectors, None, None, *(None for _ in indices)


class _RotateScatter(Function):
    """The way back with envelope and sum inside: no lab-frame feature of an edge is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        vectors: Tensor,
        envelope: Tensor | None,
        wigner: Tensor,
        lmax: int,
        target: Tensor,
        n_atoms: int,
    ) -> Tensor:
        ctx.lmax = lmax
        ctx.save_for_backward(y, vectors, envelope, wigner, target)
        total = y.new_zeros(n_atoms, wigner.shape[2], y.shape[2])
        for part in blocks(y.shape[0], wigner.shape[2] * y.shape[2], y.device):
            lab = torch.bmm(wigner[part].mT, y[part])
            if envelope is not None:
                lab.mul_(envelope[part, None, None])
            total.index_add_(0, target[part], lab)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        y, vectors, envelope, wigner, target = ctx.saved_tensors
        grad_y = grad_vectors = grad_envelope = None
        needs_rows = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        if ctx.needs_input_grad[1]:
            lab_grad = grad.index_select(0, target)  # one gather serves both
            if needs_rows:
                grad_y = _RotateEdges.apply(lab_grad, vectors, wigner, ctx.lmax, False)
            torque = torque_of(lab_grad, rotate_back(y, vectors, wigner, ctx.lmax), ctx.lmax)
            if envelope is not None:
                torque = torque * envelope[:, None]
            grad_vectors = _turn(torque, vectors)
        elif needs_rows:
            grad_y = gather_rotate(grad, vectors, wigner, ctx.lmax, (target,))
        if envelope is not None and grad_y is not None:
            if ctx.needs_input_grad[2]:
                grad_envelope = torch.linalg.vecdot(grad_y.flatten(1), y.flatten(1))
            grad_y = grad_y * envelope[:, None, None]
        return grad_y, grad_vectors, grad_envelope, None, None, None, None


def gathered(x: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """Return the atoms at each index, joined along the channels; x itself without any."""
    if not indices:
        return x
    parts = [x.index_select(0, index) for index in indices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def scattered(x: Tensor, indices: Sequence[Tensor], n_atoms: int) -> Tensor:
    """Sum on the atoms at each index its part of the channels: the transpose of a gather."""
    channels = x.shape[-1] // len(indices)
    total = x.new_zeros(n_atoms, x.shape[1], channels)
    for index, part in zip(indices, x.split(channels, dim=-1), strict=True):
        total = total.index_add(0, index, part)
    return total


def torque_of(h: Tensor, x: Tensor, lmax: int) -> Tensor:
    """Return <h, X_k x> for the three generators, (n_edges, 3)."""
    return _Torque.apply(h, x, lmax)  # type: ignore[no-any-return]


class _Torque(Function):
    """The outer products over channels come first: their size does not grow with the channels.

    Only the gradient is written by hand: autograd would multiply from the other side, three times
    slower for these small matrices, and hand on transposed features.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, x: Tensor, lmax: int) -> Tensor:
        ctx.lmax = lmax
        ctx.save_for_backward(h, x)
        outer = torch.bmm(h, x.mT)  # (n_edges, n_sph, n_sph)
        return outer.flatten(1) @ table_like(flat_generators, lmax, like=x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        h, x = ctx.saved_tensors
        turning = grad @ table_like(flat_generators, ctx.lmax, like=x).T
        turning = turning.unflatten(1, (x.shape[1], x.shape[1]))  # sum_k g_k X_k, antisymmetric
        grad_h = torch.bmm(turning, x) if ctx.needs_input_grad[0] else None
        grad_x = -torch.bmm(turning, h) if ctx.needs_input_grad[1] else None
        return grad_h, grad_x, None


def _turn(torque: Tensor, vectors: Tensor) -> Tensor:
    """Return the derivative with respect to the edge vector: only its direction feels a torque."""
    return torch.linalg.cross(torque, vectors) / vectors.square().sum(-1, keepdim=True)
