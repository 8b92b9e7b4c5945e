"""FAENet: Frame Averaging Equivariant Network.

Duval, Schmidt, Hernández-García, Miret, Malliaros, Bengio and Rolnick, ICML 2023, arXiv:2305.05577.
Messages are free functions of the relative position of two atoms: nothing in the network is
equivariant. Invariance comes from :class:`~atomeq.models.frame_averaged.FrameAveraged` around it;
alone it sees how a structure lies in the world.

Our default differs from the paper on purpose:

* messages end in a polynomial envelope, so energies are smooth at the cutoff;
* sums of messages are normalised atom by atom. The published GraphNorm takes its mean over all
  atoms of the mini-batch, also at inference: a structure's energy depends on its neighbours in the
  batch. ``normalisation="graph"`` is the norm per structure, batch-safe but not additive;
* forces are the derivative of the energy, and the bias behind a ``concat`` skip connection counts
  per atom, so the energy is extensive;
* all elements up to 118 have embeddings; those without a group share row 0, which no other uses.

The options give the other face too, in which the reference's weights load unchanged: the golden
tests build it from the reference's own arguments.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import GraphBuilder, NearestNeighborGraph, RadiusGraph
from atomeq.graph.rewiring import without_tag_0
from atomeq.models.base import AtomisticModel
from atomeq.nn.element_properties import N_GROUPS, element_properties
from atomeq.nn.force_decoder import DecoderNorm, ForceDecoder, ForceHead
from atomeq.nn.message_norms import Normalisation, message_norm
from atomeq.nn.radial import PolynomialEnvelope
from atomeq.ops.coupling.operations import cg_conv
from atomeq.ops.paths import Path
from atomeq.ops.segment.operations import segment_sum
from atomeq.typing import EdgeLengths, PropertyKey

MessageType = Literal["base", "simple", "updownscale", "updownscale_base", "updown_local_env"]
SkipConnection = Literal["none", "add", "concat", "concat_atom"]
EnergyHead = Literal["sum", "weighted_initial", "weighted_final"]
_SCALARS = [Path(0, 0, 0)]


class FAENetOutput(NamedTuple):
    """What the network computes for each atom.

    Attributes:
        energies: (n_atoms, out_dim); their sum over a structure is its energy.
        hidden: (n_atoms, hidden_channels).
        forces: (n_atoms, 3), where there is a force head.
    """

    energies: Tensor
    hidden: Tensor
    forces: Tensor | None


class FAENet(AtomisticModel):
    """Unconstrained message passing on relative positions.

    Args:
        cutoff: Radius of the graph, Å.
        hidden_channels: Channels of atoms.
        num_filters: Channels of edges, and of messages where ``mp_type`` scales down.
        num_interactions: Message-passing layers.
        num_gaussians: Gaussians of the edge length.
        mp_type: ``"base"`` filters from edge and both atoms; ``"simple"`` from the edge alone
            (then ``num_filters`` is ``hidden_channels``); ``"updownscale"`` and
            ``"updownscale_base"`` the same in fewer channels; ``"updown_local_env"`` adds the sum
            of an atom's edges.
        complex_mp: One more layer at the end of each interaction.
        second_layer_mlp: Two layers in the embeddings of atoms and edges.
        skip_connection: How the energy uses all stages: ``"add"`` or ``"concat"`` their energies,
            or ``"concat_atom"`` their atoms.
        energy_head: Plain sum over atoms, or weighted by a function of first or last features.
        tag_channels: Of the embedding of OC20's tags; 0 needs no tags.
        pg_channels: Of the embedding of period and of group.
        phys_embeds: Use the table of measured properties.
        phys_channels: Learn the table and map it to these many channels; 0 keeps it fixed.
        force_head: Predict forces by this decoder, which does not conserve energy; None derives
            them from the energy.
        decoder_channels: Hidden channels of the force head.
        decoder_norm: Normalisation in the force head; ``"batch"`` is BatchNorm.
        normalisation: Of message sums: per ``"atom"``, ``"graph"``, ``"batch"`` or none.
        envelope: End messages smoothly at the cutoff.
        energy_bias: Whether the bias of ``"concat"`` counts once per ``"atom"`` or ``"graph"``.
        max_neighbors: Keep only the nearest; makes the energy jump. None keeps all.
        remove_tag_0: Leave out subsurface atoms: no energy of theirs, no forces on them.
        out_dim: Numbers per atom; more than 1 is for training on several targets.
        num_elements: Atomic numbers below this are embedded.
    """

    def __init__(
        self,
        cutoff: float = 6.0,
        *,
        hidden_channels: int = 128,
        num_filters: int = 128,
        num_interactions: int = 4,
        num_gaussians: int = 50,
        mp_type: MessageType = "updownscale_base",
        complex_mp: bool = False,
        second_layer_mlp: bool = True,
        skip_connection: SkipConnection = "concat",
        energy_head: EnergyHead = "sum",
        tag_channels: int = 0,
        pg_channels: int = 16,
        phys_embeds: bool = True,
        phys_channels: int = 0,
        force_head: ForceHead | None = None,
        decoder_channels: int = 128,
        decoder_norm: DecoderNorm = "layer",
        normalisation: Normalisation = "atom",
        envelope: bool = True,
        energy_bias: Literal["atom", "graph"] = "atom",
        max_neighbors: int | None = None,
        remove_tag_0: bool = False,
        out_dim: int = 1,
        num_elements: int = 119,
    ) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.hidden_channels = hidden_channels
        self.num_filters = num_filters
        self.num_interactions = num_interactions
        self.num_gaussians = num_gaussians
        self.mp_type: MessageType = mp_type
        self.complex_mp = complex_mp
        self.second_layer_mlp = second_layer_mlp
        self.skip_connection = skip_connection
        self.energy_head = energy_head
        self.tag_channels = tag_channels
        self.pg_channels = pg_channels
        self.phys_embeds = phys_embeds
        self.phys_channels = phys_channels
        self.force_head: ForceHead | None = force_head
        self.decoder_channels = decoder_channels
        self.decoder_norm: DecoderNorm = decoder_norm
        self.normalisation: Normalisation = normalisation
        self.envelope = envelope
        self.energy_bias = energy_bias
        self.max_neighbors = max_neighbors
        self.remove_tag_0 = remove_tag_0
        self.recordable = not remove_tag_0 and normalisation != "batch"
        if normalisation in ("atom", "none") and energy_bias == "atom":
            self.receptive_depth = num_interactions
        self.out_dim = out_dim
        self.num_elements = num_elements
        if force_head is not None:
            self.outputs = frozenset({"energies", "forces"})
        self._build()

    def _build(self) -> None:
        n_hidden, n_stages = self.hidden_channels, self.num_interactions + 1
        n_filters = n_hidden if self.mp_type == "simple" else self.num_filters
        # Names of submodules are the reference's: its weights load as they are.
        self.distance_expansion = StoredGaussians(self.num_gaussians, self.cutoff)
        self.embed_block = Embedding(self, n_filters)
        self.interaction_blocks = nn.ModuleList(
            Interaction(
                n_hidden, n_filters, self.mp_type, self.normalisation, complex_mp=self.complex_mp
            )
            for _ in range(self.num_interactions)
        )
        self.output_block = EnergyBlock(
            n_hidden, self.out_dim, weighted=self.energy_head == "weighted_final"
        )
        self.readouts = ("output_block", "w_lin", "decoder")
        if self.energy_head == "weighted_initial":
            self.w_lin = nn.Linear(n_hidden, 1)
        if self.skip_connection == "concat":
            self.mlp_skip_co = nn.Linear(n_stages * self.out_dim, self.out_dim)
            self.readouts = (*self.readouts, "mlp_skip_co")
        elif self.skip_connection == "concat_atom":
            self.mlp_skip_co = nn.Linear(n_stages * n_hidden, n_hidden)
        if self.force_head is not None:
            sizes = (n_hidden, self.decoder_channels, self.decoder_norm)
            self.decoder = ForceDecoder(self.force_head, *sizes)
        self.polynomial = PolynomialEnvelope(self.cutoff)

    def graph_builder(self) -> GraphBuilder:
        """Return the builder of all pairs within the cutoff, or of the nearest of them."""
        if self.max_neighbors is None:
            return RadiusGraph(self.cutoff)
        return NearestNeighborGraph(self.cutoff, self.max_neighbors)

    def forward(self, graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        """Return ``energies`` (n_atoms,), ``features``, and ``forces`` (n_atoms, 3) with a head.

        With an ``out_dim`` above 1, energies are (n_atoms, out_dim).
        """
        smaller, kept = without_tag_0(graph) if self.remove_tag_0 else (graph, None)
        atoms = self.atomwise(smaller)
        energies = atoms.energies[:, 0] if self.out_dim == 1 else atoms.energies
        outputs: dict[PropertyKey, Tensor] = {"energies": energies, "features": atoms.hidden}
        if atoms.forces is not None:
            outputs["forces"] = atoms.forces
        if kept is None:
            return outputs
        return {key: _filled(value, kept) for key, value in outputs.items()}

    @property
    def embedding_channels(self) -> int:
        """Channels in which atoms are embedded."""
        return self.hidden_channels

    @property
    def node_channels(self) -> int:
        """Channels of :meth:`node_features`."""
        return self.hidden_channels

    def node_features(self, graph: AtomGraph) -> Tensor:
        """Return the atoms after the last layer, (n_atoms, hidden_channels).

        Like all of this network they depend on how the structure lies; inside
        :class:`~atomeq.models.frame_averaged.FrameAveraged` they do not.
        """
        if not self.remove_tag_0:
            return self.atomwise(graph).hidden
        smaller, kept = without_tag_0(graph)
        return _filled(self.atomwise(smaller).hidden, kept)

    def atomwise(self, graph: AtomGraph) -> FAENetOutput:
        """Return what the network makes of a graph; see :class:`FAENetOutput`."""
        vectors = graph.edge_vectors().to(self.dtype)  # (n_edges, 3)
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        envelope = self.polynomial(lengths)[:, None] if self.envelope else None
        segments = _segments(graph, self.normalisation)

        h, e = self.embed_block(graph, vectors, self.distance_expansion(lengths))
        alpha = self.w_lin(h) if self.energy_head == "weighted_initial" else None
        stages = [h]
        for interaction in self.interaction_blocks:
            h = h + interaction(h, e, graph.edge_index, envelope, segments)
            stages.append(h)
        if self.skip_connection == "concat_atom":
            h = silu(self.mlp_skip_co(torch.cat(stages, dim=1)))  # (n_atoms, H)
        forces = self.decoder(h) if self.force_head is not None else None
        return FAENetOutput(self._energies([*stages[:-1], h], alpha, graph), h, forces)

    def _energies(self, stages: list[Tensor], alpha: Tensor | None, graph: AtomGraph) -> Tensor:
        if self.skip_connection in ("none", "concat_atom"):
            return self.output_block(stages[-1], alpha)
        energies = [self.output_block(h, alpha) for h in stages]
        if self.skip_connection == "add":
            return torch.stack(energies).sum(dim=0)
        mixed = torch.cat(energies, dim=1) @ self.mlp_skip_co.weight.T  # (n_atoms, out_dim)
        if self.energy_bias == "atom":
            return mixed + self.mlp_skip_co.bias
        # As published one bias for each structure: here its atoms share it.
        return mixed + self.mlp_skip_co.bias / graph.natoms[graph.batch][:, None]


class StoredGaussians(nn.Module):
    """exp(-½ ((r - μ_k)/Δ)²) with μ_k among the weights: the reference keeps them in float32."""

    offset: Tensor

    def __init__(self, num_gaussians: int, cutoff: float) -> None:
        super().__init__()
        if num_gaussians < 2:
            raise ValueError(f"num_gaussians must be at least 2, not {num_gaussians}")
        self.register_buffer("offset", torch.linspace(0.0, cutoff, num_gaussians))

    def forward(self, lengths: EdgeLengths) -> Tensor:
        """Evaluate at ``lengths`` (n_edges,), Å; returns (n_edges, num_gaussians)."""
        spacing = self.offset[1] - self.offset[0]
        return torch.exp(-0.5 * ((lengths[:, None] - self.offset) / spacing) ** 2)


class Embedding(nn.Module):
    """First features: an atom by its element, an edge by its vector and length."""

    def __init__(self, model: FAENet, n_filters: int) -> None:
        super().__init__()
        n_hidden, n_pg, n_elements = model.hidden_channels, model.pg_channels, model.num_elements
        table = element_properties()
        n_phys = (model.phys_channels or table.values.shape[1]) if model.phys_embeds else 0
        self.phys_emb, self.phys_lin = None, None
        if model.phys_embeds:
            self.phys_emb = PropertyTable(n_elements, learned=model.phys_channels > 0)
            if model.phys_channels:
                self.phys_lin = _linear(table.values.shape[1], n_phys)
        self.register_buffer("period", table.period[:n_elements], persistent=False)
        self.register_buffer("group", table.group[:n_elements], persistent=False)
        n_periods = int(self.period.max()) + 1
        self.period_embedding = nn.Embedding(n_periods, n_pg) if n_pg else None
        self.group_embedding = nn.Embedding(N_GROUPS, n_pg) if n_pg else None
        self.tag_embedding = nn.Embedding(3, model.tag_channels) if model.tag_channels else None
        n_element = n_hidden - model.tag_channels - n_phys - 2 * n_pg
        if n_element < 1:
            raise ValueError(
                f"hidden_channels={n_hidden} leave {n_element} channels for the element beside "
                f"{model.tag_channels} of tags, {n_phys} of properties and twice {n_pg} of period "
                "and group; raise hidden_channels or lower the others"
            )
        self.emb = nn.Embedding(n_elements, n_element)
        self.lin = _linear(n_hidden, n_hidden)
        self.lin_2 = _linear(n_hidden, n_hidden) if model.second_layer_mlp else None
        self.lin_e1 = _linear(3, n_filters // 2)
        self.lin_e12 = nn.Linear(model.num_gaussians, n_filters - n_filters // 2)
        self.lin_e2 = _linear(n_filters, n_filters) if model.second_layer_mlp else None

    period: Tensor
    group: Tensor

    def forward(self, graph: AtomGraph, vectors: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Return atoms (n_atoms, H) and edges (n_edges, F)."""
        e = silu(torch.cat([self.lin_e1(vectors), self.lin_e12(basis)], dim=1))
        h = silu(self.lin(AtomisticModel.with_state(self._elements(graph), graph)))
        if self.lin_2 is not None and self.lin_e2 is not None:
            h, e = silu(self.lin_2(h)), silu(self.lin_e2(e))
        return h, e

    def _elements(self, graph: AtomGraph) -> Tensor:
        numbers = graph.atomic_numbers
        parts = [self.emb(numbers)]
        if self.tag_embedding is not None:
            if "tags" not in graph:
                raise ValueError(
                    "this model embeds tags, and the graph has none; set them with "
                    "atoms.set_tags(), or build the model with tag_channels=0"
                )
            parts.append(self.tag_embedding(graph.tags))
        if self.phys_emb is not None:
            known = self.phys_emb(numbers)
            parts.append(known if self.phys_lin is None else self.phys_lin(known))
        if self.period_embedding is not None and self.group_embedding is not None:
            parts.append(self.period_embedding(self.period[numbers]))
            parts.append(self.group_embedding(self.group[numbers]))
        return torch.cat(parts, dim=1)  # (n_atoms, H)


class PropertyTable(nn.Module):
    """The standardised properties of each element, fixed or where learning starts."""

    properties: Tensor

    def __init__(self, num_elements: int, *, learned: bool) -> None:
        super().__init__()
        values = element_properties().values[:num_elements].clone()
        if learned:
            self.properties = nn.Parameter(values)
        else:
            self.register_buffer("properties", values, persistent=False)

    def forward(self, atomic_numbers: Tensor) -> Tensor:
        """Return (n_atoms, 14)."""
        return self.properties[atomic_numbers]


class Interaction(nn.Module):
    """One round of messages: neighbours times filters, summed; returns what is added to atoms."""

    def __init__(
        self,
        n_hidden: int,
        n_filters: int,
        mp_type: MessageType,
        normalisation: Normalisation,
        *,
        complex_mp: bool,
    ) -> None:
        super().__init__()
        self.ends = mp_type in ("base", "updownscale_base")
        self.scaled = mp_type.startswith("updown")
        self.local = mp_type == "updown_local_env"
        width = n_filters if self.scaled else n_hidden
        n_inputs = n_filters + 2 * n_hidden * self.ends
        self.lin_geom = _linear(n_inputs, width) if mp_type != "simple" else None
        if self.scaled:
            self.lin_down = _linear(n_hidden, n_filters)
            self.lin_up = _linear(n_filters * (1 + self.local), n_hidden)
        else:
            self.lin_h = _linear(n_hidden, n_hidden)
        self.other_mlp = _linear(n_hidden, n_hidden) if complex_mp else None
        self.graph_norm = message_norm(normalisation, width)

    def forward(
        self,
        h: Tensor,
        e: Tensor,
        edge_index: Tensor,
        envelope: Tensor | None,
        segments: tuple[Tensor, int],
    ) -> Tensor:
        """Return the update (n_atoms, H) of atoms ``h`` (n_atoms, H), edges ``e`` (n_edges, F)."""
        x = silu(self.lin_down(h)) if self.scaled else h
        envelope = e.new_ones(len(e), 1) if envelope is None else envelope
        # The product 0 x 0 -> 0 of neighbours and envelopes, weighted by the filters.
        filters = self._filters(h, e, edge_index)[:, None]  # (n_edges, 1, width)
        total = cg_conv(x[:, None], envelope, filters, edge_index, len(h), _SCALARS)[:, 0]
        if self.graph_norm is not None:
            total = silu(self.graph_norm(total, *segments))
        if self.local:
            around = segment_sum(e * envelope, edge_index[1], len(h))
            x = self.lin_up(torch.cat([total, around], dim=1))
        else:
            x = silu(self.lin_up(total) if self.scaled else self.lin_h(total))
        return x if self.other_mlp is None else silu(self.other_mlp(x))

    def _filters(self, h: Tensor, e: Tensor, edge_index: Tensor) -> Tensor:
        if self.lin_geom is None:
            return e
        if self.ends:
            e = torch.cat([e, h[edge_index[0]], h[edge_index[1]]], dim=1)
        # As published the local environment's filters have no activation.
        return self.lin_geom(e) if self.local else silu(self.lin_geom(e))


class EnergyBlock(nn.Module):
    """A perceptron on each atom, times a weight of the atom where the head has one."""

    def __init__(self, n_hidden: int, out_dim: int, *, weighted: bool) -> None:
        super().__init__()
        self.lin1 = nn.Linear(n_hidden, n_hidden // 2)
        self.lin2 = nn.Linear(n_hidden // 2, out_dim)
        self.w_lin = nn.Linear(n_hidden, 1) if weighted else None

    def forward(self, h: Tensor, alpha: Tensor | None) -> Tensor:
        """Return (n_atoms, out_dim)."""
        energies = self.lin2(silu(self.lin1(h)))
        if self.w_lin is not None:
            alpha = self.w_lin(h)
        return energies if alpha is None else energies * alpha


def _filled(value: Tensor, kept: Tensor) -> Tensor:
    """Return rows for all atoms, zeros where an atom was left out."""
    rows = torch.nonzero(kept)[:, 0]
    return value.new_zeros(len(kept), *value.shape[1:]).index_copy(0, rows, value)


def _segments(graph: AtomGraph, normalisation: Normalisation) -> tuple[Tensor, int]:
    if normalisation == "batch":
        return torch.zeros_like(graph.batch), 1
    return graph.batch, graph.n_graphs


def _linear(n_in: int, n_out: int) -> nn.Linear:
    linear = nn.Linear(n_in, n_out)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
