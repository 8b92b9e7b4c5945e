"""Products of an atom's features with themselves, with trained weights of its element: MACE's."""

import torch
from torch import Tensor, nn

from atomeq.nn.irreps import SCALAR, Features, Irrep, Irreps, IrrepsLinear
from atomeq.ops.coupling.symmetric_contraction import symmetric_contraction
from atomeq.ops.coupling.symmetric_contraction_basis import (
    SymmetricForm,
    published_columns,
    reduce_weights,
    symmetric_basis,
)
from atomeq.traces import known_to_the_host


class SymmetricProduct(nn.Module):
    """The symmetric contraction of an atom's sums, and a linear map.

    Args:
        inputs: Irreps that are multiplied, of degrees 0 to lmax.
        outputs: Irreps that are wanted.
        order: Number of factors of the highest products.
        n_species: Number of elements with weights of their own; 1 for the same ones.
        all_couplings: Have weights for all published couplings, not for independent ones.
    """

    def __init__(
        self,
        inputs: Irreps,
        outputs: Irreps,
        order: int,
        n_species: int,
        *,
        all_couplings: bool = False,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.all_couplings = all_couplings
        self.form = SymmetricForm(len(inputs) - 1, tuple(irrep.l for irrep in outputs), order)
        table = published_columns if all_couplings else symmetric_basis
        numbers = [table(self.form.lmax, l, n).shape[2] for l, n in self.form.products()]
        blocks = [torch.randn(n_species, n, inputs[SCALAR]) / max(n, 1) for n in numbers]
        self.weights = nn.Parameter(torch.cat(blocks, dim=1))  # (n_species, n_columns, C)
        self.linear = IrrepsLinear(outputs, outputs)

    def forward(self, x: Features, species: Tensor) -> Features:
        """Map the sums of the atoms, whose elements are ``species`` (n_atoms,)."""
        if len(self.weights) == 1:
            species = torch.zeros_like(species)
        weights = self.weights
        if self.all_couplings:
            if known_to_the_host(species):  # of 89 elements a crystal has a few
                present, species = species.unique(return_inverse=True)
                weights = weights.index_select(0, present)
            weights = reduce_weights(weights, self.form)
        rows = torch.cat([x[irrep] for irrep in self.inputs], dim=1)  # (n_atoms, n_sph, C)
        rows = rows.to(weights.dtype)  # autocast gives others
        _, degrees, order = self.form
        products = symmetric_contraction(rows, weights, species, degrees=degrees, order=order)
        parts = products.split([2 * l + 1 for l in degrees], dim=1)
        return self.linear({natural(l): y for l, y in zip(degrees, parts, strict=True)})


def natural(l: int) -> Irrep:
    """Return the irrep of degree l that harmonics have, of parity (-1)^l."""
    return Irrep(l, (-1) ** l)
