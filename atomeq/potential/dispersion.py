"""D3(BJ): Grimme's dispersion correction with Becke and Johnson's damping, by torch-dftd.

S. Grimme, S. Ehrlich and L. Goerigk, J. Comput. Chem. 32, 1456 (2011).
"""

from typing import Any

import torch
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import RadiusGraph
from atomeq.potential.terms import EnergyTerm
from atomeq.units import BOHR

_DAMPING = "bj"
_TABLES = ("c6ab", "r0ab", "rcov", "r2r4")


class DispersionD3(EnergyTerm):
    """Two-body D3 dispersion, smooth at its cutoff, with a neighbour list of its own.

    Args:
        functional: Of the data the potential was trained on, as torch-dftd names it: ``"pbe"``.
        cutoff: Å. Energies beyond are left out; 20 Å keeps a few meV per atom of a metal.
        coordination_cutoff: Of the coordination numbers, Å.

    Raises:
        ImportError: torch-dftd is not installed.
        ValueError: The functional is unknown or a cutoff is not positive.
    """

    c6ab: Tensor
    r0ab: Tensor
    rcov: Tensor
    r2r4: Tensor

    def __init__(
        self, functional: str = "pbe", *, cutoff: float = 20.0, coordination_cutoff: float = 12.0
    ) -> None:
        super().__init__()
        if not 0 < coordination_cutoff <= cutoff:
            raise ValueError(
                f"cutoffs must be positive, and that of the coordination numbers the shorter; got "
                f"cutoff {cutoff!r} and coordination_cutoff {coordination_cutoff!r}"
            )
        self.functional = functional
        self.cutoff, self.coordination_cutoff = float(cutoff), float(coordination_cutoff)
        self._parameters_of_functional = _parameters(functional)
        tables = _load_tables()
        for name in _TABLES:
            self.register_buffer(name, tables[name], persistent=False)
        self._builder = RadiusGraph(self.cutoff)

    def forward(self, graph: AtomGraph) -> Tensor:
        """Return the energy of each atom, (n_atoms,), eV: half of every pair's."""
        from torch_dftd.functions.dftd3 import d3_autoev, edisp

        numbers = graph.atomic_numbers
        if len(numbers) and int(numbers.max()) >= len(self.rcov):
            raise ValueError(
                f"D3 knows elements up to {len(self.rcov) - 1}, and the structure has "
                f"{int(numbers.max())}"
            )
        found = self._builder(graph.replace(pos=graph.pos.detach(), cell=graph.cell.detach()))
        wide = graph.replace(edge_index=found.edge_index, cell_offsets=found.cell_offsets)
        if wide.n_edges == 0:
            return graph.pos.new_zeros(graph.n_atoms, dtype=torch.float64)
        lengths = wide.edge_vectors().to(torch.float64).norm(dim=1) / BOHR
        tables: dict[str, Any] = {name: getattr(self, name) for name in _TABLES}
        energies = edisp(
            numbers,
            lengths,
            wide.edge_index.flip(0),
            **tables,
            params=self._parameters_of_functional,
            cutoff=self.cutoff / BOHR,
            cnthr=self.coordination_cutoff / BOHR,
            # The sum over the edges of a "structure" is the one over the edges into an atom.
            batch=numbers,
            batch_edge=wide.edge_index[1],
            cell=numbers,
            cutoff_smoothing="poly",
            damping=_DAMPING,
            bidirectional=True,
        )
        return d3_autoev * energies


def _parameters(functional: str) -> dict[str, float]:
    try:
        from torch_dftd.dftd3_xc_params import get_dftd3_default_params
    except ImportError as error:
        raise ImportError(
            "D3 dispersion needs torch-dftd: pip install atomeq[dispersion]"
        ) from error
    try:
        return get_dftd3_default_params(damping=_DAMPING, xc=functional)
    except ValueError as error:
        raise ValueError(
            f"torch-dftd has no D3(BJ) parameters for the functional {functional!r}; names are in "
            "lower case, such as 'pbe', 'b3-lyp' or 'tpss'"
        ) from error


def _load_tables() -> dict[str, Tensor]:
    from torch_dftd.nn.dftd3_module import DFTD3Module

    module = DFTD3Module(params={}, dtype=torch.float64)
    return {name: getattr(module, name) for name in _TABLES}
