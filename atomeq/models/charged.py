"""Any model of the package, told the total charge and the spin multiplicity of each structure.

One vector for each charge and one for each multiplicity is added to the embedding of every atom, as
SpookyNet (Unke et al., Nature Communications 12, 7273 (2021), arXiv:2105.00304) starts; there they
are weighed by attention over the atoms, here each atom gets the whole, so that separated neutral
fragments still add up. The vectors start at zero: a model that is given them computes what it
computed without, until it is trained.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.electrons import charge_of, multiplicity_of
from atomeq.models.base import AtomisticModel, Wrapper
from atomeq.typing import PropertyKey


class Charged(Wrapper):
    """A model with vectors for total charges and multiplicities.

    Args:
        model: Any model of the package; its cutoff, graph and outputs are those of the whole.
        charges: Total charges that it is made for, e; none are told to it if there are none.
        multiplicities: The same of 2S + 1. A structure that says nothing has the lowest possible.

    Raises:
        ValueError: There is nothing to tell.
    """

    def __init__(
        self,
        model: AtomisticModel,
        *,
        charges: Sequence[int] = (-1, 0, 1),
        multiplicities: Sequence[int] = (1, 2, 3),
    ) -> None:
        super().__init__(model)
        if not charges and not multiplicities:
            raise ValueError("give charges or multiplicities that the model is to be told of")
        self.charges, self.multiplicities = list(charges), list(multiplicities)
        self.exempt_laws = dict(model.exempt_laws)  # a view of one could not be copied
        self.told = frozenset(
            name for name, known in (("charge", charges), ("spin", multiplicities)) if known
        )
        channels = model.embedding_channels
        self.charge_embedding = _zeros(len(self.charges), channels)
        self.multiplicity_embedding = _zeros(len(self.multiplicities), channels)

    def forward(self, graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        """Return the outputs of the model inside.

        Raises:
            ValueError: A structure has a charge or multiplicity that is not among those known.
        """
        return self.model(self._telling(graph))

    @property
    def sphere_shape(self) -> tuple[int, int]:
        """Degree and channels of the ``sphere_features`` of the model inside."""
        return self.model.sphere_shape

    def node_features(self, graph: AtomGraph) -> Tensor:
        """Return the features of the model inside, (n_atoms, node_channels)."""
        return self.model.node_features(self._telling(graph))

    def _telling(self, graph: AtomGraph) -> AtomGraph:
        state = graph.pos.new_zeros(graph.n_graphs, 1).to(self.dtype)
        if self.charge_embedding is not None:
            index = _index(charge_of(graph), self.charges, "total charge")
            state = state + self.charge_embedding(index)
        if self.multiplicity_embedding is not None:
            index = _index(multiplicity_of(graph), self.multiplicities, "multiplicity")
            state = state + self.multiplicity_embedding(index)
        return graph.replace(electronic_state=state)  # (n_graphs, C)


def _zeros(n_rows: int, channels: int) -> nn.Embedding | None:
    if not n_rows:
        return None
    embedding = nn.Embedding(n_rows, channels)
    nn.init.zeros_(embedding.weight)
    return embedding


def _index(values: Tensor, known: Sequence[int], what: str) -> Tensor:
    """Return the row of each value, (n_graphs,)."""
    same = values[:, None] == values.new_tensor([float(value) for value in known])
    if not bool(same.any(dim=1).all()):
        k = int(torch.nonzero(~same.any(dim=1))[0])
        raise ValueError(
            f"structure {k} of the batch has {what} {float(values[k]):g}, and this model was made "
            f"for {', '.join(map(str, known))}; train one with more of them"
        )
    return same.int().argmax(dim=1)
