"""Predictor: a model with its references, its graphs and the elements it knows.

A :class:`~atomeq.potential.potential.Potential` makes energies, forces and stresses of it, a
:class:`~atomeq.potential.scalar.ScalarPredictor` any other number of a structure.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.electrons import charge_of, lowest_multiplicity, multiplicity_of
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
        ignored: Of ``charge`` and ``spin`` what is left out of account where the model knows
            nothing of it; a structure that carries it is refused otherwise.
    """

    def __init__(self, model: AtomisticModel, references: AtomicReferences | None = None) -> None:
        super().__init__()
        self.model = model
        self.references = references if references is not None else AtomicReferences()
        self.name = type(model).__name__
        self.precision: Precision | None = None
        self.ignored: frozenset[str] = frozenset()
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
        """Raise ``ValueError`` naming the first atom whose element is not known here.

        And the first structure with a charge or multiplicity: see :meth:`check_electrons`.
        """
        self.check_electrons(graph)
        numbers = graph.atomic_numbers
        unknown = ~self.references.known.to(numbers.device)[numbers]
        if bool(unknown.any()):
            atom = int(torch.nonzero(unknown)[0])
            known = ", ".join(str(z) for z in self.elements)
            raise ValueError(
                f"atom {atom} (structure {int(graph.batch[atom])} of the batch) has atomic number "
                f"{int(numbers[atom])}, which this potential does not know; it knows {known}"
            )

    def ignore(self, names: Iterable[str]) -> None:
        """Compute from now on what ``charge`` or ``spin`` are given with as if they were not.

        Raises:
            ValueError: There is no such thing to ignore.
        """
        wrong = [name for name in names if name not in ("charge", "spin")]
        if wrong:
            raise ValueError(f"what can be ignored is charge and spin, not {wrong[0]!r}")
        self.ignored = frozenset(names)

    def check_electrons(self, graph: AtomGraph) -> None:
        """Refuse a charge or multiplicity that the model would never hear of.

        Raises:
            ValueError: A structure has a total charge, or another multiplicity than the lowest.
        """
        if vars(graph).keys().isdisjoint(("charge", "multiplicity")):
            return
        found = {
            "charge": (charge_of(graph), charge_of(graph) != 0),
            "spin": (multiplicity_of(graph), multiplicity_of(graph) != lowest_multiplicity(graph)),
        }
        for name, (values, carried) in found.items():
            if name not in self.model.told | self.ignored and bool(carried.any()):
                k = int(torch.nonzero(carried)[0])
                what = "total charge" if name == "charge" else "multiplicity"
                raise ValueError(
                    f"structure {k} has {what} {float(values[k]):g}, of which potential "
                    f"{self.name!r} knows nothing: the energy would be another state's. Take a "
                    f"potential that is told of it (Charged), or ask for the energy without it: "
                    f"AtomeqCalculator(..., ignore=[{name!r}]), potential.ignore([{name!r}]), "
                    f"--ignore {name}"
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
    def learnable(self) -> tuple[PropertyKey, ...]:
        """What it gives that there are labels of."""
        return ("scalar",)

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
