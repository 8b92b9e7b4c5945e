"""Additive terms: known physics added to a network's energy, saved and differentiated with it."""

import inspect
from typing import Any, Self

from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.registry import Registry, path_of


class EnergyTerm(nn.Module):
    """An energy per atom that is added to a potential's own.

    A subclass keeps each constructor argument under its name, computes in float64 from the graph's
    positions, and holds no persistent state: its arguments are all there is to save.

    Attributes:
        recordable: Whether a CUDA graph can be recorded of :meth:`forward`: it waits for no answer
            of a GPU, makes no tensor whose size depends on one, and uses the graph's own edges.
        receptive_depth: As of :class:`~atomeq.models.base.AtomisticModel`.
    """

    recordable: bool = False
    receptive_depth: int | None = None

    def forward(self, graph: AtomGraph) -> Tensor:
        """Return energies (n_atoms,), eV, float64, differentiable by positions and strain."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Return ``{"class_path": ..., "init_args": {...}}``, the node that builds this term."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {
            "class_path": path_of(type(self)),
            "init_args": {name: getattr(self, name) for name in names},
        }

    def _apply(self, fn, recurse: bool = True) -> Self:
        # Follow the module to its device, never to its dtype.
        for name, table in self.named_buffers(recurse=False):
            setattr(self, name, table.to(fn(table).device))
        return self


TERMS = Registry("term", EnergyTerm, package="atomeq.potential", group="atomeq.terms")
