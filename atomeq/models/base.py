"""AtomisticModel: what every model of the package promises to the potential that wraps it."""

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import GraphBuilder, RadiusGraph
from atomeq.typing import PropertyKey


class AtomisticModel(nn.Module):
    """A graph network over atoms.

    A subclass returns what it can compute itself and names it in ``outputs``; the potential derives
    the rest. A conservative model returns per-atom ``energies`` alone, and forces and stress are
    their derivatives. Values are in the model's own scale: shift and unit belong to
    :class:`~atomeq.potential.references.AtomicReferences`.

    Every constructor argument is kept as an attribute of the same name, so that :meth:`config`
    can write the model down and a checkpoint can build it again.

    Attributes:
        cutoff: Radius beyond which two atoms do not see each other, Å.
        outputs: What :meth:`forward` returns.
        exempt_laws: Laws of physics the method cannot keep by construction, and why. The names are
            those of tests/physics without ``test_``; there an exempted law must really fail.
    """

    cutoff: float
    outputs: frozenset[PropertyKey] = frozenset({"energies"})
    exempt_laws: Mapping[str, str] = MappingProxyType({})

    def graph_builder(self) -> GraphBuilder:
        """Return the builder of the graphs this model was made for: all pairs within the cutoff."""
        return RadiusGraph(self.cutoff)

    def forward(self, graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        """Compute the model's outputs for a batch of structures.

        Args:
            graph: Structures with edges, as :meth:`graph_builder` makes them. Positions and cell
                are float64; the model casts what it derives from them to its own dtype.

        Returns:
            ``energies`` (n_atoms,) and whatever else ``outputs`` names.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward()")

    def config(self) -> dict[str, Any]:
        """Return ``{"class_path": ..., "init_args": {...}}``, the node that builds this model.

        A model inside a model stands there as a node of its own.
        """
        names = [name for name in inspect.signature(type(self).__init__).parameters][1:]
        values = {name: getattr(self, name) for name in names}
        for name, value in values.items():
            if isinstance(value, AtomisticModel):
                values[name] = value.config()
        return {
            "class_path": f"{type(self).__module__}.{type(self).__qualname__}",
            "init_args": values,
        }

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the network computes in, that of its parameters."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device
