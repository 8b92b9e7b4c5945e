"""Reducing SO(3) Convolutions to SO(2) for Efficient Equivariant GNNs, as published.

Passaro and Zitnick, ICML 2023, arXiv:2302.03655, compatible with published weights. It shares with
:class:`atomeq.models.escn.ESCN`, our form of the paper, the rotation into the edge frame and no
more: messages of source and target have separate maps with a hidden layer each, features may have
several resolutions side by side, atoms are updated on a grid and the output is read from points
sampled on the sphere. One class for both would be two classes in a trench coat.

Known about this form, and mended in ours: the energy jumps where the cap on neighbours or the
cutoff drops an edge; SiLU on the grid and the sampled output break equivariance at the level of 1 %
and forces are no derivative of the energy. The roll of the edge frame, random in the reference
code, is fixed here; ``edge_rotation`` feeds one in.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import GraphBuilder, neighbor_graph
from atomeq.models.base import AtomisticModel
from atomeq.nn.edge_network import ElementPair
from atomeq.nn.pair_mlp import gathered
from atomeq.nn.radial import GaussianBasis, LearnedBasis, SigmoidBasis
from atomeq.nn.sphere import SphereActivation, SphereBlock, point_silu, set_resolution
from atomeq.ops.edge.frame import EdgeFrame
from atomeq.ops.edge.operations import rotate_from_edge, rotate_to_edge
from atomeq.ops.edge.wigner import build_edge_frame
from atomeq.ops.harmonics.operations import spherical_harmonics
from atomeq.ops.sphere.operations import sphere_pointwise
from atomeq.ops.tables import constant_table, table_like
from atomeq.typing import AtomicNumbers, NodeFeatures, PropertyKey

RadialBasis = Literal["gaussian", "sigmoid", "linearsigmoid", "silu"]
ENERGY_SCALE = 0.001  # "helps balance numerical precision of energies and forces"


class PublishedESCN(AtomisticModel):
    """Equivariant spherical channel network with a head for forces.

    Args:
        cutoff: Radius of the graph, Å.
        lmax: Highest degree of each resolution.
        mmax: Highest order of each resolution in the edge frame.
        num_layers: Layers.
        sphere_channels: Channels of each resolution.
        hidden_channels: Width of hidden layers.
        edge_channels: Width of the network of the edge length.
        num_sphere_samples: Points from which energy and forces are read.
        radial_basis: ``gaussian``, ``sigmoid``, ``linearsigmoid`` or ``silu`` (trained).
        basis_width: Width of basis functions, in units of their spacing.
        distance_resolution: Spacing of basis functions, Å.
        num_elements: Atomic numbers below this are embedded.
        grid_resolution: Polar angles and azimuths of grids; None is the least that resolves the
            features. No weight depends on it.
        max_neighbors: Keep this many nearest neighbours; None keeps all.
        strict_neighbors: Keep exactly so many, and not equally far ones beyond
            (:class:`~atomeq.graph.builders.NearestNeighborGraph`).
        direct_forces: Whether there is a force head.
        energy_reduce: ``sum`` over atoms times 0.001, or ``mean``.

    Raises:
        ValueError: An ``mmax`` exceeds its ``lmax``.
    """

    cutoff: float
    num_sphere_samples: int
    lmax: Sequence[int]
    mmax: Sequence[int]
    basis_width: float
    distance_resolution: float
    grid_resolution: int | None
    max_neighbors: int | None
    strict_neighbors: bool
    energy_reduce: str

    def __init__(
        self,
        cutoff: float = 12.0,
        *,
        lmax: Sequence[int] = (6,),
        mmax: Sequence[int] = (2,),
        num_layers: int = 12,
        sphere_channels: int = 128,
        hidden_channels: int = 256,
        edge_channels: int = 128,
        num_sphere_samples: int = 128,
        radial_basis: RadialBasis = "gaussian",
        basis_width: float = 2.0,
        distance_resolution: float = 0.02,
        num_elements: int = 90,
        grid_resolution: int | None = None,
        max_neighbors: int | None = 20,
        strict_neighbors: bool = True,
        direct_forces: bool = True,
        energy_reduce: Literal["sum", "mean"] = "sum",
    ) -> None:
        super().__init__()
        if (
            not lmax
            or len(lmax) != len(mmax)
            or any(m > l for l, m in zip(lmax, mmax, strict=True))
        ):
            raise ValueError(f"every resolution needs mmax <= lmax; got lmax={lmax}, mmax={mmax}")
        self.keep_arguments(locals())
        self.receptive_depth = num_layers if energy_reduce == "sum" else None
        if direct_forces:
            self.outputs = frozenset({"energies", "forces"})
        resolutions = list(zip(lmax, mmax, strict=True))
        channels = len(resolutions) * sphere_channels
        self.embedding = nn.Embedding(num_elements, channels)
        self.basis = self._basis(radial_basis)
        self.layers = nn.ModuleList(
            PublishedESCNLayer(
                resolutions, sphere_channels, hidden_channels,
                SumNetwork(self.basis.num_radial, edge_channels, num_elements),
                grid_resolution,
            )
            for _ in range(num_layers)
        )  # fmt: skip
        self.energy = PointNetwork(channels)
        self.forces = PointNetwork(channels) if direct_forces else None

    def graph_builder(self) -> GraphBuilder:
        """Return the builder of the nearest neighbours within the cutoff."""
        return neighbor_graph(self.cutoff, self.max_neighbors, strict=self.strict_neighbors)

    def set_grid_resolution(self, grid_resolution: int | None) -> None:
        """Compute on other grids from now on; the finer, the more equivariant and the slower."""
        self.grid_resolution = grid_resolution
        set_resolution(self, grid_resolution)

    def forward(
        self, graph: AtomGraph, *, edge_rotation: Tensor | None = None
    ) -> dict[PropertyKey, Tensor]:
        """Compute energies, and forces if they have a head, in the model's own scale.

        Args:
            graph: Structures with edges.
            edge_rotation: Rotations that take each edge to +y, (n_edges, 3, 3), to set its roll;
                by default a rule without randomness.

        Returns:
            ``energies`` (n_atoms,) and ``features``, and ``forces`` (n_atoms, 3) with a head.
        """
        numbers = graph.atomic_numbers
        vectors = graph.edge_vectors().to(self.dtype)
        frames = [
            build_edge_frame(
                vectors, graph.edge_index, n_atoms=graph.n_atoms, lmax=l, mmax=m,
                rotation=edge_rotation,
            )
            for l, m in zip(self.lmax, self.mmax, strict=True)
        ]  # fmt: skip
        basis = self.basis(frames[0].lengths)  # (n_edges, num_radial)
        scalars = self.with_state(self.embedding(numbers), graph).chunk(len(frames), dim=1)
        x = [
            nn.functional.pad(s[:, None], (0, 0, 0, (l + 1) ** 2 - 1))
            for s, l in zip(scalars, self.lmax, strict=True)
        ]  # one (n_atoms, n_sph, C) for each resolution
        for k, layer in enumerate(self.layers):
            y = layer(x, frames, basis, numbers)
            x = [a + b for a, b in zip(x, y, strict=True)] if k else y
        return self._read_out(x, graph)

    def _read_out(self, x: list[NodeFeatures], graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        """Read energies and forces from the features at points on the sphere."""
        n_samples = self.num_sphere_samples
        values = [
            table_like(sphere_point_harmonics, n_samples, l, like=part) @ part
            for part, l in zip(x, self.lmax, strict=True)
        ]
        samples = torch.cat(values, dim=2)  # (n_atoms, n_samples, all channels)
        features = self.energy.hidden(samples)
        energies = self.energy.third(features).mean(dim=1)[:, 0]
        if self.energy_reduce == "mean":
            energies = energies / graph.natoms[graph.batch]
        else:
            energies = energies * ENERGY_SCALE
        outputs: dict[PropertyKey, Tensor] = {
            "energies": energies,
            "features": features.mean(dim=1),
        }
        if self.forces is not None:
            points = table_like(sphere_points, n_samples, like=samples)
            outputs["forces"] = (self.forces(samples) * points).mean(dim=1)
        return outputs

    def _basis(self, name: RadialBasis) -> GaussianBasis | SigmoidBasis | LearnedBasis:
        num_radial = int(self.cutoff / self.distance_resolution)
        if name == "gaussian":
            return GaussianBasis(num_radial, self.cutoff, width=self.basis_width)
        if name == "silu":
            return LearnedBasis(num_radial)
        slopes = {"sigmoid": 0.0, "linearsigmoid": 0.001}
        if name not in slopes:
            raise ValueError(f"radial_basis {name!r} is unknown; it is gaussian, silu, {slopes}")
        return SigmoidBasis(num_radial, self.cutoff, width=self.basis_width, slope=slopes[name])


class PublishedESCNLayer(nn.Module):
    """Messages, their sum on each atom, and a perceptron on the grid that joins both."""

    def __init__(
        self,
        resolutions: Sequence[tuple[int, int]],
        channels: int,
        hidden_channels: int,
        edge_network: "SumNetwork",
        grid_resolution: int | None,
    ) -> None:
        super().__init__()
        edge_channels = edge_network.out_channels
        self.edge_network = edge_network
        self.source = SO2Block(resolutions, channels, hidden_channels, edge_channels)
        self.target = SO2Block(resolutions, channels, hidden_channels, edge_channels)
        self.activations = nn.ModuleList(
            SphereActivation(
                *(l, m),
                order="m",
                normalization="integral",
                rescale=False,
                grid_resolution=grid_resolution,
            )
            for l, m in resolutions
        )
        self.update = GridUpdate([l for l, _ in resolutions], channels, grid_resolution)

    def forward(
        self, x: list[NodeFeatures], frames: list[EdgeFrame], basis: Tensor, numbers: Tensor
    ) -> list[NodeFeatures]:
        """Return the update of each resolution, (n_atoms, n_sph, channels)."""
        scalars = self.edge_network(numbers, basis, (frames[0].source, frames[0].target))
        source = [rotate_to_edge(p, f, side="source") for p, f in zip(x, frames, strict=True)]
        hidden = self.source(source, scalars)
        del source
        target = [rotate_to_edge(p, f, side="target") for p, f in zip(x, frames, strict=True)]
        messages = self.target.sum_of_maps((hidden, self.target(target, scalars)))
        del hidden, target
        total = [
            rotate_from_edge(activation(rows), frame)
            for rows, activation, frame in zip(messages, self.activations, frames, strict=True)
        ]
        return self.update(x, total)


class SumNetwork(ElementPair):
    """Invariants of an edge from its length and the elements at both ends, which are added."""

    def __init__(self, num_radial: int, out_channels: int, num_elements: int) -> None:
        super().__init__(num_elements, out_channels)
        self.out_channels = out_channels
        self.first = nn.Linear(num_radial, out_channels)
        self.second = nn.Linear(out_channels, out_channels)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - of edges, not of atoms
        self, numbers: AtomicNumbers, basis: Tensor, ends: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return (n_edges, out_channels) from the basis and the elements at both ends."""
        hidden = gathered(*super().forward(numbers), ends) + self.first(basis)
        return nn.functional.silu(self.second(nn.functional.silu(hidden)))


#: Of +m and -m, or of m = 0 alone, values and the matrices whose products with them a map sums.
Terms = list[tuple[list[Tensor], list[Tensor]]]


class SO2Block(nn.Module):
    """SO(2) map with a hidden layer for each order m, gated by the edge's invariants.

    All resolutions are mixed. Within order m the features are ordered by resolution, degree and
    channel. The last map is left to :meth:`sum_of_maps`.
    """

    def __init__(
        self,
        resolutions: Sequence[tuple[int, int]],
        channels: int,
        hidden_channels: int,
        edge_channels: int,
    ) -> None:
        super().__init__()
        self.resolutions = tuple(resolutions)
        self.channels = channels
        self.orders = nn.ModuleList()
        for order in range(max(m for _, m in resolutions) + 1):
            width = sum(l - order + 1 for l, m in resolutions if m >= order) * channels
            block = ScalarMap if order == 0 else PairMap
            self.orders.append(block(width, hidden_channels, edge_channels))

    def forward(self, x: list[Tensor], scalars: Tensor) -> list[Terms]:
        """Map the rows of each resolution, m-primary, up to the hidden layer of each order.

        Args:
            x: One for each resolution, (n_edges, n_rows, channels).
            scalars: (n_edges, edge_channels).
        """
        degrees = [  # rows of each sign of each order; +m stands before -m
            [l - k + 1 for k in range(m + 1) for _ in range(min(k + 1, 2))]
            for l, m in self.resolutions
        ]
        signs = [rows.split(sizes, dim=1) for rows, sizes in zip(x, degrees, strict=True)]
        found = []
        for order, block in enumerate(self.orders):
            inputs = [
                joined([signs[r][k].flatten(1) for r in self._present(order)])
                for k in range(max(2 * order - 1, 0), 2 * order + 1)
            ]
            found.append(block(*inputs, scalars))
        return found

    def sum_of_maps(self, found: Sequence[list[Terms]]) -> list[Tensor]:
        """Return the rows of each resolution, summed over what blocks of this shape have returned.

        Each sign of an order is one product with all of them: no part of the sum is written.
        """
        results: list[list[Tensor]] = [[] for _ in self.resolutions]
        for order in range(len(self.orders)):
            present = self._present(order)
            widths = [(self.resolutions[r][0] - order + 1) * self.channels for r in present]
            for terms in zip(*(own[order] for own in found), strict=True):
                values = torch.cat([value for own, _ in terms for value in own], dim=1)
                matrix = torch.cat([matrix for _, own in terms for matrix in own], dim=1)
                rows = nn.functional.linear(values, matrix)
                for r, part in zip(present, rows.split(widths, dim=1), strict=True):
                    results[r].append(part.unflatten(1, (-1, self.channels)))
        return [torch.cat(rows, dim=1) for rows in results]

    def _present(self, order: int) -> list[int]:
        return [r for r, (_, m) in enumerate(self.resolutions) if m >= order]


class ScalarMap(nn.Module):
    """The map of m = 0, whose features are invariant about the edge."""

    def __init__(self, width: int, hidden_channels: int, edge_channels: int) -> None:
        super().__init__()
        self.radial = nn.Linear(edge_channels, hidden_channels)
        self.first = nn.Linear(width, hidden_channels, bias=False)
        self.second = nn.Linear(hidden_channels, width, bias=False)

    def forward(self, x: Tensor, scalars: Tensor) -> Terms:
        """Map ``x`` (n_edges, width)."""
        gate = nn.functional.silu(self.radial(scalars))
        return [([self.first(x) * gate], [self.second.weight])]


class PairMap(nn.Module):
    """The map of m > 0: +m and -m are multiplied like the parts of a complex number."""

    def __init__(self, width: int, hidden_channels: int, edge_channels: int) -> None:
        super().__init__()
        self.radial = nn.Linear(edge_channels, 2 * hidden_channels)
        self.real_first = nn.Linear(width, hidden_channels, bias=False)
        self.real_second = nn.Linear(hidden_channels, width, bias=False)
        self.imag_first = nn.Linear(width, hidden_channels, bias=False)
        self.imag_second = nn.Linear(hidden_channels, width, bias=False)

    def forward(self, plus: Tensor, minus: Tensor, scalars: Tensor) -> Terms:
        """Map the features of +m and -m, each (n_edges, width): y = (R + i I) (x+ + i x-)."""
        gate = nn.functional.silu(self.radial(scalars))
        first = torch.cat([self.real_first.weight, self.imag_first.weight])
        real_plus, imag_plus = (nn.functional.linear(plus, first) * gate).chunk(2, dim=1)
        real_minus, imag_minus = (nn.functional.linear(minus, first) * gate).chunk(2, dim=1)
        real, imag = self.real_second.weight, self.imag_second.weight
        return [([real_plus, imag_minus], [real, -imag]), ([real_minus, imag_plus], [real, imag])]


class GridUpdate(SphereBlock):
    """A perceptron of features and messages at every point of the sphere, alike.

    Its first and last layer are linear without bias, so they act on coefficients
    (:class:`atomeq.nn.sphere.GridMLP`).
    """

    def __init__(self, lmax: Sequence[int], channels: int, grid_resolution: int | None) -> None:
        super().__init__(
            max(lmax), max(lmax), normalization="integral", grid_resolution=grid_resolution
        )
        self.degrees = tuple(lmax)
        self.channels = channels
        total = len(lmax) * channels
        self.first = nn.Linear(2 * total, total, bias=False)
        self.second = nn.Linear(total, total, bias=False)
        self.third = nn.Linear(total, total, bias=False)

    def forward(self, x: list[NodeFeatures], message: list[NodeFeatures]) -> list[NodeFeatures]:
        """Return the update of each resolution, (n_atoms, n_sph, channels)."""
        n_sph = (self.lmax + 1) ** 2
        padded = [nn.functional.pad(p, (0, 0, 0, n_sph - p.shape[1])) for p in (*x, *message)]
        y = self.first(torch.cat(padded, dim=2))  # (n_atoms, n_sph, all channels)
        y = self.third(sphere_pointwise(y, self._at_points, self.grid))
        parts = y.split(self.channels, dim=2)
        return [p[:, : (l + 1) ** 2] for p, l in zip(parts, self.degrees, strict=True)]

    def _at_points(self, values: Tensor) -> Tensor:
        return point_silu(self.second(point_silu(values)))


class PointNetwork(nn.Module):
    """A perceptron from the features at a point of the sphere to one number."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Linear(channels, channels)
        self.second = nn.Linear(channels, channels)
        self.third = nn.Linear(channels, 1, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        """Map ``values`` (n_atoms, n_samples, channels) to (n_atoms, n_samples, 1)."""
        return self.third(self.hidden(values))

    def hidden(self, values: Tensor) -> Tensor:
        """Return what the last map is given, (n_atoms, n_samples, channels)."""
        return point_silu(self.second(point_silu(self.first(values))))


def joined(parts: list[Tensor]) -> Tensor:
    """Join features along the last axis; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@constant_table
def sphere_points(count: int) -> Tensor:
    """Return Fibonacci points, each scaled by the density around it, (count, 3) float64.

    The published code means the densities as weights but multiplies the points by them, so they lie
    a few per cent off the unit sphere.
    """
    steps = np.arange(count)
    azimuth = 2 * math.pi * steps / ((1 + math.sqrt(5)) / 2)
    polar = np.arccos(1 - 2 * (steps + 0.5) / count)
    points = np.stack(
        [np.cos(azimuth) * np.sin(polar), np.sin(azimuth) * np.sin(polar), np.cos(polar)], axis=1
    )
    squared = ((points[:, None] - points) ** 2).sum(axis=2)
    room = 1 / np.exp(-squared / 0.15).sum(axis=1)
    return torch.from_numpy(points * (count * room / room.sum())[:, None])


@constant_table
def sphere_point_harmonics(count: int, lmax: int) -> Tensor:
    """Return the orthonormal harmonics, as polynomials, at the points, (count, n_sph) float64."""
    points = sphere_points(count)
    return spherical_harmonics(points, lmax, normalize=False, normalization="integral")
