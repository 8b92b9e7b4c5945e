"""Products of an atom's features with themselves, with trained weights of its element: MACE's."""

import torch
from torch import Tensor, nn

from atomeq.nn.irreps import SCALAR, Features, Irrep, Irreps, IrrepsLinear
from atomeq.ops.coupling.symmetric_contraction import symmetric_contraction
from atomeq.ops.coupling.symmetric_contraction_basis import (
    published_columns,
    reduce_weights,
    symmetric_basis,
)


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
        self.lmax = len(inputs) - 1
        self.all_couplings = all_couplings
        channels = inputs[SCALAR]
        table = published_columns if all_couplings else symmetric_basis
        self.weights = nn.ModuleDict()
        for irrep in outputs:
            own = nn.ParameterList()
            for n in range(1, order + 1):
                n_columns = table(self.lmax, irrep.l, n).shape[2]
                weight = torch.randn(n_species, n_columns, channels) / max(n_columns, 1)
                own.append(nn.Parameter(weight))
            self.weights[str(irrep.l)] = own
        self.n_species = n_species
        self.linear = IrrepsLinear(outputs, outputs)

    def forward(self, x: Features, species: Tensor) -> Features:
        """Map the sums of the atoms, whose elements are ``species`` (n_atoms,)."""
        rows = torch.cat([x[irrep] for irrep in self.inputs], dim=1)  # (n_atoms, n_sph, C)
        weights = {int(l): list(some) for l, some in self.weights.items()}  # type: ignore[call-overload]
        if self.all_couplings:
            weights = {
                l: [reduce_weights(w, self.lmax, l, n) for n, w in enumerate(some, start=1)]
                for l, some in weights.items()
            }
        if self.n_species == 1:
            species = torch.zeros_like(species)
        products = symmetric_contraction(rows, weights, species)
        return self.linear({natural(l): y for l, y in products.items()})


def natural(l: int) -> Irrep:
    """Return the irrep of degree l that harmonics have, of parity (-1)^l."""
    return Irrep(l, (-1) ** l)
