"""The gated update in raw functions: products of matrices around a gate that kernels compute.

Inside, features lie degree by degree, (n_sph, n_atoms, channels): a degree is then one matrix, and
its map one product, where (n_atoms, n_sph, channels) would need a small one for each atom.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from atomeq.ops.atoms.reference import Linear


class Update(NamedTuple):
    """What comes before the second map.

    Attributes:
        by: Kernels with ``gate`` and ``gate_gradient``.
        first: Weight (lmax + 1, hidden, channels) and bias of the map of each degree.
        gates: Weight (lmax * hidden, channels) and bias of the gates.
    """

    by: ModuleType
    first: Linear
    gates: Linear

    def value(self, x: Tensor, second: Linear) -> Tensor:
        """Return the update of ``x`` (n_atoms, n_sph, channels)."""
        rows, gates = self._before(x)
        return _by_atoms(_mapped(self.by.gate(rows, gates), second[0].mT, second[1]))

    def gradient(self, x: Tensor, second: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient by ``x``; what the gate was given is computed again."""
        rows, gates = self._before(x)
        grad = _mapped(_by_degrees(grad), second)
        to_rows, to_gates = self.by.gate_gradient(rows, gates, grad)
        to_x = _mapped(to_rows, self.first[0])
        to_x[0].addmm_(to_gates, self.gates[0])
        return _by_atoms(to_x)

    def _before(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the gate is given: rows (n_sph, n_atoms, hidden), and gates."""
        x = _by_degrees(x)
        gates = torch.nn.functional.linear(x[0], *self.gates)
        return _mapped(x, self.first[0].mT, self.first[1]), gates


def _by_degrees(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()


_by_atoms = _by_degrees  # the way back is the same


def _mapped(rows: Tensor, matrices: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the rows of each degree times its matrix, with a bias on l = 0."""
    found = rows.new_empty(*rows.shape[:2], matrices.shape[2])
    for l, matrix in enumerate(matrices.unbind(0)):
        part = slice(l * l, (l + 1) ** 2)
        torch.mm(rows[part].flatten(0, 1), matrix, out=found[part].flatten(0, 1))
    if bias is not None:
        found[0] += bias
    return found
