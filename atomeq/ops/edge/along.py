"""Rotations of edges along a direction, for the gradient of a layer's gradient.

Along a direction features of atoms, frames, factors and rows of edges move, and a prime is the
derivative: W' = -W T(t) for a turn t, see :mod:`atomeq.ops.edge.rotation`. The three functions
differentiate what an edge layer does with them: the way in, z = s W G x; the way back,
G^T W^T f s y; and the gradients of <y, f s W G x>. Kernels have them by these names; whose do not
do it in one launch make them of their single steps, as here.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from atomeq.ops.edge.so2_map import SO2Shape

Radial = tuple[Tensor, Tensor, Tensor | None]  # h, A and b of factors h A^T + b


class Ends(NamedTuple):
    """Atoms of some edges, and the rotation into the edges' frames and back; rows are flat.

    Attributes:
        by: The kernels.
        wigner: W, (n, n_rows, n_sph).
        indices: Atoms, (n,) each; their channels are joined.
        segments: Of each index, for kernels that want them.
    """

    by: ModuleType
    wigner: Tensor
    indices: list[Tensor]
    segments: list[Tensor]

    def into(
        self,
        x: Tensor,
        wigner: Tensor | None = None,
        *,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Return scale * W G x, (n, n_rows * S * C)."""
        wigner = self.wigner if wigner is None else wigner
        return self.by.gather_rotate(x, wigner, self.indices, scale=scale).flatten(1)

    def operand(self, x: Tensor, scale: Tensor | None, radial: Radial | None) -> Tensor:
        """Return scale * W G x, (n, n_rows * S * C), that a map alone reads; see gather_rotate."""
        factors = {"scale": scale, "radial": radial}
        return self.by.gather_rotate(x, *self[1:3], **factors, operand=True).flatten(1)

    def back(
        self,
        rows: Tensor,
        n_atoms: int,
        total: Tensor | None = None,
        wigner: Tensor | None = None,
        *,
        factor: Tensor | None = None,
    ) -> Tensor:
        """Return G^T W^T (factor * rows), added to the features of the atoms if there are some."""
        wigner = self.wigner if wigner is None else wigner
        given = (rows.unflatten(1, (wigner.shape[1], -1)), wigner, self.indices, self.segments)
        return self.by.rotate_scatter(*given, n_atoms, factor=factor, total=total)

    def torque(self, x: Tensor, rows: Tensor, wigner: Tensor | None = None) -> Tensor:
        """Return <W^T rows, X_k G x>, (n, 3)."""
        wigner = self.wigner if wigner is None else wigner
        rows = rows.unflatten(1, (wigner.shape[1], -1))
        return self.by.torque(x, rows, wigner, self.indices)

    def leave(
        self,
        x: Tensor,
        rows: Tensor | None,
        factor: Tensor | None,
        to_factor: Tensor | None = None,
        turn: Tensor | None = None,
        also: Tensor | None = None,
        *,
        operand: bool = False,
    ) -> Tensor:
        """Return f W G x + also; of <f W G x, rows> write the gradients, see ``leave_gradient``."""
        shape = (self.wigner.shape[1], -1)
        given, also = (t if t is None else t.unflatten(1, shape) for t in (rows, also))
        ends = x, self.wigner, self.indices
        written = to_factor, turn, also
        return self.by.leave_gradient(*ends, given, factor, *written, operand=operand).flatten(1)


class Moved(NamedTuple):
    """Derivatives along a direction; what is None does not move.

    Attributes:
        x: x', of the features of the atoms.
        wigner: W', (n, n_rows, n_sph).
        turn: t, (n, 3).
        scale: s', of the factors of rows, (n, n_scales).
        factor: f', of the factors of edges, (n,).
        rows: y', of rows of the edges, (n, n_rows * S * C).
    """

    x: Tensor | None = None
    wigner: Tensor | None = None
    turn: Tensor | None = None
    scale: Tensor | None = None
    factor: Tensor | None = None
    rows: Tensor | None = None


class Found(NamedTuple):
    """Where derivatives of gradients go; None where one is not wanted.

    Attributes:
        scale: Is written: y r, summed over +m and -m, with r = W G x, (n, n_scales).
        moved_scale: Is written: y' r + y r', summed over +m and -m.
        rotated: Is written: f r' + f' r, (n, n_rows * S * C).
        factor: Is written: <y', r> + <y, r'>, (n,).
        turn: Is lessened by the derivative of the torque <W^T f s y, X_k G x>, (n, 3).
    """

    scale: Tensor | None = None
    moved_scale: Tensor | None = None
    rotated: Tensor | None = None
    factor: Tensor | None = None
    turn: Tensor | None = None


def rotate_along(
    x: Tensor, ends: Ends, scale: Tensor | None, moved: Moved, shape: SO2Shape
) -> Tensor:
    """Return s (W G x' + W' G x) + s' W G x, (n, n_rows * S * C)."""
    by, moved_rows = ends.by, _moved_rows(x, ends, moved)
    if scale is None:
        return moved_rows
    rows = moved_rows if moved.scale is None else ends.into(x)
    return by.moved_scaled(rows, moved_rows, scale, moved.scale, shape)


def scatter_along(
    ends: Ends,
    rows: Tensor,
    scale: Tensor | None,
    factor: Tensor | None,
    moved: Moved,
    shape: SO2Shape,
    total: Tensor,
) -> None:
    """Add G^T (W^T (f s y' + (f s)' y) + W'^T f s y) to the features of the atoms."""
    own, moved_own = _scaled(ends.by, rows, scale, factor, moved, shape)
    for one, wigner in ((moved_own, ends.wigner), (own, moved.wigner)):
        if one is not None and wigner is not None:
            ends.back(one, len(total), total, wigner)


def gradient_along(
    x: Tensor,
    ends: Ends,
    rows: Tensor,
    scale: Tensor | None,
    factor: Tensor | None,
    moved: Moved,
    shape: SO2Shape,
    into: Found,
) -> None:
    """Differentiate the gradients of <y, f s W G x> along a direction."""
    if any([part is not None for part in into[:4]]):
        r, moved_r = ends.into(x), _moved_rows(x, ends, moved)
        _products_along(ends.by, rows, r, moved_r, moved, shape, into)
        if into.rotated is not None:
            into.rotated.copy_(moved_r if factor is None else moved_r.mul_(factor[:, None]))
            if moved.factor is not None:
                into.rotated.addcmul_(r, moved.factor[:, None])
    if into.turn is None:
        return
    own, moved_own = _scaled(ends.by, rows, scale, factor, moved, shape)
    if moved_own is not None:
        into.turn.sub_(ends.torque(x, moved_own))
    if moved.x is not None:
        into.turn.sub_(ends.torque(moved.x, own))
    if moved.wigner is not None and moved.turn is not None:
        # <W^T y, X_k T G x> by X_k T = T X_k + (t x X)_k
        into.turn.sub_(ends.torque(x, own, moved.wigner))
        into.turn.add_(torch.linalg.cross(moved.turn, ends.torque(x, own)))


def _products_along(
    by: ModuleType,
    rows: Tensor,
    r: Tensor,
    moved_r: Tensor,
    moved: Moved,
    shape: SO2Shape,
    into: Found,
) -> None:
    """Write the derivatives of products of y and r."""
    if into.scale is not None:
        into.scale.copy_(by.row_products(rows, r, shape))
    if into.moved_scale is not None:
        into.moved_scale.copy_(by.row_products(rows, moved_r, shape))
        if moved.rows is not None:
            into.moved_scale.add_(by.row_products(moved.rows, r, shape))
    if into.factor is not None:
        torch.linalg.vecdot(rows, moved_r, out=into.factor)
        if moved.rows is not None:
            into.factor.add_(torch.linalg.vecdot(moved.rows, r))


def _moved_rows(x: Tensor, ends: Ends, moved: Moved) -> Tensor:
    """Return W G x' + W' G x."""
    found = None if moved.x is None else ends.into(moved.x)
    if moved.wigner is not None:
        turned = ends.into(x, moved.wigner)
        found = turned if found is None else found.add_(turned)
    return torch.zeros_like(ends.into(x)) if found is None else found


def _scaled(
    by: ModuleType,
    rows: Tensor,
    scale: Tensor | None,
    factor: Tensor | None,
    moved: Moved,
    shape: SO2Shape,
) -> tuple[Tensor, Tensor | None]:
    """Return f s y and, unless it is zero, its derivative without that of W."""
    parts = []
    if moved.rows is not None:
        parts.append(moved.rows if scale is None else by.scaled_rows(moved.rows, scale, shape))
    if moved.scale is not None:
        parts.append(by.scaled_rows(rows, moved.scale, shape))
    own = rows if scale is None else by.scaled_rows(rows, scale, shape)
    if factor is not None:
        parts = [part * factor[:, None] for part in parts]
        if moved.factor is not None:
            parts.append(own * moved.factor[:, None])
        own = own * factor[:, None]
    return own, sum(parts[1:], start=parts[0]) if parts else None
