"""ScalarPredictor: a model becomes a dipole moment, a gap, or any other number of a molecule.

It is no potential: it has neither energy nor forces, and whatever wants those refuses it.
"""

from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor

from atomeq.data.targets import ScalarTarget
from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import AtomisticModel
from atomeq.ops.precision import use_precision
from atomeq.ops.segment.operations import segment_mean, segment_sum
from atomeq.potential.predictor import Predictor, full_precision
from atomeq.potential.references import AtomicReferences
from atomeq.typing import PropertyKey


class ScalarPredictor(Predictor):
    """One scalar of each structure: the sum or mean of atomic parts, or what the model reads out.

    Args:
        model: The network. Its per-atom ``energies`` are parts of the scalar here; one that returns
            ``scalar`` has a readout of its own.
        target: What is predicted.
        references: Shift per element, scale and offset, in the target's unit.

    Example:
        >>> gap = load_predictor("runs/qm9_egnn/potential")  # doctest: +SKIP
        >>> gap(gap.build_graph(ase.build.molecule("C6H6")))["scalar"]  # doctest: +SKIP
    """

    def __init__(
        self,
        model: AtomisticModel,
        target: ScalarTarget,
        references: AtomicReferences | None = None,
    ) -> None:
        super().__init__(model, references)
        self.target = target

    def forward(
        self,
        graph: AtomGraph,
        properties: Sequence[PropertyKey] = ("scalar",),
        *,
        create_graph: bool | None = None,
    ) -> dict[PropertyKey, Tensor]:
        """Compute the scalar of each structure of a batch.

        Args:
            graph: As :meth:`build_graph` returns it.
            properties: Only ``scalar``.
            create_graph: Nothing is derived here, so it has no effect.

        Returns:
            ``scalar`` (n_graphs,), float64, in the target's unit.

        Raises:
            ValueError: Anything else is asked for.
        """
        other = [key for key in properties if key != "scalar"]
        if other:
            raise ValueError(
                f"this predicts {self.target.name} [{self.target.unit}] as 'scalar' and is no "
                f"potential: it has no {other[0]}"
            )
        self.check_electrons(graph)
        full = nullcontext() if self.training else full_precision(self.device)
        with full, use_precision(self.precision):
            outputs = self.model(graph)
        batch, n_graphs = graph.batch, graph.n_graphs
        if "scalar" in outputs:
            shift = self.references.shift[graph.atomic_numbers]
            scalar = self.references.scale * outputs["scalar"].to(shift.dtype)
            scalar = scalar + segment_sum(shift, batch, n_graphs)
        else:
            pool = segment_sum if self.target.readout == "sum" else segment_mean
            parts = self.references(outputs["energies"], graph.atomic_numbers)
            scalar = pool(parts, batch, n_graphs)
        return {"scalar": scalar + self.references.offset}
