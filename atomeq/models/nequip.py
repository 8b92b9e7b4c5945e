"""NequIP: E(3)-equivariant graph neural networks for interatomic potentials.

Batzner, Musaelian, Sun, Geiger, Mailoa, Kornbluth, Molinari, Smidt and Kozinsky, Nature
Communications 13 (2022), arXiv:2101.03164. Messages couple the features of a neighbour with the
spherical harmonics of the edge by Clebsch-Gordan products, weighted by functions of its length.

Our default has parity, a trained Bessel basis under a polynomial envelope with two continuous
derivatives, and a constant instead of the count of neighbours. SevenNet (Park, Kim, Hwang and Han,
J. Chem. Theory Comput. 20 (2024), arXiv:2402.03789) is the same network in another form:
:class:`SevenNetForm` has what differs there.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

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
    parse_irreps,
)
from atomeq.nn.radial import PolynomialEnvelope, TrainedBesselBasis, XPLOREnvelope
from atomeq.nn.radial_tables import RadialTables
from atomeq.ops.coupling.weight_table import WeightTable
from atomeq.ops.harmonics.operations import spherical_harmonics
from atomeq.typing import EdgeIndex, PropertyKey

_MIRROR = {
    "reflection": (
        "features of degree l have no parity, so a mirror image may have another energy: measured "
        "for SevenNet's potentials, up to 5e-4 eV/atom and 3e-2 eV/Å in molecules, nothing in "
        "crystals with a centre of inversion"
    )
}


@dataclass(frozen=True)
class SevenNetForm:
    """What SevenNet has other than our default.

    Attributes:
        lmax_edge: Highest degree of the harmonics; None for that of the features.
        normalize_harmonics: False evaluates harmonics of the vector, which grow as r^l.
        envelope_onset: XPLOR's switch from here on, Å, instead of the polynomial.
        radial_activation: Activation of the radial networks.
        scalar_activations: Of even and of odd scalars.
        gate_activations: Of even and of odd gates.
        linear_bias: Even scalars of linear maps have biases.
        readout: ``linear`` for two linear maps, or the widths of a network's hidden layers.
        readout_activation: Of such a network.
        element_scale: A factor of each element's energy.
        folded: Modalities folded into the maps of one: their number for each of ``embedding``,
            ``intro``, ``outro`` and ``readout`` that had them as inputs.
    """

    lmax_edge: int | None = None
    normalize_harmonics: bool = True
    envelope_onset: float | None = None
    radial_activation: str = "silu"
    scalar_activations: Sequence[str] = ("silu", "tanh")
    gate_activations: Sequence[str] = ("silu", "tanh")
    linear_bias: bool = False
    readout: str | Sequence[int] = "linear"
    readout_activation: str = "silu"
    element_scale: bool = False
    folded: Mapping[str, int] | None = None

    def folded_in(self, name: str) -> int:
        """Return how many inputs of a linear map are folded into it."""
        return (self.folded or {}).get(name, 0)


class NequIP(AtomisticModel):
    """Clebsch-Gordan network with conservative forces.

    Args:
        cutoff: Radius of the graph, Å.
        irreps: Features of the atoms: of the embedding, then after each layer, the last of which
            has scalars alone. Channels may differ from degree to degree.
        parity: Tell polar from axial features, which makes the network equivariant to mirrors;
            without it every irrep is called even.
        num_radial: Bessel functions of the edge length, whose wave numbers are trained.
        radial_channels: Hidden layers of the radial networks.
        envelope_exponent: Of the polynomial envelope.
        self_connection: ``linear``, or ``species`` for weights of each element; one for all layers
            or one for each.
        avg_num_neighbors: Sums over neighbours are divided by its square root.
        elements: Atomic numbers in the order of the embedding; None for 1 to 118.
        sevennet: Fields of :class:`SevenNetForm`; None for our default.

    Raises:
        ValueError: Irreps, an activation or a self connection are none.
    """

    def __init__(
        self,
        cutoff: float = 5.0,
        *,
        irreps: Sequence[str] = (
            "64x0e",
            "64x0e+32x1o+16x2e",
            "64x0e+32x1o+16x2e",
            "64x0e",
        ),
        parity: bool = True,
        num_radial: int = 8,
        radial_channels: Sequence[int] = (64, 64),
        envelope_exponent: int = 6,
        self_connection: str | Sequence[str] = "species",
        avg_num_neighbors: float = 20.0,
        elements: Sequence[int] | None = None,
        sevennet: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.keep_arguments(locals())
        self.irreps, self.receptive_depth = list(irreps), len(irreps) - 1
        self.radial_channels = list(radial_channels)
        if not isinstance(self_connection, str):
            self.self_connection = list(self_connection)
        self.elements = None if elements is None else list(elements)
        if avg_num_neighbors <= 0:
            raise ValueError(f"avg_num_neighbors is {avg_num_neighbors}; it must be positive")
        self.exempt_laws = {} if parity else _MIRROR
        features = [parse_irreps(text) for text in irreps]
        _check(features)
        own = {"readout": (features[-1][SCALAR] // 2,)}
        self.form = form = SevenNetForm(**(own if sevennet is None else sevennet))
        highest = max(irrep.l for entry in features for irrep in entry)
        self.lmax_edge = highest if form.lmax_edge is None else form.lmax_edge

        numbers = list(range(1, 119)) if elements is None else list(elements)
        index = torch.full((119,), -1)
        index[torch.tensor(numbers)] = torch.arange(len(numbers))
        self.register_buffer("index", index, persistent=False)
        self.n_species = len(numbers)
        species = {SCALAR: len(numbers)}
        folded = form.folded_in("embedding")
        self.embedding = IrrepsLinear(species, features[0], bias=form.linear_bias, folded=folded)
        self.basis = TrainedBesselBasis(num_radial, cutoff)
        self.envelope = (
            PolynomialEnvelope(cutoff, exponent=envelope_exponent)
            if form.envelope_onset is None
            else XPLOREnvelope(cutoff, onset=form.envelope_onset)
        )
        one = isinstance(self_connection, str)
        kinds = [self_connection] * (len(features) - 1) if one else self.self_connection
        widths = [num_radial, *radial_channels]
        self.layers = nn.ModuleList(
            NequIPLayer(self, features[t], features[t + 1], widths, kinds[t], len(numbers))
            for t in range(len(features) - 1)
        )
        self.readout = _readout(features[-1][SCALAR], form)
        self._tables = RadialTables(cutoff, form.envelope_onset)
        self.element_scale = nn.Parameter(torch.ones(len(numbers))) if form.element_scale else None

    readouts = ("readout",)
    index: Tensor
    parity: bool
    irreps: list[str]
    avg_num_neighbors: float

    def forward(self, graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        """Return per-atom ``energies`` (n_atoms,), in the model's own scale, and ``features``."""
        x = self.node_features(graph)
        if isinstance(self.readout, NormalisedMLP):
            energies = self.readout(x)[:, 0]
        else:
            scalars = {SCALAR: x[:, None, :]}
            for linear in self.readout.children():
                scalars = linear(scalars)
            energies = scalars[SCALAR][:, 0, 0]
        if self.element_scale is not None:
            energies = energies * self.element_scale[self.index[graph.atomic_numbers]]
        return {"energies": energies, "features": x}

    @property
    def node_channels(self) -> int:
        """Channels of :meth:`node_features`."""
        return parse_irreps(self.irreps[-1])[SCALAR]

    @property
    def embedding_channels(self) -> int:
        """Channels in which atoms are embedded."""
        return parse_irreps(self.irreps[0])[SCALAR]

    def node_features(self, graph: AtomGraph) -> Tensor:
        """Return the scalars of the atoms after the last layer, (n_atoms, node_channels)."""
        vectors = graph.edge_vectors().to(self.dtype)  # (n_edges, 3)
        weights = self._edge_weights(torch.linalg.vector_norm(vectors, dim=1))
        harmonics = spherical_harmonics(
            vectors, self.lmax_edge, normalize=self.form.normalize_harmonics
        )
        species = self.index[graph.atomic_numbers]
        one_hot = nn.functional.one_hot(species, self.n_species).to(self.dtype)
        x = self.embedding({SCALAR: one_hot[:, None, :]})  # {irrep: (n_atoms, 2l + 1, C)}
        x = x | {SCALAR: self.with_state(x[SCALAR][:, 0], graph)[:, None]}
        for layer, own in zip(self.layers, weights, strict=True):
            x = layer(x, own, harmonics, species, graph.edge_index)
        return x[SCALAR][:, 0]

    def _edge_weights(self, lengths: Tensor) -> Sequence[Tensor | WeightTable]:
        """Return the weights of the edges in each layer, (n_edges, n_weights), or tables."""
        used = [self.basis.wave_numbers]
        for layer in self._blocks():
            used += layer.radial_state()
        if self._tables.serve(lengths, used):
            return self._tables.at(lengths, used, self._radial_functions)
        radial = self._radial(lengths)
        return [layer.edge_weights(radial) for layer in self._blocks()]

    def _blocks(self) -> list["NequIPLayer"]:
        return cast(
            "list[NequIPLayer]", list(self.layers)
        )  # for type checkers: a ModuleList has none

    def _radial(self, lengths: Tensor) -> Tensor:
        """Return the functions of the edge length, (n_edges, num_radial)."""
        return self.basis(lengths) * self.envelope(lengths)[:, None]

    def _radial_functions(self) -> list[Callable[[Tensor], Tensor]]:
        """Return the weights of each layer as functions of the edge length, in float64."""
        twin = copy.deepcopy(self).double()

        def of(layer: NequIPLayer) -> Callable[[Tensor], Tensor]:
            return lambda lengths: layer.edge_weights(twin._radial(lengths))

        return [of(layer) for layer in twin._blocks()]


class NequIPLayer(nn.Module):
    """One interaction block: linear, convolution, linear, self connection and gate."""

    def __init__(
        self,
        model: NequIP,
        inputs: Irreps,
        outputs: Irreps,
        widths: Sequence[int],
        self_connection: str,
        n_species: int,
    ) -> None:
        super().__init__()
        form = model.form
        self.gate = IrrepsGate(
            outputs, scalars=form.scalar_activations, gates=form.gate_activations
        )
        self.paths = convolution_paths(inputs, self.gate.inputs, model.lmax_edge, model.parity)
        coupled = coupled_irreps(inputs, self.paths)
        self.intro = IrrepsLinear(
            inputs, inputs, bias=form.linear_bias, folded=form.folded_in("intro")
        )
        self.outro = IrrepsLinear(
            coupled, self.gate.inputs, bias=form.linear_bias, folded=form.folded_in("outro")
        )
        self.n_weights = number_of_weights(inputs, self.paths)
        self.radial = NormalisedMLP([*widths, self.n_weights], form.radial_activation)
        if self_connection not in ("linear", "species"):
            raise ValueError(
                f"self_connection {self_connection!r} is unknown; choose linear or species"
            )
        self.self_connection = (
            SpeciesLinear(inputs, self.gate.inputs, n_species)
            if self_connection == "species"
            else IrrepsLinear(inputs, {k: n for k, n in self.gate.inputs.items() if k in inputs})
        )
        self.register_buffer("denominator", torch.tensor(math.sqrt(model.avg_num_neighbors)))

    denominator: Tensor

    def radial_state(self) -> list[Tensor]:
        """Return what :meth:`edge_weights` depends on."""
        return [*self.radial.weights, self.denominator]

    def edge_weights(self, radial: Tensor) -> Tensor:
        """Return the weights of the edges, (n_edges, n_weights), divided for the sum over them.

        Args:
            radial: Functions of the edge length, (n_edges, num_radial).
        """
        last = self.radial.weights[-1]
        return self.radial.hidden(radial) @ (last / (math.sqrt(last.shape[0]) * self.denominator))

    def forward(
        self,
        x: Features,
        weights: Tensor | WeightTable,
        harmonics: Tensor,
        species: Tensor,
        edge_index: EdgeIndex,
    ) -> Features:
        """Return the features after the block.

        Args:
            x: Features of the atoms, irrep -> (n_atoms, 2l + 1, channels).
            weights: Of the edges, from :meth:`edge_weights`, or a table of them.
            harmonics: Spherical harmonics of the edges, (n_edges, n_sph).
            species: Index of each atom's element, (n_atoms,).
            edge_index: Row 0 is the source, row 1 the target.
        """
        if isinstance(self.self_connection, SpeciesLinear):
            own = self.self_connection(x, species)
        else:
            own = self.self_connection(x)
        mixed = self.outro(convolve(self.intro(x), weights, harmonics, edge_index, self.paths))
        return self.gate({k: y + own[k] if k in own else y for k, y in mixed.items()})


def _readout(channels: int, form: SevenNetForm) -> nn.Module:
    if form.readout != "linear":
        widths = [channels, *(int(width) for width in form.readout), 1]
        return NormalisedMLP(widths, form.readout_activation, zero_output=True)
    hidden = {SCALAR: channels // 2}
    folded = form.folded_in("readout")
    first = IrrepsLinear({SCALAR: channels}, hidden, bias=form.linear_bias, folded=folded)
    return nn.ModuleList([first, IrrepsLinear(hidden, {SCALAR: 1}, bias=form.linear_bias)])


def _check(features: Sequence[Irreps]) -> None:
    if len(features) < 2:
        raise ValueError("irreps need an entry for the embedding and one for each layer")
    if list(features[0]) != [SCALAR] or SCALAR not in features[-1]:
        raise ValueError("irreps start with 0e alone, and the last ones have 0e for the energy")
