"""FrechetCell: the coordinates in which a cell relaxes together with its atoms.

Atoms are described by where they would be in the undeformed cell, the cell by N log F, N the number
of atoms and F the deformation: cell = reference · Fᵀ, positions = undeformed · Fᵀ. Forces on these
coordinates are exact derivatives of the enthalpy, so an optimizer may treat them like atoms. They
are those of ASE's FrechetCellFilter, and so is what counts as converged.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from atomeq.graph.atom_graph import MIN_VOLUME, AtomGraph
from atomeq.graph.convert import StructureError

StrainMask = tuple[tuple[bool, bool, bool], tuple[bool, bool, bool], tuple[bool, bool, bool]]

_MAX_LOG_STRAIN = 1.5  # a cell that became 4.5 times as long or short is no relaxation


@dataclass(frozen=True)
class FrechetCell:
    """Which deformations of the cell relax, and against which pressure.

    Args:
        pressure: eV/Å³; ``5 * atomeq.units.GPA`` is 5 GPa.
        mask: Components of the strain that may change, 3 x 3 and symmetric; all by default.
        hydrostatic: Keep the shape.
        constant_volume: Keep the volume.

    Raises:
        ValueError: The mask is not symmetric, or nothing could change.
    """

    pressure: float = 0.0
    mask: StrainMask | None = None
    hydrostatic: bool = False
    constant_volume: bool = False

    def __post_init__(self) -> None:
        if self.hydrostatic and self.constant_volume:
            raise ValueError("hydrostatic and constant_volume together leave nothing to relax")
        if self.mask is not None:
            mask = torch.tensor(self.mask)
            if mask.shape != (3, 3) or not torch.equal(mask, mask.T) or not mask.any():
                raise ValueError(
                    f"mask must be a symmetric 3 x 3 table of booleans with some True, not "
                    f"{self.mask!r}"
                )

    def check(self, graph: AtomGraph) -> None:
        """Refuse structures without a volume that could change.

        Raises:
            StructureError: One is not periodic in three directions.
        """
        open_ = (
            torch.nonzero(~graph.pbc.all(dim=1) | (graph.volume() < MIN_VOLUME)).flatten().tolist()
        )
        if open_:
            raise StructureError(
                "a cell can relax only where it is periodic in three directions and has a volume; "
                f"this one has pbc {graph.pbc[open_[0]].tolist()}",
                index=open_[0],
            )

    def deformation(self, coordinates: Tensor, graph: AtomGraph) -> Tensor:
        """Return F of cell coordinates: (n_graphs, 3, 3) to (n_graphs, 3, 3).

        Args:
            coordinates: Of the cells, (n_graphs, 3, 3).
            graph: The undeformed structures.
        """
        change = torch.linalg.matrix_exp(self._log(coordinates, graph)) - _eye(coordinates)
        return _eye(coordinates) + self._masked(change)

    def place(
        self, graph: AtomGraph, undeformed: Tensor, coordinates: Tensor, reference: Tensor
    ) -> AtomGraph:
        """Return the graph at new coordinates.

        Args:
            graph: The structures.
            undeformed: Positions in the reference cell, (n_atoms, 3), Å.
            coordinates: N log F, (n_graphs, 3, 3).
            reference: Cells where F is 1, (n_graphs, 3, 3), Å.
        """
        transposed = self.deformation(coordinates, graph).transpose(1, 2)
        pos = torch.bmm(undeformed[:, None], transposed[graph.batch])[:, 0]
        return graph.replace(pos=pos, cell=torch.bmm(reference, transposed))

    def forces(self, graph: AtomGraph, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Return minus the gradient of the enthalpy.

        Args:
            graph: Deformed structures with forces and stress.
            coordinates: Of their cells, (n_graphs, 3, 3).

        Returns:
            On the undeformed positions (n_atoms, 3), eV/Å, and on the cell's coordinates
            (n_graphs, 3, 3), eV.
        """
        log = self._log(coordinates, graph)
        deformation = self.deformation(coordinates, graph)
        forces = torch.bmm(graph.forces[:, None], deformation[graph.batch])[:, 0]
        virial = -graph.volume()[:, None, None] * (graph.stress + self.pressure * _eye(log))
        if self.hydrostatic:
            virial = _trace(virial) / 3 * _eye(log)
        virial = self._masked(virial)
        gradient = torch.linalg.solve(deformation.transpose(1, 2), virial, left=False)
        # The adjoint of the derivative of exp at L is its derivative at Lᵀ, which stands in the
        # upper right of the exponential of [[Lᵀ, G], [0, Lᵀ]].
        block = log.new_zeros(len(log), 6, 6)
        block[:, :3, :3] = block[:, 3:, 3:] = log.transpose(1, 2)
        block[:, :3, 3:] = gradient
        cell_forces = torch.linalg.matrix_exp(block)[:, :3, 3:]
        if self.constant_volume:
            cell_forces = cell_forces - _trace(cell_forces) / 3 * _eye(log)
        return forces, cell_forces / graph.natoms[:, None, None]

    def exploded(self, coordinates: Tensor, graph: AtomGraph) -> Tensor:
        """Return which of ``coordinates`` deform a cell of ``graph`` beyond reason, (n_graphs,)."""
        return self._log(coordinates, graph).abs().flatten(1).amax(dim=1) > _MAX_LOG_STRAIN

    def _log(self, coordinates: Tensor, graph: AtomGraph) -> Tensor:
        # Beyond the bound the structure has exploded; its exponential shall stay a number.
        log = coordinates / graph.natoms[:, None, None]
        return log.clamp(-10 * _MAX_LOG_STRAIN, 10 * _MAX_LOG_STRAIN)

    def _masked(self, strain: Tensor) -> Tensor:
        if self.mask is None:
            return strain
        return strain * torch.tensor(self.mask, dtype=strain.dtype, device=strain.device)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(3, dtype=like.dtype, device=like.device)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
