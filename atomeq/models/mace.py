"""MACE: higher order equivariant message passing for fast and accurate force fields.

Batatia, Kovács, Simm, Ortner and Csányi, NeurIPS 2022, arXiv:2206.07697. Messages of two bodies are
summed over the neighbours of an atom, and products of up to n such sums give it features of n + 1
bodies.

Our default differs from the paper's in the couplings of the products, which are the linearly
independent ones. Published potentials are the same network in other forms: :class:`PublishedMACE`
has what differs there.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import AtomisticModel
from atomeq.nn.convolution import (
    convolution_paths,
    convolve,
    coupled_irreps,
    number_of_weights,
)
from atomeq.nn.irreps import (
    SCALAR,
    Features,
    Irreps,
    IrrepsGate,
    IrrepsLinear,
    NormalisedMLP,
    SpeciesLinear,
    activation,
    parse_irreps,
)
from atomeq.nn.radial import BesselBasis, PolynomialEnvelope
from atomeq.nn.radial_tables import RadialTables
from atomeq.nn.symmetric_product import SymmetricProduct, natural
from atomeq.ops.coupling.weight_table import WeightTable
from atomeq.ops.harmonics.operations import spherical_harmonics
from atomeq.ops.segment.operations import segment_sum
from atomeq.typing import EdgeIndex, PropertyKey

_AGNESI = (1.0805, 0.9183, 4.5791)  # a, q and p of the transform
_SCREENING_LENGTH = 0.4543 * 0.529  # Å
_SCREENING_POWER = 0.3
_COULOMB = 14.3996  # eV·Å
_SCREENING = ((0.1818, 3.2), (0.5099, 0.9423), (0.2802, 0.4028), (0.02817, 0.2016))


@dataclass(frozen=True)
class PublishedMACE:
    """What published potentials have other than our default.

    Attributes:
        interactions: Of each layer: ``residual`` adds the atom's features of before to those
            after, ``agnostic`` maps the message by the atom's element instead, ``nonlinear`` has
            a gate between two maps of the message.
        density: Of each layer: divide by the sum of trained weights of the edges, not by the
            average number of neighbours.
        transform: ``agnesi`` or ``soft``: distances are scaled by covalent radii before the basis.
        repulsion: ZBL's repulsion is added before the scale.
        envelope_on_weights: The envelope multiplies the weights of the edges, not the basis.
        edge_irreps: Features that are sent; None for those of the atoms.
        edge_irreps_first: In the first layer too, not all of the atoms'.
        element_products: Products have weights of each element, or the same for all.
        all_couplings: Products have weights for all couplings, not for independent ones.
        last_readout: Energies are read from the last layer alone.
        readout_layers: Hidden layers of the last readout, with biases where there are two.
        n_heads: Heads of which this is one: they share the divisors of the last readout.
    """

    interactions: Sequence[str] = ("residual",)
    density: Sequence[bool] = (False,)
    transform: str | None = None
    repulsion: bool = False
    envelope_on_weights: bool = False
    edge_irreps: str | None = None
    edge_irreps_first: bool = True
    element_products: bool = True
    all_couplings: bool = False
    last_readout: bool = False
    readout_layers: int = 1
    n_heads: int = 1


class Edges(NamedTuple):
    """What layers know of the edges.

    Attributes:
        weights: Tables of the convolution's weights; None where they are made from ``radial``.
        radial: Functions of the length, (n_edges, num_radial).
        envelope: Factor of the weights, (n_edges, 1), or None where ``radial`` has it.
        harmonics: Spherical harmonics, (n_edges, n_sph).
        edge_index: Row 0 is the source, row 1 the target.
    """

    weights: WeightTable | None
    radial: Tensor
    envelope: Tensor | None
    harmonics: Tensor
    edge_index: EdgeIndex


class MACE(AtomisticModel):
    """Network of products of atomic densities, with conservative forces.

    Args:
        cutoff: Radius of the graph, Å.
        irreps: Features between layers, one number of channels for all degrees, which have parity
            (-1)^l; after the last layer there are scalars alone.
        num_layers: Interactions, each with its product.
        lmax_edge: Highest degree of the harmonics and of the sums that are multiplied.
        correlation: Factors of the highest products; one number, or one for each layer.
        num_radial: Bessel functions of the edge length.
        radial_channels: Hidden layers of the radial networks.
        readout_channels: Hidden layer of the last readout.
        envelope_exponent: Of the polynomial envelope.
        avg_num_neighbors: Sums over neighbours are divided by it.
        elements: Atomic numbers in the order of the embedding; None for 1 to 118.
        published: Fields of :class:`PublishedMACE`; None for our default.

    Raises:
        ValueError: Irreps, a layer or an interaction are none.
    """

    def __init__(
        self,
        cutoff: float = 5.0,
        *,
        irreps: str = "64x0e+64x1o",
        num_layers: int = 2,
        lmax_edge: int = 3,
        correlation: int | Sequence[int] = 3,
        num_radial: int = 8,
        radial_channels: Sequence[int] = (64, 64, 64),
        readout_channels: int = 16,
        envelope_exponent: int = 5,
        avg_num_neighbors: float = 20.0,
        elements: Sequence[int] | None = None,
        published: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.keep_arguments(locals())
        self.receptive_depth = num_layers
        self.radial_channels = list(radial_channels)
        self.elements = None if elements is None else list(elements)
        self.published = None if published is None else dict(published)
        if not isinstance(correlation, int):
            self.correlation = list(correlation)
        if avg_num_neighbors <= 0:
            raise ValueError(f"avg_num_neighbors is {avg_num_neighbors}; it must be positive")
        form = PublishedMACE(**(published or {}))
        self.form = form
        hidden = _checked(irreps, num_layers, lmax_edge)
        self.channels = hidden[SCALAR]
        self.target = {natural(l): self.channels for l in range(lmax_edge + 1)}

        numbers = list(range(1, 119)) if elements is None else list(elements)
        index = torch.full((119,), -1)
        index[torch.tensor(numbers)] = torch.arange(len(numbers))
        self.register_buffer("index", index, persistent=False)
        self.n_species = len(numbers)
        scalars = {SCALAR: self.channels}
        self.embedding = IrrepsLinear({SCALAR: self.n_species}, scalars)
        self.basis = BesselBasis(num_radial, cutoff)
        self.envelope = PolynomialEnvelope(cutoff, exponent=envelope_exponent)
        self._tables = RadialTables(cutoff)
        # Covalent radii, Å, for what published potentials do with them; files bring their own.
        self.radii = nn.Buffer(torch.ones(119)) if form.transform or form.repulsion else None
        features = [scalars, *[hidden] * (num_layers - 1), scalars]
        orders = [correlation] * num_layers if isinstance(correlation, int) else list(correlation)
        self.layers = nn.ModuleList(
            MACELayer(self, k, features[k], features[k + 1], orders[k]) for k in range(num_layers)
        )
        self.energy = nn.ModuleList(
            Readout([self.channels, 1]) for _ in range(0 if form.last_readout else num_layers - 1)
        )
        deep = num_layers > 1 or form.last_readout
        widths = [self.channels, *[readout_channels] * (form.readout_layers if deep else 0), 1]
        self.energy.append(Readout(widths, n_heads=form.n_heads))

    index: Tensor
    lmax_edge: int
    num_radial: int
    envelope_exponent: int
    avg_num_neighbors: float

    def forward(self, graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        """Return per-atom ``energies`` (n_atoms,), in the model's own scale, and ``features``."""
        features = self._features(graph)[-len(self.energy) :]
        parts = [read(x) for read, x in zip(self.energy, features, strict=True)]
        energies = torch.stack(parts).sum(dim=0)  # (n_atoms,)
        if self.form.repulsion:
            energies = energies + self.repulsion(graph)
        return {"energies": energies, "features": torch.cat(features, dim=1)}

    @property
    def node_channels(self) -> int:
        """Channels of :meth:`node_features`."""
        return self.channels

    @property
    def embedding_channels(self) -> int:
        """Channels in which atoms are embedded."""
        return self.channels

    def node_features(self, graph: AtomGraph) -> Tensor:
        """Return the scalars of the atoms after the last layer, (n_atoms, node_channels)."""
        return self._features(graph)[-1]

    def _features(self, graph: AtomGraph) -> list[Tensor]:
        """Return the scalars after each layer, (n_atoms, channels)."""
        species = self.index[graph.atomic_numbers]
        one_hot = nn.functional.one_hot(species, self.n_species).to(self.dtype)
        edges, tables = self._edges(graph)
        x = self.embedding({SCALAR: one_hot[:, None, :]})  # {irrep: (n_atoms, 2l + 1, C)}
        x = x | {SCALAR: self.with_state(x[SCALAR][:, 0], graph)[:, None]}
        found = []
        for layer, table in zip(self.layers, tables, strict=True):
            x = layer(x, edges._replace(weights=table), one_hot, species)
            found.append(x[SCALAR][:, 0])
        return found

    def _edges(self, graph: AtomGraph) -> tuple[Edges, Sequence[WeightTable | None]]:
        """Return what layers know of the edges, and for each a table of its weights, if it has."""
        vectors = graph.edge_vectors().to(self.dtype)  # (n_edges, 3)
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        # From the neighbour to the atom, as published.
        harmonics = spherical_harmonics(-vectors, self.lmax_edge)
        tables, used = self._interactions_of_length(), []
        for one in tables:
            used += one.radial.weights
        if tables and self._tables.serve(lengths, used):
            known = Edges(None, lengths.new_empty(0), None, harmonics, graph.edge_index)
            return known, self._tables.at(lengths, used, self._radial_functions)
        bonds = None if self.form.transform is None else self._bond_lengths(graph)
        radial, envelope = self._radial(lengths, bonds)
        return Edges(None, radial, envelope, harmonics, graph.edge_index), [None] * len(self.layers)

    def _radial(self, lengths: Tensor, bonds: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return functions of the lengths, (n_edges, num_radial), and a factor of the weights."""
        envelope, distances = self.envelope(lengths)[:, None], lengths
        if self.form.transform is not None and bonds is not None:
            distances = _transformed(lengths, bonds, self.form.transform)
        # As published: √(2/r_c) sin(nπr/r_c)/r.
        radial = self.basis(distances) * (math.sqrt(2.0 / self.cutoff) * math.pi / self.cutoff)
        if self.form.envelope_on_weights:
            return radial, envelope
        return radial * envelope, None

    def _interactions_of_length(self) -> list["Interaction"]:
        """Return the interactions, if the weights of all depend on lengths alone; else none."""
        layers = cast("list[MACELayer]", list(self.layers))  # a ModuleList has no types
        found = [layer.interaction for layer in layers]
        simple = [one for one in found if isinstance(one, Interaction) and one.density is None]
        return simple if len(simple) == len(found) and self.form.transform is None else []

    def _radial_functions(self) -> list[Callable[[Tensor], Tensor]]:
        """Return the weights of each layer as functions of the edge length, in float64."""
        twin = copy.deepcopy(self).double()

        def of(interaction: Interaction) -> Callable[[Tensor], Tensor]:
            return lambda lengths: interaction.edge_weights(*twin._radial(lengths, None))

        return [of(one) for one in twin._interactions_of_length()]

    def _bond_lengths(self, graph: AtomGraph) -> Tensor:
        """Return the sums of the covalent radii of the edges' atoms, (n_edges,), Å."""
        assert self.radii is not None
        return self.radii[graph.atomic_numbers[graph.edge_index]].sum(dim=0)

    def repulsion(self, graph: AtomGraph) -> Tensor:
        """Return half of ZBL's energy of every pair to each of its atoms, (n_atoms,)."""
        r = torch.linalg.vector_norm(graph.edge_vectors().to(self.dtype), dim=1)
        charges = graph.atomic_numbers[graph.edge_index].to(r.dtype)  # (2, n_edges)
        x = r * charges.pow(_SCREENING_POWER).sum(dim=0) / _SCREENING_LENGTH
        screening = torch.stack([c * torch.exp(-b * x) for c, b in _SCREENING]).sum(dim=0)
        switch = PolynomialEnvelope(1.0, exponent=self.envelope_exponent)
        pairs = 0.5 * _COULOMB * charges.prod(dim=0) / r * screening
        pairs = pairs * switch(r / self._bond_lengths(graph))
        return segment_sum(pairs, graph.edge_index[1], graph.n_atoms)


class MACELayer(nn.Module):
    """An interaction and the product of what it sums."""

    def __init__(self, model: MACE, k: int, inputs: Irreps, outputs: Irreps, order: int) -> None:
        super().__init__()
        form = model.form
        kind = form.interactions[k if len(form.interactions) > 1 else 0]
        density = form.density[k if len(form.density) > 1 else 0]
        if kind not in ("residual", "agnostic", "nonlinear"):
            raise ValueError(
                f"interaction {kind!r} is unknown; choose residual, agnostic or nonlinear"
            )
        sent = inputs
        if form.edge_irreps is not None and (k > 0 or form.edge_irreps_first):
            edge_irreps = parse_irreps(form.edge_irreps)
            sent = {irrep: n for irrep, n in edge_irreps.items() if irrep in inputs}
        self.interaction = (
            NonlinearInteraction(model, inputs, outputs, sent)
            if kind == "nonlinear"
            else Interaction(
                model, inputs, outputs, sent, residual=kind == "residual", density=density
            )
        )
        n_species = model.n_species if form.element_products else 1
        self.product = SymmetricProduct(
            model.target, outputs, order, n_species, all_couplings=form.all_couplings
        )

    def forward(self, x: Features, edges: Edges, one_hot: Tensor, species: Tensor) -> Features:
        """Return the features after the layer; the species are given in both ways."""
        sums, skip = self.interaction(x, edges, one_hot, species)
        return {
            irrep: y + skip[irrep] if irrep in skip else y
            for irrep, y in self.product(sums, species).items()
        }


class Interaction(nn.Module):
    """Linear, convolution, linear, and a map by the atom's element, of sums or of the atom."""

    def __init__(
        self,
        model: MACE,
        inputs: Irreps,
        outputs: Irreps,
        sent: Irreps,
        *,
        residual: bool,
        density: bool,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.paths = convolution_paths(sent, model.target, model.lmax_edge, True)
        n_weights = number_of_weights(sent, self.paths)
        self.up = IrrepsLinear(inputs, sent)
        widths = [model.num_radial, *model.radial_channels, n_weights]
        self.radial = NormalisedMLP(widths, "silu")
        self.mix = IrrepsLinear(coupled_irreps(sent, self.paths), model.target)
        self.density = NormalisedMLP([model.num_radial, 1], "silu") if density else None
        kept, wanted = (inputs, outputs) if residual else (model.target, model.target)
        self.skip = SpeciesLinear(kept, wanted, model.n_species)
        self.n_neighbors = model.avg_num_neighbors

    def forward(
        self, x: Features, edges: Edges, one_hot: Tensor, species: Tensor
    ) -> tuple[Features, Features]:
        """Return sums over neighbours, and what is added after the product."""
        weights = edges.weights
        if weights is None:
            weights = self.edge_weights(edges.radial, edges.envelope)
        sent = self.up(x)
        sums = convolve(sent, weights, edges.harmonics, edges.edge_index, self.paths)
        sums = self.mix(sums)
        if self.density is not None:
            count = _density(self.density(edges.radial), edges, species.shape[0])
            sums = {irrep: y / (count + 1.0) for irrep, y in sums.items()}
        if self.residual:
            return sums, self.skip(x, species)
        return self.skip(sums, species), {}

    def edge_weights(self, radial: Tensor, envelope: Tensor | None) -> Tensor:
        """Return the weights of the edges, (n_edges, n_weights)."""
        hidden, last = self.radial.hidden(radial), self.radial.weights[-1]
        if envelope is not None:
            hidden = hidden * envelope
        n_neighbors = self.n_neighbors if self.density is None else 1.0
        return hidden @ (last / (math.sqrt(last.shape[0]) * n_neighbors))


class NonlinearInteraction(nn.Module):
    """Convolution with weights that know both elements, and a gate between two linear maps."""

    def __init__(self, model: MACE, inputs: Irreps, outputs: Irreps, sent: Irreps) -> None:
        super().__init__()
        self.paths = convolution_paths(sent, model.target, model.lmax_edge, True)
        n_weights = number_of_weights(sent, self.paths)
        self.gate = IrrepsGate(model.target, scalars=("silu", "tanh"), gates=("sigmoid", "tanh"))
        species = {SCALAR: model.n_species}
        self.source = IrrepsLinear(species, {SCALAR: model.channels})
        self.receiver = IrrepsLinear(species, {SCALAR: model.channels})
        self.up = IrrepsLinear(inputs, sent)
        self.keep = IrrepsLinear(sent, self.gate.inputs)
        n_inputs = model.num_radial + 2 * model.channels
        self.radial = _radial_mlp([n_inputs, *model.radial_channels, n_weights])
        self.density = _radial_mlp([n_inputs, 64, 1])
        self.mix = IrrepsLinear(coupled_irreps(sent, self.paths), self.gate.inputs)
        self.out = IrrepsLinear(self.gate.outputs, model.target)
        self.skip = IrrepsLinear(inputs, {ir: n for ir, n in outputs.items() if ir in inputs})
        self.alpha = nn.Parameter(torch.tensor(20.0))
        self.beta = nn.Parameter(torch.tensor(0.0))

    def forward(
        self, x: Features, edges: Edges, one_hot: Tensor, species: Tensor
    ) -> tuple[Features, Features]:
        """Return sums over neighbours, and what is added after the product."""
        sent = self.up(x)
        own = {SCALAR: one_hot[:, None, :]}
        source, target = edges.edge_index
        known = torch.cat(
            [
                edges.radial,
                self.source(own)[SCALAR][source, 0],
                self.receiver(own)[SCALAR][target, 0],
            ],
            dim=1,
        )  # (n_edges, num_radial + 2 C)
        weights = self.radial(known)  # (n_edges, n_weights)
        if edges.envelope is not None:
            weights = weights * edges.envelope
        count = self.beta * _density(self.density(known), edges, species.shape[0]) + self.alpha
        mixed = convolve(sent, weights, edges.harmonics, edges.edge_index, self.paths)
        mixed = self.mix(mixed)
        kept = self.keep(sent)
        sums = self.gate({irrep: y / count + kept[irrep] for irrep, y in mixed.items()})
        return self.out(sums), self.skip(x)


class Readout(nn.Module):
    """Energies from scalars: linear, or with hidden layers, from the second of which on biases.

    Args:
        widths: Channels of input, hidden layers and output.
        n_heads: Heads that share hidden layers of this width each, which sets the divisors.
    """

    def __init__(self, widths: Sequence[int], *, n_heads: int = 1) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.weights = nn.ParameterList(torch.randn(n, m) for n, m in pairwise(widths))
        self.biases = nn.ParameterList(
            torch.zeros(m) for m in (widths[2:] if len(widths) > 3 else ())
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (n_atoms, channels) to energies (n_atoms,)."""
        for k, weight in enumerate(self.weights):
            fan = weight.shape[0] * (self.n_heads if k else 1)
            x = (activation("silu", x) if k else x) @ (weight / math.sqrt(fan))
            if k and len(self.biases):
                x = x + self.biases[k - 1]
        return x[:, 0]


def _density(values: Tensor, edges: Edges, n_atoms: int) -> Tensor:
    """Return the sum of tanh(s²) over the edges of each atom, (n_atoms, 1, 1)."""
    weights = torch.tanh(values**2)
    if edges.envelope is not None:
        weights = weights * edges.envelope
    return segment_sum(weights[:, 0], edges.edge_index[1], n_atoms)[:, None, None]


def _radial_mlp(widths: Sequence[int]) -> nn.Sequential:
    blocks: list[nn.Module] = []
    for n_in, n_out in pairwise(widths[:-1]):
        blocks += [nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.SiLU()]
    return nn.Sequential(*blocks, nn.Linear(widths[-2], widths[-1]))


def _transformed(r: Tensor, bond_lengths: Tensor, transform: str) -> Tensor:
    """Return distances as the basis sees them, by the sums of covalent radii, Å."""
    if transform == "agnesi":
        a, q, p = _AGNESI
        t = r / (0.5 * bond_lengths)
        return 1.0 / (1.0 + a * t**q / (1.0 + t ** (q - p)))
    if transform != "soft":
        raise ValueError(f"transform {transform!r} is unknown; choose agnesi or soft")
    inner, outer = 0.75 * bond_lengths, 4.0 / 3.0 * bond_lengths
    step = torch.tanh(4.0 / (outer - inner) * (r - 0.5 * (inner + outer)))
    return inner + (r - inner) * (1.0 + step) / 2.0


def _checked(text: str, num_layers: int, lmax_edge: int) -> Irreps:
    irreps = parse_irreps(text)
    degrees = [irrep.l for irrep in irreps]
    own = all(irrep == natural(irrep.l) for irrep in irreps)
    if degrees != list(range(len(degrees))) or not own or len(set(irreps.values())) != 1:
        raise ValueError(f"irreps {text!r} are not like 64x0e+64x1o+64x2e, of one width")
    if degrees[-1] > lmax_edge or num_layers < 1:
        raise ValueError(
            f"num_layers is {num_layers} and lmax_edge {lmax_edge}; needed are 1 layer or more and "
            f"lmax_edge of at least {degrees[-1]}, the highest degree of irreps"
        )
    return irreps
