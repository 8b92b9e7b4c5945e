"""EquiHGNN: a geometric network lends its atoms to a network on the hypergraph of a molecule.

Dang et al., 2025, arXiv:2505.05650, on the layers of MHNN (arXiv:2312.13136). Hyperedges join the
atoms of a bond, a conjugated system, a ring or a functional group.

This is our default form, an energy potential. It differs from the paper on purpose (whose
form the golden tests hold the blocks to):

* the encoder is any model of the package that offers ``node_features``, on the graph of each
  structure, so no molecule knows its batch mates; the published one takes the batch for one cloud;
* hyperedges come from sanitised molecules, rings and functional groups are among them; the
  published 3D data sets held bonds alone;
* the energy is a sum over atoms and hyperedges, so it is extensive, and one atom, one bond or no
  large hyperedge are nothing special;
* convolutions are residual, activations smooth, normalisation knows no batch.

**The topology is an input.** With given hyperedges the energy is smooth in the coordinates. Where a
structure brings none they are perceived (``perceive=True``), once, where a motion starts: an Atoms
object keeps those of its first calculation, batched dynamics those of its first step, and
:func:`~atomeq.graph.hyperedges.fix_topology` rebuilds them. Two objects on either side of a bond
that breaks lie on two surfaces.
"""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import GraphBuilder, HyperGraph
from atomeq.graph.hyperedges import HYPEREDGE_TYPES
from atomeq.models.base import AtomisticModel
from atomeq.nn.hypergraph import Aggregation, HypergraphMLP, MHNNConv, MHNNSConv
from atomeq.nn.mlp import MLP
from atomeq.ops.segment.operations import segment_sum
from atomeq.typing import PropertyKey

Layer = Literal["mhnn", "mhnns", "mhnnm"]

# Without an encoder no edge is needed; this is shorter than any bond.
_NO_GEOMETRY = 0.5  # Å


class EquiHGNN(AtomisticModel):
    """Hypergraph network over a geometric encoder, with conservative forces.

    Args:
        encoder: A model with ``node_features``; None leaves the geometry out, and only the
            hypergraph and the elements count.
        layer: ``mhnn``: one convolution shared by all layers; ``mhnnm``: one for each layer;
            ``mhnns``: a shared one without features of hyperedges.
        num_layers: Convolutions.
        hidden_channels: Channels of atoms and hyperedges.
        aggregate: How messages are gathered.
        perceive: Perceive hyperedges from the coordinates of structures that bring none.
        num_elements: Atomic numbers below this are embedded.
    """

    def __init__(
        self,
        encoder: AtomisticModel | None = None,
        *,
        layer: Layer = "mhnnm",
        num_layers: int = 3,
        hidden_channels: int = 128,
        aggregate: Aggregation = "mean",
        perceive: bool = True,
        num_elements: int = 119,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.layer: Layer = layer
        self.num_layers = num_layers
        self.hidden_channels = hidden_channels
        self.aggregate: Aggregation = aggregate
        self.perceive = perceive
        self.num_elements = num_elements
        self.told = encoder.told if encoder is not None else frozenset()
        self.cutoff = encoder.cutoff if encoder is not None else _NO_GEOMETRY

        self.embedding = nn.Embedding(num_elements, hidden_channels)
        if encoder is not None:
            # Atoms alone are taken from it: what makes energies of them gets no gradient.
            encoder.freeze_readouts()
            self.projection = nn.Linear(encoder.node_channels, hidden_channels)
        mlp = partial(HypergraphMLP, activation=nn.functional.silu)
        if layer == "mhnns":
            self.convolutions = nn.ModuleList(
                [MHNNSConv(hidden_channels, aggregate=aggregate, mlp=mlp)]
            )
        else:
            n_convolutions = num_layers if layer == "mhnnm" else 1
            self.convolutions = nn.ModuleList(
                MHNNConv(hidden_channels, aggregate=aggregate, mlp=mlp)
                for _ in range(n_convolutions)
            )
            self.type_embedding = nn.Embedding(len(HYPEREDGE_TYPES), hidden_channels)
            self.hyperedge_norm = nn.LayerNorm(hidden_channels)
            self.hyperedge_energy = MLP((hidden_channels, hidden_channels, 1), zero_output=True)
        self.atom_norm = nn.LayerNorm(hidden_channels)
        self.energy = MLP((hidden_channels, hidden_channels, 1), zero_output=True)

    def graph_builder(self) -> GraphBuilder:
        """Return the builder of edges for the encoder and of hyperedges."""
        return HyperGraph(self.cutoff, perceive=self.perceive)

    @property
    def node_channels(self) -> int:
        """Channels of :meth:`node_features`."""
        return self.hidden_channels

    def node_features(self, graph: AtomGraph) -> Tensor:
        """Return the atoms after the last convolution, (n_atoms, hidden_channels)."""
        return self._convolve(graph)[0]

    def forward(self, graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        """Return per-atom ``energies`` (n_atoms,), in the model's own scale, and ``features``.

        Raises:
            ValueError: The graph was made without hyperedges.
        """
        x, e = self._convolve(graph)
        energies, features = self.energy.with_hidden(x)
        energies = energies[:, 0]
        if e is None:
            return {"energies": energies, "features": features}
        # The energy of a hyperedge is shared out among its atoms.
        atom, edge = graph.hyperedge_index
        orders = segment_sum(torch.ones_like(edge, dtype=x.dtype), edge, e.shape[0])
        shares = self.hyperedge_energy(e)[:, 0] / orders.clamp(min=1)
        energies = energies + segment_sum(shares[edge], atom, x.shape[0])
        return {"energies": energies, "features": features}

    def _convolve(self, graph: AtomGraph) -> tuple[Tensor, Tensor | None]:
        if "num_hyperedges" not in graph:
            raise ValueError(
                "this graph has no hyperedges; make it with the model's graph_builder(), "
                "HyperGraph(cutoff)"
            )
        x = self.with_state(self.embedding(graph.atomic_numbers), graph)  # (n_atoms, C)
        if self.encoder is not None:  # whose embedding has channels of its own
            encoded = self.encoder.node_features(graph.replace(electronic_state=None))
            x = x + self.projection(encoded)
        incidence = graph.hyperedge_index  # (2, n_incidences)
        if self.layer == "mhnns":
            first, n_hyperedges = x, graph.hyperedge_type.shape[0]
            for _ in range(self.num_layers):
                update = self.convolutions[0](self.atom_norm(x), first, incidence, n_hyperedges)
                x = x + update
            return x, None
        e = self.type_embedding(graph.hyperedge_type)  # (n_hyperedges, C)
        for k in range(self.num_layers):
            convolution = self.convolutions[k % len(self.convolutions)]
            dx, de = convolution(self.atom_norm(x), self.hyperedge_norm(e), incidence)
            x, e = x + dx, e + de
        return x, e
