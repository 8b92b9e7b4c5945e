"""EGNN as published: the velocity form of n-body systems, and the QM9 form.

Satorras, Hoogeboom and Welling, ICML 2021, arXiv:2102.09844; reference: vgsatorras/egnn, commit
e9ca6c0. These take its weights and give its numbers. What we use for energies is
:class:`atomeq.models.egnn.EGNN`, which mends what is listed here:

* edges are given from outside and messages have no envelope: where edges come from a cutoff, the
  output jumps when a pair crosses it;
* coordinates move by the mean over neighbours, which jumps with their number too;
* the QM9 form joins all pairs of a molecule, and its readout acts on the sum over atoms: it is not
  extensive;
* the velocity form clips pulls by component at 100, which is not equivariant where it acts;
* the reference overwrites the positions it is given; these do not.

Edges are in the house's order (row 0 is j, row 1 is i and receives). The reference has the receiver
in row 0.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import AtomisticModel, Propagator
from atomeq.nn.mlp import MLP
from atomeq.nn.pair_mlp import PairMLP
from atomeq.ops.segment.operations import segment_mean, segment_sum
from atomeq.typing import AtomicNumbers, BatchIndex, EdgeIndex, Positions, PropertyKey

#: How a direction is divided: not at all, by |r| (detached) + 1e-8, or by |r| + 1.
Normalization = Literal["none", "length", "length_plus_one"]
LARGEST_PULL = 100.0  # of one neighbour on one coordinate, in the velocity form


class VelocityEGNN(Propagator):
    """The n-body form: positions a time ahead, from positions and velocities (eq. 7).

    The initial velocity enters every layer and is never updated, so the model gives no velocities.

    Args:
        n_inputs: Input features of a particle.
        n_edge_features: Features given with each edge.
        hidden_channels: Channels of particles and messages.
        num_layers: Message-passing layers.
        pull_scale: Factor of the pull of the neighbours.
        residual: Add each layer's input to its output.
        normalize: Divide directions by their length plus one.
        tanh: Bound the pull of a neighbour by its distance.
    """

    gives_velocities = False

    def __init__(
        self,
        n_inputs: int = 1,
        n_edge_features: int = 2,
        *,
        hidden_channels: int = 64,
        num_layers: int = 4,
        pull_scale: float = 1.0,
        residual: bool = True,
        normalize: bool = False,
        tanh: bool = False,
    ) -> None:
        super().__init__()
        self.keep_arguments(locals())
        self.embedding = nn.Linear(n_inputs, hidden_channels)
        self.layers = nn.ModuleList(
            PublishedLayer(
                hidden_channels,
                n_edge_features,
                residual=residual,
                normalization="length_plus_one" if normalize else "none",
                tanh=tanh,
                velocity=True,
                pull_scale=pull_scale,
            )
            for _ in range(num_layers)
        )

    def forward(
        self,
        pos: Positions,
        velocities: Tensor,
        node_features: Tensor,
        edge_features: Tensor,
        edge_index: EdgeIndex,
    ) -> tuple[Positions, None]:
        """Return positions (n_atoms, 3) a time ahead, and None for the velocities."""
        h = self.embedding(node_features)
        for layer in self.layers:
            h, pos = layer(h, pos, edge_index, edge_features, velocities)
        return pos, None


class MoleculeEGNN(AtomisticModel):
    """The QM9 form: one scalar of each molecule from all its pairs; coordinates stay.

    Args:
        cutoff: Å; all pairs within it are joined, and by default that is all of a molecule's.
        hidden_channels: Channels of atoms and messages.
        num_layers: Message-passing layers.
        attention: Weigh each message by a sigmoid of itself.
        repeat_inputs: Give every layer the input features again (``node_attr``).
        elements: Atomic numbers that the one-hot input tells apart.
    """

    outputs = frozenset({"scalar"})
    checkpoint_version = 2

    def __init__(
        self,
        cutoff: float = 100.0,
        *,
        hidden_channels: int = 128,
        num_layers: int = 7,
        attention: bool = True,
        repeat_inputs: bool = False,
        elements: Sequence[int] = (1, 6, 7, 8, 9),
    ) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.hidden_channels = hidden_channels
        self.num_layers = num_layers
        self.attention = attention
        self.repeat_inputs = repeat_inputs
        self.elements = list(elements)
        n_inputs = 3 * len(elements)
        self.embedding = nn.Linear(n_inputs, hidden_channels)
        self.layers = nn.ModuleList(
            PublishedLayer(
                hidden_channels,
                0,
                attention=attention,
                moves=False,
                n_node_features=n_inputs if repeat_inputs else 0,
            )
            for _ in range(num_layers)
        )
        self.node_dec = MLP((hidden_channels, hidden_channels, hidden_channels))
        self.graph_dec = MLP((hidden_channels, hidden_channels, 1))

    @classmethod
    def upgrade(
        cls, version: int, init_args: dict[str, Any], weights: dict[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Take weights of version 1, which were those of a network inside."""
        return init_args, {name.removeprefix("network."): w for name, w in weights.items()}

    @property
    def embedding_channels(self) -> int:
        """Channels in which atoms are embedded."""
        return self.hidden_channels

    def forward(self, graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        """Return ``scalar`` (n_graphs,), in the model's own scale."""
        pos = graph.pos.to(self.dtype)
        batch = graph.batch
        state = graph.get("electronic_state")
        scalar = self.predict(
            graph.atomic_numbers, pos, graph.edge_index, batch, graph.n_graphs, state=state
        )
        return {"scalar": scalar}

    def predict(
        self,
        atomic_numbers: AtomicNumbers,
        pos: Positions,
        edge_index: EdgeIndex,
        batch: BatchIndex,
        n_graphs: int,
        *,
        state: Tensor | None = None,
    ) -> Tensor:
        """Compute the property of each molecule.

        Args:
            atomic_numbers: (n_atoms,).
            pos: (n_atoms, 3), Å.
            edge_index: All pairs of each molecule, (2, n_edges).
            batch: The molecule of each atom, (n_atoms,).
            n_graphs: Number of molecules.
            state: Added to the embedded atoms, (n_graphs, hidden_channels).

        Returns:
            (n_graphs,).
        """
        inputs = self.input_features(atomic_numbers).to(pos.dtype)
        h = self.embedding(inputs)
        h = h if state is None else h + state.index_select(0, batch)
        for layer in self.layers:
            given = inputs if self.repeat_inputs else None
            h, pos = layer(h, pos, edge_index, node_features=given)
        return self.graph_dec(segment_sum(self.node_dec(h), batch, n_graphs))[:, 0]

    def input_features(self, atomic_numbers: AtomicNumbers) -> Tensor:
        """Return the one-hot element times (Z/9)^0, (Z/9)^1, (Z/9)^2, (n_atoms, 3 n_elements).

        Rows of zeros stand for Z = 0, the padding of dense batches.

        Raises:
            ValueError: An element the model does not know.
        """
        elements = torch.tensor(self.elements, device=atomic_numbers.device)
        one_hot = (atomic_numbers[:, None] == elements).double()
        unknown = sorted(set(atomic_numbers.tolist()) - {0, *self.elements})
        if unknown:
            raise ValueError(f"atomic numbers {unknown} are unknown; known are {self.elements}")
        charge = atomic_numbers.double() / max(self.elements)
        powers = torch.stack([charge**p for p in range(3)], dim=1)
        return (one_hot[:, :, None] * powers[:, None, :]).flatten(1)


class PublishedLayer(nn.Module):
    """One equivariant graph convolution of the reference, with the switches of its three forms."""

    def __init__(
        self,
        channels: int,
        n_edge_features: int,
        *,
        residual: bool = True,
        attention: bool = False,
        normalization: Normalization = "none",
        tanh: bool = False,
        moves: bool = True,
        velocity: bool = False,
        pull_scale: float = 1.0,
        n_node_features: int = 0,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.normalization: Normalization = normalization
        self.pull_scale = pull_scale
        self.edge_mlp = PairMLP(channels, 1 + n_edge_features)
        self.node_mlp = MLP((2 * channels + n_node_features, channels, channels))
        self.att_mlp = nn.Sequential(nn.Linear(channels, 1), nn.Sigmoid()) if attention else None
        self.coord_mlp = _pull_mlp(channels, tanh=tanh) if moves else None
        self.coord_mlp_vel = MLP((channels, channels, 1)) if velocity else None

    def forward(
        self,
        h: Tensor,
        pos: Positions,
        edge_index: EdgeIndex,
        edge_features: Tensor | None = None,
        velocities: Tensor | None = None,
        node_features: Tensor | None = None,
    ) -> tuple[Tensor, Positions]:
        """Return features (n_atoms, channels) and coordinates (n_atoms, 3), updated."""
        source, target = edge_index
        separation = pos.index_select(0, target) - pos.index_select(0, source)  # towards receivers
        squared = (separation**2).sum(dim=1, keepdim=True)
        invariants = squared if edge_features is None else torch.cat([squared, edge_features], 1)
        m = self.edge_mlp(h, invariants, edge_index)  # eq. 3
        if self.att_mlp is not None:
            m = m * self.att_mlp(m)  # eq. 8
        if self.coord_mlp is not None:
            pull = self._direction(separation, squared) * self.coord_mlp(m)
            if self.coord_mlp_vel is not None:
                pull = pull.clamp(-LARGEST_PULL, LARGEST_PULL)
            pos = pos + segment_mean(pull, target, len(h)) * self.pull_scale  # eq. 4
        if self.coord_mlp_vel is not None and velocities is not None:
            pos = pos + self.coord_mlp_vel(h) * velocities  # eq. 7
        inputs = [h, segment_sum(m, target, len(h))]  # eq. 5
        updated = self.node_mlp(torch.cat([*inputs, *_given(node_features)], dim=1))  # eq. 6
        return (h + updated if self.residual else updated), pos

    def _direction(self, separation: Tensor, squared: Tensor) -> Tensor:
        if self.normalization == "length":
            return separation / (squared.sqrt().detach() + 1e-8)
        if self.normalization == "length_plus_one":
            return separation / (squared.sqrt() + 1.0)
        return separation


def _given(features: Tensor | None) -> list[Tensor]:
    return [] if features is None else [features]


def _pull_mlp(channels: int, *, tanh: bool) -> nn.Sequential:
    final = nn.Linear(channels, 1, bias=False)
    nn.init.xavier_uniform_(final.weight, gain=1e-3)
    layers = [nn.Linear(channels, channels), nn.SiLU(), final]
    return nn.Sequential(*layers, nn.Tanh()) if tanh else nn.Sequential(*layers)
