"""MHNN and EquiHGNN as published, weight-compatible with the reference code.

MHNN (arXiv:2312.13136) works on the hypergraph of a molecule alone; EquiHGNN lets an EGNN update
the atoms first. :class:`~atomeq.models.equihgnn.EquiHGNN` is our default form. Kept as published:

* the EGNN takes the whole batch for one cloud of points: what a molecule gives depends on its batch
  mates, and fewer than 16 atoms in the batch are an error;
* coordinates end there, so its last update of them is never used, though it has weights.

Mended: a batch whose last molecules have no hyperedge of more than two atoms is no error here.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from atomeq.nn.hypergraph import Aggregation, HypergraphMLP, MHNNConv, MHNNSConv, Normalization
from atomeq.ops.segment.operations import segment_sum
from atomeq.typing import Positions

#: Number of values of OGB's nine atom features.
OGB_FEATURES = (119, 5, 12, 12, 10, 6, 6, 2, 2)
NUM_HYPEREDGE_TYPES = 6

Variant = Literal["mhnn", "mhnns", "mhnnm"]
_ACTIVATIONS = {"Id": nn.Identity, "relu": nn.ReLU, "prelu": nn.PReLU}


@dataclass(frozen=True)
class Molecules:
    """What the published models take: a batch of molecular hypergraphs.

    Attributes:
        x: OGB's atom features, (n_atoms, 9).
        incidence: (2, n_incidences) of (atom, hyperedge).
        types: Kind of each hyperedge, (n_hyperedges,).
        orders: Number of members of each hyperedge, (n_hyperedges,).
        n_hyperedges: Of each molecule, (n_graphs,).
        batch: Molecule of each atom, (n_atoms,).
        pos: (n_atoms, 3), Å; only EquiHGNN looks at it.
    """

    x: Tensor
    incidence: Tensor
    types: Tensor
    orders: Tensor
    n_hyperedges: Tensor
    batch: Tensor
    pos: Positions | None = None


class PublishedEquiHGNN(nn.Module):
    """MHNN, MHNNS or MHNNM, with or without the EGNN before it.

    Args:
        variant: ``mhnn``: one convolution shared by all layers, atoms and larger hyperedges are
            read out. ``mhnns``: one simpler convolution. ``mhnnm``: a convolution and a batch
            normalisation for each layer.
        geometry: Whether an EGNN updates the atoms first.
        num_target: Numbers per molecule.
        num_layers: Convolutions.
        channels: Of atoms and hyperedges.
        output_channels: Hidden channels of the readout; ``mhnn`` takes twice as many.
        output_layers: Linear layers of the readout.
        mlp_layers: Linear layers of W1 to W4.
        aggregate: How messages are gathered.
        normalization: In all perceptrons.
        activation: Between layers: ``Id``, ``relu`` or ``prelu``.
        dropout: Probability.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        geometry: bool = False,
        num_target: int = 1,
        num_layers: int = 3,
        channels: int = 256,
        output_channels: int = 128,
        output_layers: int = 3,
        mlp_layers: tuple[int, int, int, int] = (2, 2, 2, 2),
        aggregate: Aggregation = "mean",
        normalization: Normalization = "ln",
        activation: str = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.variant: Variant = variant
        self.num_layers = num_layers
        mlp = partial(HypergraphMLP, normalization=normalization, dropout=dropout)
        full = partial(MHNNConv, channels, aggregate=aggregate, depths=mlp_layers, mlp=mlp)
        self.act = _ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.atom_encoder = AtomEncoder(channels)
        self.egnn_layer = CloudEGNN(channels) if geometry else None
        if variant != "mhnns":
            self.bond_encoder = nn.Embedding(NUM_HYPEREDGE_TYPES, channels)
        if variant == "mhnn":
            self.conv = full()
        elif variant == "mhnns":
            self.conv = MHNNSConv(channels, aggregate=aggregate, depths=mlp_layers[:3], mlp=mlp)
        else:
            self.layers = nn.ModuleList(full() for _ in range(num_layers))
            self.batch_norms = nn.ModuleList(nn.BatchNorm1d(channels) for _ in range(num_layers))
        n_read, n_hidden = channels, output_channels
        if variant == "mhnn":
            n_read, n_hidden = 2 * channels, 2 * output_channels
        self.mlp_out = mlp(n_read, n_hidden, num_target, num_layers=output_layers)

    def forward(self, molecules: Molecules) -> Tensor:
        """Return the predictions of all molecules, (n_graphs * num_target,)."""
        x = self.atom_encoder(molecules.x)
        if self.egnn_layer is not None:
            if molecules.pos is None:
                raise ValueError("EquiHGNN needs positions")
            x = self.egnn_layer(x, molecules.pos.to(x.dtype))
        n_graphs = len(molecules.n_hyperedges)
        if self.variant == "mhnns":
            x = self._simple(x, molecules)
            return self.mlp_out(segment_sum(x, molecules.batch, n_graphs)).reshape(-1)
        x, e = self._full(x, molecules)
        read = segment_sum(x, molecules.batch, n_graphs)
        if self.variant == "mhnn":
            graphs = torch.arange(n_graphs, device=x.device)
            owner = graphs.repeat_interleave(molecules.n_hyperedges)
            large = molecules.orders > 2
            read = torch.cat([read, segment_sum(e[large], owner[large], n_graphs)], dim=1)
        return self.mlp_out(read).reshape(-1)

    def _simple(self, x: Tensor, molecules: Molecules) -> Tensor:
        first, n_hyperedges = x, len(molecules.types)
        for _ in range(self.num_layers):
            x = self.act(self.conv(self.dropout(x), first, molecules.incidence, n_hyperedges))
        return self.dropout(x)

    def _full(self, x: Tensor, molecules: Molecules) -> tuple[Tensor, Tensor]:
        e = self.bond_encoder(molecules.types)
        for layer in range(self.num_layers):
            conv = self.conv if self.variant == "mhnn" else self.layers[layer]
            x, e = conv(x, e, molecules.incidence)
            if self.variant == "mhnnm":
                x = self.batch_norms[layer](x)
            if layer < self.num_layers - 1:
                x, e = self.act(x), self.act(e)
            x, e = self.dropout(x), self.dropout(e)
        return x, e


class AtomEncoder(nn.Module):
    """The sum of an embedding for each of OGB's nine atom features."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.atom_embedding_list = nn.ModuleList(nn.Embedding(n, channels) for n in OGB_FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n_atoms, 9) integers to (n_atoms, C)."""
        columns = zip(self.atom_embedding_list, x.unbind(1), strict=True)
        return torch.stack([embedding(column) for embedding, column in columns]).sum(dim=0)


class CloudEGNN(nn.Module):
    """One layer of egnn-pytorch's EGNN on one cloud of points, atoms only.

    Each atom hears its ``num_neighbors`` nearest, itself among them. Weights that only move the
    coordinates are kept for the reference's checkpoints, and do nothing.

    Args:
        channels: Of atoms.
        message_channels: Of messages.
        num_neighbors: Neighbours of an atom.
    """

    def __init__(
        self, channels: int, *, message_channels: int = 16, num_neighbors: int = 16
    ) -> None:
        super().__init__()
        self.num_neighbors = num_neighbors
        n_pair = 2 * channels + 1
        self.edge_mlp = _two_layers(n_pair, 2 * n_pair, message_channels, final=nn.SiLU())
        self.node_norm = nn.LayerNorm(channels)
        self.coors_norm = _Scale()
        self.node_mlp = _two_layers(channels + message_channels, 2 * channels, channels)
        self.coors_mlp = _two_layers(message_channels, 4 * message_channels, 1)

    def forward(self, h: Tensor, pos: Positions) -> Tensor:
        """Return new atoms (n_atoms, C).

        Raises:
            ValueError: There are fewer atoms than neighbours.
        """
        if len(h) < self.num_neighbors:
            raise ValueError(
                f"the published EGNN needs at least {self.num_neighbors} atoms in a batch, there "
                f"are {len(h)}; our EquiHGNN has no such limit"
            )
        squared = ((pos[:, None] - pos[None]) ** 2).sum(dim=2)  # (n_atoms, n_atoms)
        nearest = squared.topk(self.num_neighbors, dim=1, largest=False).indices
        source = nearest.reshape(-1)
        target = torch.arange(len(h), device=h.device).repeat_interleave(self.num_neighbors)
        pair = torch.cat([h[target], h[source], squared[target, source][:, None]], dim=1)
        total = segment_sum(self.edge_mlp(pair), target, len(h))
        return h + self.node_mlp(torch.cat([self.node_norm(h), total], dim=1))


class _Scale(nn.Module):
    """The scale of the reference's normalisation of coordinates, which nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 1e-2))


def _two_layers(
    n_in: int, n_hidden: int, n_out: int, *, final: nn.Module | None = None
) -> nn.Sequential:
    # The identities stand where the reference has dropout, so that the names of weights agree.
    layers = [nn.Linear(n_in, n_hidden), nn.Identity(), nn.SiLU(), nn.Linear(n_hidden, n_out)]
    return nn.Sequential(*layers, *([final] if final is not None else []))
