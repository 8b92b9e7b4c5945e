"""The gradient of the gradient of the eSCN edge layer, in raw functions.

It is the gradient of dE/de along a direction (x', t, s', f', ...), one for each input e: a step
forward along the direction and back again, block by block. A prime is a derivative along it, what
the others stand for is in :mod:`atomeq.ops.edge.layer`. t turns the edge: W' = -W T(t),
see :mod:`atomeq.ops.edge.rotation`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from atomeq.ops.edge.layer import (
    RADIAL,
    EdgeBlock,
    EdgeLayer,
    Named,
    empty_gradients,
)
from atomeq.ops.edge.radial_scale import RadialScale
from atomeq.ops.edge.rotation import turning


def second_gradient(
    layer: EdgeLayer, grad: Tensor, kept: list[Tensor], along: Named, wanted: set[str]
) -> Named:
    """Return the gradients of sum over e of <along[e], dE/de>, for ``grad`` and every input.

    ``kept`` has y, u, dE/da and dE/dz, empty where they were not kept.
    ``along`` has tensors like the inputs, and ``vectors`` for t; of ``first.0``, ``second.1`` and
    so on, all of a map are given or none.
    """
    found = empty_gradients(layer, wanted)
    if "grad" in wanted:
        found["grad"] = torch.zeros_like(grad)
    for block in layer.blocks():
        _Second(block, grad, kept, along, found).run()
    return found


class _Second:
    """One block of the gradient of the gradient; names as in the module's first lines."""

    def __init__(
        self, block: EdgeBlock, grad: Tensor, kept: list[Tensor], along: Named, found: Named
    ) -> None:
        self.block, self.grad, self.along, self.found = block, grad, along, found
        self.layer, self.part = block.layer, block.part
        self.x = self.layer.tensors["x"]
        self.y, self.u, self.ga, self.gz = (
            values[block.part] if len(values) else None for values in kept
        )
        self.envelope = block.edges("envelope")
        scale = block.scale()
        self.scale: RadialScale | None = None
        if scale is not None:
            self.scale = self.layer.kernels.radial_scale(scale, self.layer.first)
        self.turn = along["vectors"][self.part] if "vectors" in along else None
        self.turned = (
            None
            if self.turn is None
            else torch.bmm(block.wigner, turning(self.turn, self.x.shape[1]))
        )

    def run(self) -> None:
        """Go forward along the direction, then back."""
        block = self.block
        r, moved_r = self._rows()
        moved_scale = self._moved_scale()
        z, moved_z = r, moved_r
        if self.scale is not None:
            z, moved_z = self.scale.value(r, moved_r, moved_scale)
        y = block.first(z) if self.y is None else self.y
        moved_y = block.first(moved_z)
        moved_y += self._other("first", z, back=False)
        gate = block.gate(y)
        p, moved_p = self._weighted_targets()
        ga = block.second_back(p) if self.ga is None else self.ga
        moved_a, curved = gate.second(moved_y, ga)
        self._outputs(gate.value(), moved_a, p, moved_p)
        moved_ga = self._other("second", p, back=True)
        if moved_p is not None:
            moved_ga = moved_ga + block.second_back(moved_p)
        gy = gate.gradient(ga)
        if isinstance(moved_ga, Tensor):
            curved += gate.gradient(moved_ga)
        if "first" in self.found:
            block.add_weight_gradients(moved_z, gy, self.found, "first")
            block.add_weight_gradients(z, curved, self.found, "first")
        if self.found.keys() & {"x", "vectors", *RADIAL}:
            gz = block.first_back(gy) if self.gz is None else self.gz.clone()  # _inputs changes it
            moved_gz = block.first_back(curved)
            moved_gz += self._other("first", gy, back=True)
            self._inputs(r, moved_r, gz, moved_gz, moved_scale)

    def _rows(self) -> tuple[Tensor, Tensor]:
        r = self.block.into(self.x)
        moved = torch.zeros_like(r) if "x" not in self.along else self.block.into(self.along["x"])
        if self.turned is not None:
            moved -= self.block.into(self.x, self.turned)
        return r, moved

    def _moved_scale(self) -> Tensor | None:
        """Return the derivative of s = h A^T + b, or of s itself, along the direction."""
        radial = self.along["radial"][self.part] if "radial" in self.along else None
        weight = self.layer.tensors.get("radial_weight")
        if weight is None:
            return radial
        moved = None if radial is None else radial @ weight.T
        own = self.block.edges("radial")
        if "radial_weight" in self.along and own is not None:
            through = own @ self.along["radial_weight"].T
            moved = through if moved is None else moved + through
        if "radial_bias" in self.along:
            bias = self.along["radial_bias"].expand(self.block.n, -1)
            moved = bias if moved is None else moved + bias
        return moved

    def _weighted_targets(self) -> tuple[Tensor, Tensor | None]:
        """Return p = f q and its derivative, q = W G grad."""
        self.q = self.block.into_target(self.grad)
        self.moved_q = None
        p, moved = self.q, None
        if self.turned is not None:
            self.moved_q = moved = self.block.into_target(self.grad, self.turned).neg_()
        if self.envelope is not None:
            p = p * self.envelope[:, None]
            moved = None if moved is None else moved * self.envelope[:, None]
        if "envelope" in self.along:
            through = self.q * self.along["envelope"][self.part, None]
            moved = through if moved is None else moved.add_(through)
        return p, moved

    def _turned_torque(self, torque: Callable[..., Tensor], x: Tensor, rows: Tensor) -> Tensor:
        """Return <W^T rows, X_k T G x>, by X_k T = T X_k + (t x X)_k."""
        assert self.turn is not None
        return torque(x, rows, self.turned) + torch.linalg.cross(self.turn, torque(x, rows))

    def _other(self, name: str, rows: Tensor, *, back: bool) -> Tensor | int:
        """Return M' rows or M'^T rows of a direction in the weights, 0 if it has none."""
        if f"{name}.0" not in self.along:
            return 0
        shape = getattr(self.layer, name)
        weights = [self.along[f"{name}.{m}"] for m in range(shape.mmax + 1)]
        other = self.layer.kernels.so2_map(weights, shape)
        if back:
            return other.transposed(rows, self.block.empty(shape.n_rows * shape.c_in, rows))
        return other.forward(rows, self.block.empty(shape.width, rows))

    def _outputs(self, a: Tensor, moved_a: Tensor, p: Tensor, moved_p: Tensor | None) -> None:
        """Add the gradients that stem from the second map and the way back."""
        block, found, part = self.block, self.found, self.part
        if "second" in found:
            block.add_weight_gradients(moved_a, p, found, "second")
            if moved_p is not None:
                block.add_weight_gradients(a, moved_p, found, "second")
        if not found.keys() & {"grad", "envelope", "vectors"}:
            return
        u = block.second(a) if self.u is None else self.u.clone()  # _leave changes it
        moved_u = block.second(moved_a)
        moved_u += self._other("second", a, back=False)
        if "envelope" in found:
            found["envelope"][part] += torch.linalg.vecdot(self.q, moved_u)
            if self.moved_q is not None:
                found["envelope"][part] += torch.linalg.vecdot(self.moved_q, u)
        self._leave(u, moved_u)

    def _leave(self, u: Tensor, moved_u: Tensor) -> None:
        """Add the gradients of the rotation back, <f u, ...> and its derivative; both change."""
        block, found, part = self.block, self.found, self.part
        if self.envelope is not None:
            moved_u *= self.envelope[:, None]
        if "envelope" in self.along:
            moved_u += u * self.along["envelope"][part, None]
        if self.envelope is not None:
            u *= self.envelope[:, None]
        if "grad" in found:
            block.back_to_target(moved_u, found["grad"])
            if self.turned is not None:
                block.back_to_target(u.neg(), found["grad"], self.turned)
        if "vectors" in found:
            turn = block.torque_on_target(self.grad, moved_u)
            if self.turn is not None:
                turn -= self._turned_torque(block.torque_on_target, self.grad, u)
            found["vectors"][part] -= turn

    def _inputs(
        self, r: Tensor, moved_r: Tensor, gz: Tensor, moved_gz: Tensor, moved_scale: Tensor | None
    ) -> None:
        """Add the gradients that stem from the way in."""
        block, found, part = self.block, self.found, self.part
        if self.scale is not None:
            through, moved = self.scale.second_(r, moved_r, gz, moved_gz, moved_scale)
            if found.keys() & RADIAL:
                block.add_radial_gradients(moved, (through, self.along), found)
        gr, moved_gr = gz, moved_gz
        if "x" in found:
            block.back(moved_gr, found["x"])
            if self.turned is not None:
                block.back(gr.neg(), found["x"], self.turned)
        if "vectors" in found:
            turn = block.torque(self.x, moved_gr)
            if "x" in self.along:
                turn += block.torque(self.along["x"], gr)
            if self.turn is not None:
                turn -= self._turned_torque(block.torque, self.x, gr)
            found["vectors"][part] -= turn
