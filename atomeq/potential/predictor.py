"""Predictor: a model with its references, its graphs and the elements it knows.

A :class:`~atomeq.potential.potential.Potential` makes energies, forces and stresses of it, a
:class:`~atomeq.potential.scalar.ScalarPredictor` any other number of a structure.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import AtomisticModel
from atomeq.potential.references import AtomicReferences
from atomeq.potential.untrusted import refuse_meta_device
from atomeq.typing import Precision, PropertyKey


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast, where it is on, is off: results do not depend on it."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class Predictor(nn.Module):
    """What potentials and predictors of scalars share.

    Args:
        model: The network.
        references: Shift per element and scale; none leaves the network's output as it is.

    Attributes:
        name: What messages call it: as it was given to what loaded it, or the class of its model.
        precision: How coarse the operands of its tensor products may be on a GPU, see
            :mod:`atomeq.ops.precision`; None leaves it to torch's own setting. It is this
            predictor's alone, and goes with it to where it is saved.
    """

    def __init__(self, model: AtomisticModel, references: AtomicReferences | None = None) -> None:
        super().__init__()
        self.model = model
        self.references = references if references is not None else AtomicReferences()
        self.name = type(model).__name__
        self.precision: Precision | None = None
        self._builder = model.graph_builder()

    def build_graph(self, structures: Any) -> AtomGraph:
        """Build the graph of one structure or a sequence of them, on this predictor's device.

        Args:
            structures: ``ase.Atoms``, pymatgen ``Structure``/``Molecule``, :class:`AtomGraph`, or a
                sequence of those.

        Returns:
            A batch with float64 positions and cell.

        Raises:
            StructureError: A structure is empty, has non-finite numbers or an unknown element.
        """
        refuse_meta_device()
        graph = self._builder(structures)
        self.check_elements(graph)
        return graph.to(self.device)

    def check_elements(self, graph: AtomGraph) -> None:
        """Raise ``ValueError`` naming the first atom whose element is not known here."""
        numbers = graph.atomic_numbers
        unknown = ~self.references.known.to(numbers.device)[numbers]
        if bool(unknown.any()):
            atom = int(torch.nonzero(unknown)[0])
            known = ", ".join(str(z) for z in self.elements)
            raise ValueError(
                f"atom {atom} (structure {int(graph.batch[atom])} of the batch) has atomic number "
                f"{int(numbers[atom])}, which this potential does not know; it knows {known}"
            )

    def forward(
        self,
        graph: AtomGraph,
        properties: Sequence[PropertyKey],
        *,
        create_graph: bool | None = None,
    ) -> dict[PropertyKey, Tensor]:
        """Compute properties of a batch of structures.

        Args:
            graph: As :meth:`build_graph` returns it.
            properties: What to compute.
            create_graph: Keep derivatives differentiable; by default in training mode only.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward()")

    @property
    def conservative(self) -> bool:
        """Whether forces are the derivative of the energy."""
        return False

    @property
    def gives_stress(self) -> bool:
        """Whether there is a stress."""
        return False

    @property
    def cutoff(self) -> float:
        """The model's cutoff, Å."""
        return self.model.cutoff

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers this was made for."""
        return self.references.elements

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the network computes in; sums are float64 regardless."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.device
