"""PONITA as published: position-orientation space on one grid of directions, or on a point cloud.

Bekkers, Vadgama, Hesselink, van der Linden and Romero, Fast, Expressive SE(n) Equivariant Networks
through Weight-Sharing in Position-Orientation Space, ICLR 2024, arXiv:2310.02970; reference:
ebekkers/ponita, commit a584aa2. These take its weights and give its numbers. What we use is
:mod:`atomeq.models.ponita`, which mends what is listed here:

* with a grid (``num_ori`` > 0) turning a structure changes its energy, for the grid stays: by 2 %
  with 20 directions and random weights, forces by 5 %. The reference draws the grid anew whenever a
  network is made and keeps it in no checkpoint; here it is among the weights;
* the exact modes, a direction for each edge (-1) or none (0), join every direction of an atom with
  every one of its neighbours: for molecules by their bonds only. Their means over the directions
  of an atom jump with their number;
* without ``windowed`` messages have no envelope;
* the reference rescales its kernels by the first batch it is trained on. These are not: in
  distributed training every process would have its own.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import AtomisticModel
from atomeq.nn.radial import PolynomialEnvelope
from atomeq.ops.segment.operations import segment_mean, segment_sum
from atomeq.typing import EdgeIndex, Positions, PropertyKey


class PublishedPONITA(AtomisticModel):
    """Energies of molecules from one-hot elements, in any of the published modes.

    Args:
        cutoff: Å; pairs within it are joined, by default all of a molecule's.
        hidden_channels: Channels of atoms at each direction.
        basis_channels: Channels of the two bases of kernels.
        num_layers: Message-passing layers.
        num_ori: Directions of the grid; -1 for one direction an edge, 0 for none.
        degree: Of the polynomials of invariants.
        widening: Hidden channels of a layer, in ``hidden_channels``.
        layer_scale: What each layer's update is first multiplied by; None for no factor.
        windowed: End messages at the cutoff.
        multiple_readouts: Average the readouts of all layers, or take the last.
        elements: Atomic numbers that the one-hot input tells apart.
    """

    recordable = False

    def __init__(
        self,
        cutoff: float = 100.0,
        *,
        hidden_channels: int = 128,
        basis_channels: int = 256,
        num_layers: int = 5,
        num_ori: int = 20,
        degree: int = 3,
        widening: int = 4,
        layer_scale: float | None = None,
        windowed: bool = False,
        multiple_readouts: bool = True,
        elements: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8, 9),
    ) -> None:
        super().__init__()
        self.keep_arguments(locals())
        self.cutoff, self.elements = cutoff, list(elements)
        if num_ori > 0:
            reason = (
                "its grid of directions stays where it is: energies change by 2 % with 20 "
                "directions, forces by 5 %"
            )
            self.exempt_laws: Mapping[str, str] = dict.fromkeys(("rotation", "reflection"), reason)
        self.network = PositionOrientationNetwork(
            len(self.elements),
            hidden_channels=hidden_channels,
            basis_channels=basis_channels,
            num_layers=num_layers,
            num_ori=num_ori,
            degree=degree,
            widening=widening,
            layer_scale=layer_scale,
            radius=cutoff if windowed else None,
            multiple_readouts=multiple_readouts,
        )

    @property
    def embedding_channels(self) -> int:
        """Channels in which atoms are embedded."""
        return self.network.x_embedder.out_features

    def forward(self, graph: AtomGraph) -> dict[PropertyKey, Tensor]:
        """Return per-atom ``energies`` (n_atoms,), in the model's own scale.

        Raises:
            ValueError: A crystal, whose images the published graphs do not have.
        """
        if bool(graph.cell_offsets.any()):
            raise ValueError("the published PONITA knows no periodic images; use PONITA")
        known = torch.tensor(self.elements, device=graph.pos.device)
        one_hot = (graph.atomic_numbers[:, None] == known).to(self.dtype)
        pos = graph.pos.to(self.dtype)
        state = graph.get("electronic_state")
        state = None if state is None else state.index_select(0, graph.batch)
        scalars, _ = self.network(one_hot, pos, graph.edge_index, batch=graph.batch, state=state)
        return {"energies": scalars[:, 0]}


class Space(NamedTuple):
    """Points of position-orientation space: atoms times directions, or one direction a point.

    Attributes:
        atom: Of each point, (n_points,).
        directions: (n_points or 1, n_ori, 3).
        edge_index: Of points, (2, n_edges); loops and the way back are left out if ``mirrored``.
        invariants: Of each edge at each direction, (n_edges, n_ori, 1 to 3).
        window: (n_edges, 1, 1), or 1.
        mirrored: Whether the second half of the directions are the opposites of the first: then the
            way back at the opposite direction has the same invariants. The last edge is the loop.
    """

    atom: Tensor
    directions: Tensor
    edge_index: EdgeIndex
    invariants: Tensor
    window: Tensor | float
    mirrored: bool = False


class PositionOrientationNetwork(nn.Module):
    """The network in its three modes; names of submodules are the reference's.

    Args:
        n_inputs: Input scalars of an atom, and its input vectors.
        n_scalars: Scalars that come out for each atom.
        n_vectors: Vectors that come out.
        radius: Where the window ends messages, Å; None for no window.
        others: As of :class:`PublishedPONITA`.
    """

    ori_grid: Tensor

    def __init__(
        self,
        n_inputs: int,
        n_scalars: int = 1,
        n_vectors: int = 0,
        *,
        hidden_channels: int = 128,
        basis_channels: int = 256,
        num_layers: int = 5,
        num_ori: int = 20,
        degree: int = 3,
        widening: int = 4,
        layer_scale: float | None = None,
        radius: float | None = None,
        multiple_readouts: bool = True,
    ) -> None:
        super().__init__()
        self.num_ori, self.n_scalars, self.radius = num_ori, n_scalars, radius
        if num_ori == 0 and n_vectors:
            raise ValueError("positions alone give no vectors; choose num_ori other than 0")
        self.windowing_fn = None if radius is None else PolynomialEnvelope(radius, exponent=6)
        n_out = n_scalars + n_vectors
        self.x_embedder = nn.Linear(n_inputs, hidden_channels, bias=False)
        n_invariants = {0: 1, -1: 3}.get(num_ori, 2)
        sizes = (hidden_channels, basis_channels, degree)
        self.basis_fn = polynomial_basis(n_invariants, *sizes)
        self.fiber_basis_fn = polynomial_basis(1, *sizes) if num_ori > 0 else None
        if num_ori > 0:
            self.register_buffer("ori_grid", spiral_grid(num_ori))
        self.interaction_layers = nn.ModuleList(
            PublishedLayer(
                hidden_channels, basis_channels, widening, layer_scale, fibers=num_ori > 0
            )
            for _ in range(num_layers)
        )
        self.read_out_layers = nn.ModuleList(
            nn.Linear(hidden_channels, n_out)
            if multiple_readouts or layer == num_layers - 1
            else nn.Identity()
            for layer in range(num_layers)
        )

    def forward(
        self,
        scalars: Tensor,
        pos: Positions,
        edge_index: EdgeIndex,
        *,
        batch: Tensor,
        vectors: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return scalars (n_atoms, n_scalars) and vectors (n_atoms, n_vectors, 3) of each atom.

        Args:
            scalars: Inputs, (n_atoms, any).
            pos: (n_atoms, 3), Å.
            edge_index: Row 0 is the source; loops are added.
            batch: Structure of each atom, (n_atoms,).
            vectors: Inputs that turn along, (n_atoms, any, 3).
            state: Added to embedded atoms, (n_atoms, hidden_channels).
        """
        space = self.space(pos, edge_index, batch)
        n_ori = space.directions.shape[1]
        inputs = scalars[space.atom, None].expand(-1, n_ori, -1)
        if vectors is not None:
            lifted = torch.einsum("pvx,pox->pov", vectors[space.atom], space.directions)
            inputs = torch.cat([inputs, lifted], dim=2)
        x = self.x_embedder(inputs)  # (n_points, n_ori, C)
        if state is not None:
            x = x + state[space.atom, None]
        basis = self.basis_fn(space.invariants) * space.window  # (n_edges, n_ori, B)
        kernels = self._kernels(basis)
        fibers = None
        if self.fiber_basis_fn is not None:
            grid = space.directions[0]
            fibers = self.fiber_basis_fn((grid @ grid.T)[..., None])  # (n_ori, n_ori, B)
        readouts = []
        layers = zip(self.interaction_layers, kernels, self.read_out_layers, strict=True)
        for layer, kernel, read_out in layers:
            x = layer(x, kernel, fibers, space)
            if isinstance(read_out, nn.Linear):
                readouts.append(read_out(x))
        return self._read(torch.stack(readouts).mean(dim=0), space, len(pos))

    def space(self, pos: Positions, edge_index: EdgeIndex, batch: Tensor) -> Space:
        """Return the points of the mode and how they are joined."""
        n_atoms = len(pos)
        loops = torch.arange(n_atoms, device=pos.device).expand(2, -1)
        if self.num_ori >= 0:
            source, target = _coalesced(torch.cat([edge_index, loops], dim=1), n_atoms)
            separation = pos.index_select(0, source) - pos.index_select(0, target)  # to the source
            if self.num_ori:
                grid = self.ori_grid[None]
                if mirrored := self._mirrored(source, target):
                    source, target = source[source > target], target[source > target]
                    separation = pos.index_select(0, source) - pos.index_select(0, target)
                    separation = torch.cat([separation, separation.new_zeros(1, 3)])
                invariants = cylinder(separation[:, None], grid)
            else:
                mirrored = False
                grid = pos.new_zeros(1, 1, 3)
                invariants = torch.linalg.vector_norm(separation, dim=1)[:, None, None]
            directions = grid.expand(n_atoms, -1, -1)
            edges = torch.stack([source, target])
            window = self._window(separation)
            return Space(loops[0], directions, edges, invariants, window, mirrored)
        edges = _coalesced(edge_index[:, edge_index[0] != edge_index[1]], n_atoms)
        bonds = pos.index_select(0, edges[0]) - pos.index_select(0, edges[1])
        directions = bonds / torch.linalg.vector_norm(bonds, dim=1, keepdim=True)
        joined = _coalesced(torch.cat([edges, loops], dim=1), n_atoms)
        if self.radius is not None:
            near = torch.cdist(pos.detach(), pos.detach()) < self.radius
            joined = torch.stack(torch.where(near & (batch[:, None] == batch)))
        atom = edges[1]
        table = torch.zeros(n_atoms, n_atoms, dtype=torch.bool, device=pos.device)
        table[joined[0], joined[1]] = True
        source, target = torch.where(table[atom[:, None], atom])
        separation = pos[atom[source]] - pos[atom[target]]
        o, cosine = directions[target], (directions[source] * directions[target]).sum(1)
        invariants = torch.cat([cylinder(separation, o), cosine[:, None]], dim=1)[:, None]
        edges = torch.stack([source, target])
        return Space(atom, directions[:, None], edges, invariants, self._window(separation))

    def _mirrored(self, source: Tensor, target: Tensor) -> bool:
        """Return whether directions come with their opposites, and edges with the way back."""
        first, second = self.ori_grid.tensor_split(2)
        n = int(source.max()) + 1
        back = torch.sort(target * n + source).values
        return torch.equal(first, -second) and torch.equal(source * n + target, back)

    def _window(self, separation: Tensor) -> Tensor | float:
        if self.windowing_fn is None:
            return 1.0
        lengths = torch.linalg.vector_norm(separation, dim=1)
        return self.windowing_fn(lengths)[:, None, None]

    def _kernels(self, basis: Tensor) -> tuple[Tensor, ...]:
        """Return the kernels of all layers, each (n_edges, n_ori, C), from one product."""
        weights: list[Tensor] = [
            layer.get_parameter("conv.kernel.weight") for layer in self.interaction_layers
        ]
        joined = nn.functional.linear(basis, torch.cat(weights))
        return joined.chunk(len(weights), dim=-1)

    def _read(self, values: Tensor, space: Space, n_atoms: int) -> tuple[Tensor, Tensor | None]:
        scalars, along = values.split(
            [self.n_scalars, values.shape[2] - self.n_scalars], dim=2
        )  # (n_points, n_ori, any)
        vectors = torch.einsum("pov,pox->pvx", along, space.directions) / values.shape[1]
        scalars = scalars.mean(dim=1)
        if self.num_ori < 0:
            scalars, vectors = (
                segment_mean(part, space.atom, n_atoms) for part in (scalars, vectors)
            )
        return scalars, vectors if along.shape[2] else None


class PublishedLayer(nn.Module):
    """ConvNeXt's block around a convolution over positions and one over directions."""

    def __init__(
        self, channels: int, n_basis: int, widening: int, scale: float | None, *, fibers: bool
    ) -> None:
        super().__init__()
        self.conv = SeparableConvolution(channels, n_basis, fibers=fibers)
        self.norm = nn.LayerNorm(channels)
        self.linear_1 = nn.Linear(channels, widening * channels)
        self.linear_2 = nn.Linear(widening * channels, channels)
        self.layer_scale = None if scale is None else nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor, kernel: Tensor, fibers: Tensor | None, space: Space) -> Tensor:
        """Return features (n_points, n_ori, C), updated."""
        y = self.norm(self.conv(x, kernel, fibers, space))
        y = self.linear_2(nn.functional.gelu(self.linear_1(y)))
        return x + (y if self.layer_scale is None else self.layer_scale * y)


class SeparableConvolution(nn.Module):
    """Sum over sources at the same direction, then the mean over directions by their angles."""

    def __init__(self, channels: int, n_basis: int, *, fibers: bool) -> None:
        super().__init__()
        self.kernel = nn.Linear(n_basis, channels, bias=False)  # applied for all layers at once
        self.fiber_kernel = nn.Linear(n_basis, channels, bias=False) if fibers else None
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, kernel: Tensor, fibers: Tensor | None, space: Space) -> Tensor:
        """Return the convolved features, (n_points, n_ori, C)."""
        source, target = space.edge_index
        if space.mirrored:
            half, loop = x.shape[1] // 2, kernel[-1]
            kernel, opposite = kernel[:-1], x.roll(half, dims=1)
            back = segment_sum(kernel * opposite.index_select(0, target), source, len(x))
            m = back.roll(half, dims=1) + loop * x
            m = m + segment_sum(kernel * x.index_select(0, source), target, len(x))
        else:
            m = segment_sum(kernel * x.index_select(0, source), target, len(x))
        if self.fiber_kernel is not None:
            m = torch.einsum("pac,abc->pbc", m, self.fiber_kernel(fibers)) / m.shape[1]
        return m + self.bias


class PolynomialFeatures(nn.Module):
    """All ordered products of up to ``degree`` invariants."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.degree = degree

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, n + n² + ...) of invariants (*, n)."""
        powers = [x]
        for _ in range(self.degree - 1):
            powers.append((powers[-1][..., :, None] * x[..., None, :]).flatten(-2))
        return torch.cat(powers, dim=-1)


def polynomial_basis(n: int, hidden: int, n_basis: int, degree: int) -> nn.Sequential:
    """Return the perceptron of polynomials that kernels are linear in."""
    n_features = sum(n**power for power in range(1, degree + 1))
    return nn.Sequential(
        PolynomialFeatures(degree),
        nn.Linear(n_features, hidden),
        nn.GELU(),
        nn.Linear(hidden, n_basis),
        nn.GELU(),
    )


def cylinder(separation: Tensor, directions: Tensor) -> Tensor:
    """Return the parts along and across directions, (*, 2), of separations (*, 3)."""
    along = (separation * directions).sum(dim=-1, keepdim=True)
    across = torch.linalg.vector_norm(separation - along * directions, dim=-1, keepdim=True)
    return torch.cat([along, across], dim=-1)


def spiral_grid(n: int) -> Tensor:
    """Return n directions evenly spread over the sphere, (n, 3), the same at every call.

    Of an even number the second half are the opposites of the first.
    """
    n_drawn = n // 2 if n % 2 == 0 else n
    steps = torch.arange(n_drawn, dtype=torch.float64)
    z = 1 - (2 * steps + 1) / n
    turn = math.pi * (3 - math.sqrt(5)) * steps
    rho = (1 - z * z).sqrt()
    grid = torch.stack([rho * turn.cos(), rho * turn.sin(), z], dim=1).float()
    return grid if n % 2 else torch.cat([grid, -grid])


def _coalesced(edge_index: EdgeIndex, n_atoms: int) -> Tensor:
    """Return the edges once each, sorted by source and then by target."""
    keys = torch.unique(edge_index[0] * n_atoms + edge_index[1])
    return torch.stack([keys // n_atoms, keys % n_atoms])
