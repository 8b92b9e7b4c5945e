"""The gradient of the gradient of the eSCN edge layer, in raw functions as layer.py is."""

from typing import Any

import torch
from torch import Tensor

from atomeq.ops.edge.layer import RADIAL, EdgeBlock, EdgeLayer, Named, empty_gradients
from atomeq.ops.edge.rotation import turning


def second_gradient(
    layer: EdgeLayer, grad: Tensor, kept: list[Tensor], along: Named, wanted: set[str]
) -> Named:
    """Return the gradients of sum over e of <along[e], dE/de>, for ``grad`` and every input.

    Here y and u are inputs like the others: what goes through them is left to
    :func:`~atomeq.ops.edge.layer.gradient`. ``kept`` has both, and dE/da and dE/dz, empty where
    they were not kept. ``along`` has tensors like the inputs, and ``vectors`` for t; of
    ``first.0``, ``second.1`` and so on, all of a map are given or none.
    """
    found = empty_gradients(layer, wanted)
    if "grad" in wanted:
        found["grad"] = torch.zeros_like(grad)
    inside: Named = dict(zip(("y", "u"), kept[:2], strict=True))
    inside |= zip(
        ("ga", "gz"), [rows for rows in kept[2:] if len(rows)], strict=False
    )  # or nothing
    for name in wanted & {"y", "u"}:
        found[name] = layer.by.empty(inside[name].shape, grad)
    if layer.by.layer_second(layer, grad, inside, along, found):
        return found
    others = {
        name: layer.by.SO2Map([along[f"{name}.{m}"] for m in range(len(own.weights))], own.shape)
        for name, own in layer.maps.items()
        if f"{name}.0" in along
    }
    for block in layer.blocks():
        _Second(block, grad, inside, along, others, found).run()
    return found


class _Second:
    """One block of the gradient of the gradient, the gradient of dE/de along a direction.

    That is (x', t, s', f', ...), one for each input e: a step forward along the direction. A prime
    is a derivative along it, which a name has as ``moved``. t turns the edge: W' = -W T(t), see
    :mod:`atomeq.ops.edge.rotation`.
    """

    def __init__(
        self,
        block: EdgeBlock,
        grad: Tensor,
        inside: Named,
        along: Named,
        others: dict[str, Any],
        found: Named,
    ) -> None:
        self.block, self.grad, self.along, self.found = block, grad, along, found
        self.layer, self.part, self.others = block.layer, block.part, others
        self.x, self.scale, self.envelope = block.x, block.scale, block.envelope
        self.y, self.u = inside["y"][self.part], inside["u"][self.part]
        self.ga, self.gz = (
            inside[name][self.part] if name in inside else None for name in ("ga", "gz")
        )
        self.turn = along["vectors"][self.part] if "vectors" in along else None
        self.turned = None
        if self.turn is not None:
            self.turned = torch.bmm(block.both.wigner, turning(self.turn, self.x.shape[1]))

    def run(self) -> None:
        """Go forward along the direction."""
        block, by, shape = self.block, self.layer.by, self.block.first.shape
        r, moved_r = self._rows()
        moved_scale = self._moved_scale()
        moved_z = moved_r
        if self.scale is not None:
            moved_z = by.moved_scaled(r, moved_r, self.scale, moved_scale, shape)
        moved_y = block.first.forward(moved_z)
        if "first" in self.others:
            z = r if self.scale is None else by.scaled_rows(r, self.scale, shape)
            moved_y += self.others["first"].forward(z)
        if "first_bias" in self.along:
            moved_y[:, : len(self.along["first_bias"])] += self.along["first_bias"]
        gate = by.Gate(self.y, shape)
        p, to_u = self._targets()
        ga = block.second.transposed(p) if self.ga is None else self.ga
        moved_a, to_y = gate.second(moved_y, ga)
        self._outputs(gate, moved_a, p)
        if "second" in self.others:
            to_y += gate.gradient(self.others["second"].transposed(p))
        if {"first", "x", "vectors", *RADIAL} & self.found.keys():
            self._inputs(gate.gradient(ga), r, moved_r, moved_z, moved_scale)
        if "y" in self.found:
            self.found["y"][self.part] = to_y
            self.found["u"][self.part] = 0 if to_u is None else to_u

    def _rows(self) -> tuple[Tensor, Tensor]:
        both = self.block.both
        r = both.into(self.x)
        moved = both.into(self.along["x"]) if "x" in self.along else torch.zeros_like(r)
        if self.turned is not None:
            moved -= both.into(self.x, self.turned)
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

    def _targets(self) -> tuple[Tensor, Tensor | None]:
        """Return p = f q and, if there is one, its derivative, q = W G grad."""
        self.q = self.block.target.into(self.grad)
        self.moved_q = None
        p, moved = self.q, None
        if self.turned is not None:
            self.moved_q = moved = self.block.target.into(self.grad, self.turned).neg_()
        if self.envelope is not None:
            p = p * self.envelope[:, None]
            moved = None if moved is None else moved * self.envelope[:, None]
        if "envelope" in self.along:
            through = self.q * self.along["envelope"][self.part, None]
            moved = through if moved is None else moved.add_(through)
        return p, moved

    def _outputs(self, gate: Any, moved_a: Tensor, p: Tensor) -> None:
        """Add the gradients that stem from the second map and the way back."""
        block, found, part = self.block, self.found, self.part
        if "second" in found:
            block.add_weight_gradients(moved_a, p, found, "second")
        if not found.keys() & {"grad", "envelope", "vectors"}:
            return
        u = self.u.clone()  # _leave changes it
        moved_u = block.second.forward(moved_a)
        if "second" in self.others:
            moved_u += self.others["second"].forward(gate.value())
        if "second_bias" in self.along:
            moved_u[:, : len(self.along["second_bias"])] += self.along["second_bias"]
        if "envelope" in found:
            found["envelope"][part] += torch.linalg.vecdot(self.q, moved_u)
            if self.moved_q is not None:
                found["envelope"][part] += torch.linalg.vecdot(self.moved_q, u)
        self._leave(u, moved_u)

    def _leave(self, u: Tensor, moved_u: Tensor) -> None:
        """Add the gradients of the rotation back, <f u, ...> and its derivative; both change."""
        target, found, part = self.block.target, self.found, self.part
        if self.envelope is not None:
            moved_u *= self.envelope[:, None]
        if "envelope" in self.along:
            moved_u += u * self.along["envelope"][part, None]
        if self.envelope is not None:
            u *= self.envelope[:, None]
        if "grad" in found:
            target.back(moved_u, found["grad"])
            if self.turned is not None:
                target.back(u.neg(), found["grad"], self.turned)
        if "vectors" in found:
            turn = target.torque(self.grad, moved_u)
            if self.turn is not None and self.turned is not None:
                turn -= target.turned_torque(self.grad, u, self.turned, self.turn)
            found["vectors"][part] -= turn

    def _inputs(
        self,
        gy: Tensor,
        r: Tensor,
        moved_r: Tensor,
        moved_z: Tensor,
        moved_scale: Tensor | None,
    ) -> None:
        """Add the gradients that stem from the way in, of <dE/dz, s' r + s r'> that is."""
        block, found, both = self.block, self.found, self.block.both
        if "first" in found:
            block.add_weight_gradients(moved_z, gy, found, "first")
        if not found.keys() & {"x", "vectors", *RADIAL}:
            return
        gz = block.first.transposed(gy) if self.gz is None else self.gz
        moved_gz = self.others["first"].transposed(gy) if "first" in self.others else None
        gr, moved_gr = gz, moved_gz
        if self.scale is not None:
            factors = (self.scale, moved_scale, block.first.shape)
            given = (r, moved_r, gz, moved_gz)
            gr, moved_gr, through, moved = self.layer.by.scaled_second(*given, *factors)
            if found.keys() & RADIAL:
                block.add_radial_gradients(moved, (through, self.along), found)
        if "x" in found:
            if moved_gr is not None:
                both.back(moved_gr, found["x"])
            if self.turned is not None:
                both.back(gr.neg(), found["x"], self.turned)
        if "vectors" in found:
            self._turn_inputs(gr, moved_gr)

    def _turn_inputs(self, gr: Tensor, moved_gr: Tensor | None) -> None:
        both, to_turn = self.block.both, self.found["vectors"][self.part]
        if moved_gr is not None:
            to_turn -= both.torque(self.x, moved_gr)
        if "x" in self.along:
            to_turn -= both.torque(self.along["x"], gr)
        if self.turn is not None and self.turned is not None:
            to_turn += both.turned_torque(self.x, gr, self.turned, self.turn)
