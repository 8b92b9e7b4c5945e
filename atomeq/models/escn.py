"""eSCN: Reducing SO(3) Convolutions to SO(2) for Efficient Equivariant GNNs.

Passaro and Zitnick, ICML 2023, arXiv:2302.03655. Each message is computed in a frame whose polar
axis is its edge: there a tensor product with spherical harmonics becomes a linear map that mixes
only ±m, and costs O(L³) instead of O(L⁶).

This is our default form. It differs from the paper on purpose:

* messages end in a polynomial envelope, so the energy is smooth at the cutoff;
* the activation is a gate instead of a pointwise function on a sphere grid, so equivariance is
  exact and the random roll of the edge frame cannot be seen;
* SO(2) maps have real weights, so mirror images have one energy (:class:`SO2Convolution`);
* forces are the derivative of the energy; the derivative with respect to an edge's direction is a
  torque and no Wigner matrix is differentiated (see :mod:`atomeq.ops.edge.operations`);
* atoms are updated by residuals after a normalisation, as in EquiformerV2 (arXiv:2306.12059), and
  the energy is a plain sum over atoms;
* atoms start from their neighbourhood, EquiformerV2's degree embedding, not from scalars alone.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, cast

from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import Stage, refuse_nonpositive
from atomeq.models.spherical import Edges, MessageBlock, SphericalNetwork
from atomeq.nn.edge_convolution import EdgeConvolution
from atomeq.nn.edge_network import DegreeEmbedding
from atomeq.nn.feed_forward import FeedForward
from atomeq.nn.gaunt import GauntProduct
from atomeq.nn.mlp import MLP
from atomeq.nn.norms import EquivariantRMSNorm
from atomeq.nn.pair_mlp import RadialMLP
from atomeq.nn.pair_networks import PairNetworks
from atomeq.nn.radial import BesselBasis, PolynomialEnvelope
from atomeq.nn.so3 import Gate, SO3Linear
from atomeq.ops.atoms.operations import Products, gated_update
from atomeq.ops.dispatch import serving, size_of
from atomeq.typing import NodeFeatures

_FEW_NUMBERS = 2**18  # features, which one thread adds in the time that another takes to wake up


class ESCN(SphericalNetwork):
    """Equivariant spherical channel network with conservative forces.

    Args:
        cutoff: Radius of the graph, Å.
        lmax: Highest degree of the atom features.
        mmax: Highest order kept in the edge frame, at most ``lmax``.
        num_layers: Layers; atoms feel each other up to ``(num_layers + 1) * cutoff``.
        sphere_channels: Channels of the atom features.
        hidden_channels: Channels inside messages and atom updates.
        edge_channels: Width of the radial network and of the element embeddings in it.
        num_radial: Bessel functions of the edge length.
        avg_num_neighbors: Messages are divided by its square root; a typical count of the data.
        num_elements: Atomic numbers below this are embedded.
        update: What an atom does with its messages: ``gate``, a gated perceptron; ``gaunt``, which
            adds products of two features on the sphere to it (:class:`GauntUpdate`); ``product``,
            such products with gates alone (:class:`~atomeq.nn.activations.ScalarsAndSphere`).

    Raises:
        ValueError: ``mmax`` is not between 0 and ``lmax``, or there is no such update.
    """

    def __init__(
        self,
        cutoff: float = 6.0,
        *,
        lmax: int = 2,
        mmax: int = 2,
        num_layers: int = 2,
        sphere_channels: int = 64,
        hidden_channels: int = 64,
        edge_channels: int = 64,
        num_radial: int = 8,
        avg_num_neighbors: float = 40.0,
        num_elements: int = 119,
        update: Literal["gate", "gaunt", "product"] = "gate",
    ) -> None:
        super().__init__(cutoff)
        if update not in UPDATES:
            raise ValueError(f"update is {' or '.join(UPDATES)}, not {update!r}")
        if not 0 <= mmax <= lmax:
            raise ValueError(f"mmax must lie between 0 and lmax; got mmax={mmax}, lmax={lmax}")
        refuse_nonpositive(avg_num_neighbors=avg_num_neighbors)
        self.keep_arguments(locals())
        self.receptive_depth = num_layers + 1  # atoms start from their neighbours

        self.embedding = nn.Embedding(num_elements, sphere_channels)
        self.source_embedding = nn.Embedding(num_elements, edge_channels)
        self.target_embedding = nn.Embedding(num_elements, edge_channels)
        self.basis = BesselBasis(num_radial, cutoff)
        # messages are divided by the root of how many there are
        self.envelope = PolynomialEnvelope(cutoff, height=1 / math.sqrt(avg_num_neighbors))
        n_edge_scalars = num_radial + 2 * edge_channels
        sizes = (n_edge_scalars, edge_channels, edge_channels, (lmax + 1) * sphere_channels)
        radial = RadialMLP(sizes, layer_norm=True)
        self.neighborhood = DegreeEmbedding(lmax, sphere_channels, radial)
        self.layers = nn.ModuleList(
            MessageBlock(
                message_norm=EquivariantRMSNorm(lmax, sphere_channels),
                message=EdgeConvolution(
                    lmax, mmax, sphere_channels, hidden_channels, edge_channels, n_edge_scalars
                ),
                update_norm=EquivariantRMSNorm(lmax, sphere_channels),
                update=UPDATES[update](lmax, sphere_channels, hidden_channels),
            )
            for _ in range(num_layers)
        )
        self.norm = EquivariantRMSNorm(lmax, sphere_channels)
        self.energy = MLP((sphere_channels, hidden_channels, 1), zero_output=True)

    def leaves_torch_little(self, graph: AtomGraph) -> bool:
        """Return whether kernels of a CPU serve, at fixed weights, and there are not many atoms."""
        weight, n_sph = self.embedding.weight, (self.lmax + 1) ** 2
        few = graph.n_atoms * n_sph * self.sphere_channels <= _FEW_NUMBERS
        fixed = type(graph.pos) is Tensor and not weight.requires_grad
        size = size_of(weight, 1, lmax=self.lmax, mmax=self.mmax, channels=self.sphere_channels)
        return few and fixed and serving("escn_conv", size) == "cpu"

    def stages(self) -> list[Stage]:
        """Return the density of neighbours, then layer after layer; the last gives energies."""
        layers: list[Stage] = [partial(self._layer, layer) for layer in self.layers]
        *earlier, last = [lambda graph, _, n: self._density(graph, self._edges(graph))[:n], *layers]
        return [*earlier, lambda *given: self.energy(self.norm(last(*given))[:, 0])[:, 0]]

    def _energies(self, x: NodeFeatures, graph: AtomGraph) -> tuple[Tensor, Tensor]:
        energies, features = self.energy.with_hidden(x[:, 0])
        return energies[:, 0], features

    def _atoms(self, graph: AtomGraph, edges: Edges) -> NodeFeatures:
        x = self._density(graph, edges)
        for layer in self.layers:
            x = layer(x, *edges)
        return self.norm(x)

    def _density(self, graph: AtomGraph, edges: Edges) -> NodeFeatures:
        """Return the features that atoms start from, (n_atoms, n_sph, C)."""
        return self._with_elements(self.neighborhood(*edges), graph)

    def _layer(
        self, layer: nn.Module, graph: AtomGraph, x: Tensor | None, n_wanted: int
    ) -> NodeFeatures:
        assert x is not None  # only the first stage is given none
        return layer(x, *self._edges(graph), n_wanted=n_wanted)

    def _pair_networks(self) -> PairNetworks:
        layers = cast("list[MessageBlock]", list(self.layers))  # a ModuleList has no types
        return PairNetworks(
            self.basis,
            self.envelope,
            (self.source_embedding, self.target_embedding),
            self.neighborhood.radial,
            tuple(layer.message.radial for layer in layers),
        )


class GatedUpdate(nn.Module):
    """A two-layer perceptron on each atom: a linear map per degree, a gate, a linear map."""

    def __init__(self, lmax: int, sphere_channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.first = SO3Linear(lmax, sphere_channels, hidden_channels)
        self.gates = nn.Linear(sphere_channels, lmax * hidden_channels) if lmax else None
        self.gate = Gate(range((lmax + 1) ** 2), hidden_channels)
        self.second = SO3Linear(lmax, hidden_channels, sphere_channels)

    def forward(self, x: NodeFeatures, products: Products | None = None) -> NodeFeatures:
        """Return the update of ``x`` (n_atoms, n_sph, C), products added (:func:`gated_update`)."""
        if self.gates is None:
            return self.second(self.gate(self.first(x), None))
        gates = self.gates.weight, self.gates.bias
        return gated_update(x, self.first.parts, gates, self.second.parts, products=products)


class GauntUpdate(nn.Module):
    """The gated update and, beside it, the product of two linear maps on the sphere.

    Messages are sums over neighbours, so the products are of pairs of them: angles between three
    atoms enter at one atom, which a gated map of sums can not make by itself. Products are Gaunt's,
    so what is antisymmetric in the two is absent, a cross product (:mod:`atomeq.ops.sphere.gaunt`).
    """

    def __init__(self, lmax: int, sphere_channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.gated = GatedUpdate(lmax, sphere_channels, hidden_channels)
        self.first = SO3Linear(lmax, sphere_channels, hidden_channels)
        self.second = SO3Linear(lmax, sphere_channels, hidden_channels)
        self.product = GauntProduct(lmax, lmax, lmax, hidden_channels)
        self.out = SO3Linear(lmax, hidden_channels, sphere_channels)

    def forward(self, x: NodeFeatures) -> NodeFeatures:
        """Return the update of ``x`` (n_atoms, n_sph, C)."""
        if self.gated.gates is None:
            return self.gated(x) + self.out(self.product(self.first(x), self.second(x)))
        return self.gated(x, self._products())

    def _products(self) -> Products:
        """Return the maps, with the factors of degrees that lie between them and the product."""
        one, other, of_product = (factor[:, :, None] for factor in self.product.factors)
        return (
            (self.first.weight * one, self.first.bias * one[0, :, 0]),
            (self.second.weight * other, self.second.bias * other[0, :, 0]),
            (self.out.weight * of_product.mT, self.out.bias),
        )


UPDATES: dict[str, Callable[[int, int, int], nn.Module]] = {
    "gate": GatedUpdate,
    "gaunt": GauntUpdate,
    "product": lambda lmax, channels, hidden: FeedForward(
        lmax, channels, hidden, channels, nonlinearity="product"
    ),
}
