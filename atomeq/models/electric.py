"""Any model of the package, with the electric moments and the polarizability of a structure.

Each atom has a charge, a dipole, a traceless quadrupole and a symmetric polarizability, which a
gated network makes of its features by degree; those of the structure are their sums about the mean
position, charges included: μ = Σ q_i r_i + μ_i and Θ = Σ q_i r_i r_i + r_i μ_i + μ_i r_i + Θ_i
without its trace, as the atomic multipoles of Thürlemann, Böselt and Riniker, J. Chem. Theory
Comput. 18, 1701 (2022), here learned from the totals alone. Charges are shifted, all alike, to add
up to the total charge, so that a dipole does not depend on the origin where that is zero.

A model that gives features with l = 2 is read directly. Of another the scalars are sent once more
along the edges, times harmonics of their directions, as a tensor-field network does.
"""

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.electrons import charge_of
from atomeq.models.base import AtomisticModel, Wrapper
from atomeq.nn.convolution import convolution_paths, convolve
from atomeq.nn.feed_forward import FeedForward
from atomeq.nn.irreps import SCALAR, Irrep
from atomeq.nn.mlp import MLP
from atomeq.nn.radial import BesselBasis, PolynomialEnvelope
from atomeq.nn.stress import symmetric_tensor
from atomeq.ops.harmonics.operations import spherical_harmonics
from atomeq.ops.segment.operations import segment_mean, segment_sum
from atomeq.typing import ElectricProperty, NodeFeatures, PropertyKey

_NATURAL = {SCALAR: 1, Irrep(1, -1): 1, Irrep(2, 1): 1}


class Electric(Wrapper):
    """A model with dipole, quadrupole and polarizability beside its energies.

    Args:
        model: Any that offers features of atoms; its cutoff, graph and outputs are those of the
            whole.
        properties: Which: ``dipole`` (e·Å), ``quadrupole`` (e·Å²), ``polarizability`` (e²·Å²/eV).
        hidden_channels: Of the network that reads them.
        energies: Whether the model is trained on energies as well; without, the whole has no energy
            and no forces, and whatever wants those refuses it.
        charges: Give atoms charges. Without, only dipoles of atoms are summed: the form for
            periodic structures, where Σ q r is not defined.

    Raises:
        ValueError: No property is named, or one that there is not.
        NotImplementedError: The model offers no features.
    """

    def __init__(
        self,
        model: AtomisticModel,
        *,
        properties: Sequence[str] = ("dipole", "polarizability"),
        hidden_channels: int = 32,
        energies: bool = True,
        charges: bool = True,
    ) -> None:
        super().__init__(model)
        known: tuple[ElectricProperty, ...] = get_args(ElectricProperty)
        if not properties or not set(properties) <= set(known):
            raise ValueError(f"properties are of {', '.join(known)}; got {list(properties)}")
        self.properties, self.hidden_channels = list(properties), hidden_channels
        self.energies, self.charges = energies, charges
        outputs: set[PropertyKey] = {key for key in known if key in properties}
        self.outputs = frozenset(outputs | model.outputs if energies else outputs)
        self.exempt_laws = dict(model.exempt_laws)
        lmax, channels = model.sphere_shape
        self.lift = None if lmax >= 2 else Lift(channels, model.cutoff)
        self.network = FeedForward(max(lmax, 2), channels, hidden_channels, 2)
        for weight in self.network.second.parameters():  # an untrained one has no moments
            nn.init.zeros_(weight)

    readouts = ("lift", "network")

    def node_features(self, graph: AtomGraph) -> Tensor:
        """Return the features of the model inside, (n_atoms, node_channels)."""
        return self.model.node_features(graph)

    def forward(self, graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        """Return the outputs of the model inside, and those of :attr:`properties`, float64.

        Raises:
            ValueError: The moments of a periodic structure are asked for, and atoms have charges.
        """
        outputs = self.model(graph) if self.energies or self.lift is None else {}
        if self.lift is None:
            x = outputs["sphere_features"]
        else:
            x = self.lift(self.model.node_features(graph), graph)
        parts = self.network(x)[:, :9].to(torch.float64)  # (n_atoms, 9, 2)
        moments, responses = parts.unbind(dim=2)
        found: dict[ElectricProperty, Tensor] = {}
        if {"dipole", "quadrupole"} & set(self.properties):
            found |= self._moments(moments, graph)
        if "polarizability" in self.properties:
            rows = torch.cat([responses[:, :1], responses[:, 4:]], dim=1)
            found["polarizability"] = symmetric_tensor(
                segment_sum(rows, graph.batch, graph.n_graphs)
            )
        found = {key: value for key, value in found.items() if key in self.properties}
        return {**(outputs if self.energies else {}), **found}

    def _moments(self, rows: Tensor, graph: AtomGraph) -> dict[ElectricProperty, Tensor]:
        """Return dipole and quadrupole of what is read of the atoms, (n_atoms, 9)."""
        batch, n_graphs = graph.batch, graph.n_graphs
        charges, dipoles = rows[:, :1], rows[:, 1:4]
        if not self.charges:
            charges = torch.zeros_like(charges)
        elif bool(graph.pbc.any()):
            k = int(torch.nonzero(graph.pbc.any(dim=1))[0])
            raise ValueError(
                f"structure {k} of the batch is periodic, where Σ q r of its atoms has no meaning; "
                "take away pbc, or train a model with charges: false, which sums dipoles of atoms"
            )
        excess = segment_sum(charges, batch, n_graphs) - charge_of(graph)[:, None] * self.charges
        charges = charges - (excess / graph.natoms[:, None])[batch]
        r = graph.pos.to(torch.float64)
        r = r - segment_mean(r, batch, n_graphs)[batch]
        dipole = segment_sum(charges * r + dipoles, batch, n_graphs)
        # r (q r + 2 μ), made symmetric and without its trace, is q r r + r μ + μ r
        outer = r[:, :, None] * (charges * r + 2 * dipoles)[:, None]
        zero = torch.zeros_like(rows[:, :1])
        of_atoms = symmetric_tensor(torch.cat([zero, rows[:, 4:]], dim=1))
        total = segment_sum(((outer + outer.mT) / 2 + of_atoms).flatten(1), batch, n_graphs)
        total = total.unflatten(1, (3, 3))
        trace = total.diagonal(dim1=1, dim2=2).mean(dim=1)
        return {
            "dipole": dipole,
            "quadrupole": total - torch.diag_embed(trace[:, None].expand(-1, 3)),
        }


class Lift(nn.Module):
    """Features up to l = 2 from scalars: those of neighbours times a radial function and harmonics.

    Args:
        channels: Of the scalars and of what comes of them.
        cutoff: Å.
        num_radial: Bessel functions of the edge length.
    """

    def __init__(self, channels: int, cutoff: float, *, num_radial: int = 8) -> None:
        super().__init__()
        self.basis = BesselBasis(num_radial, cutoff)
        self.envelope = PolynomialEnvelope(cutoff)
        self.radial = MLP((num_radial, channels, 3 * channels))
        self.own, self.sent = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.paths = convolution_paths({SCALAR: channels}, _NATURAL, 2, True)

    def forward(self, h: Tensor, graph: AtomGraph) -> NodeFeatures:
        """Return (n_atoms, 9, channels) of scalars ``h`` (n_atoms, channels)."""
        vectors = graph.edge_vectors().to(h.dtype)
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        weights = self.radial(self.basis(lengths)) * self.envelope(lengths)[:, None]
        harmonics = spherical_harmonics(vectors, 2)
        sums = convolve(
            {SCALAR: self.sent(h)[:, None]}, weights, harmonics, graph.edge_index, self.paths
        )
        x = torch.cat(list(sums.values()), dim=1) / math.sqrt(2 * math.pi)
        return torch.cat([x[:, :1] + self.own(h)[:, None], x[:, 1:]], dim=1)
