"""The reference backend: every operation in plain torch, for any device, degree and dtype.

It is the truth the other backends are tested against, and what runs on a CPU.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from atomeq.ops.blocks import blocks
from atomeq.ops.coupling.clebsch_gordan import Coupling, Form, coupling_table, couplings
from atomeq.ops.edge import traced_rotation
from atomeq.ops.edge.frame import EdgeFrame
from atomeq.ops.edge.reference_rotation import gather_rotate, rotate_back, rotate_scatter
from atomeq.ops.edge.wigner import edge_wigner
from atomeq.ops.harmonics.polynomials import Normalization, directions, harmonic_polynomials
from atomeq.ops.orders import row_degrees
from atomeq.ops.paths import Mode, Path, RadialMap, made_weights
from atomeq.ops.specification import OpSpec
from atomeq.ops.sphere.grid import SphereGrid
from atomeq.ops.sphere.pointwise import pointwise_product
from atomeq.ops.sphere.silu import silu_on_grid
from atomeq.ops.tables import table_like


class ReferenceBackend:
    """Plain torch; see :class:`~atomeq.ops.dispatch.Backend` for what each method does."""

    name = "reference"

    def refusal(self, spec: OpSpec) -> str | None:
        """Return None: everything is served."""
        return None

    def by_torch(self, spec: OpSpec) -> bool:
        """All of it."""
        return True

    def spherical_harmonics(
        self, vectors: Tensor, lmax: int, normalization: Normalization, normalize: bool
    ) -> Tensor:
        """Evaluate the harmonics by recursion."""
        points = directions(vectors)[0] if normalize else vectors
        return harmonic_polynomials(points, lmax, normalization)

    def edge_wigner(self, vectors: Tensor, lmax: int, mmax: int) -> Tensor:
        """Return the Wigner rows that take edges to +y."""
        return edge_wigner(vectors, lmax, mmax)

    def rotate_to_edge(self, x: Tensor, frame: EdgeFrame, indices: tuple[Tensor, ...]) -> Tensor:
        """Gather by each index, join the channels, rotate into the edge frames."""
        if torch.compiler.is_compiling():
            return traced_rotation.rotate_to_edge(x, frame, indices)
        return gather_rotate(x, frame.vectors, frame.wigner, frame.lmax, indices)

    def rotate_from_edge(
        self, y: Tensor, frame: EdgeFrame, envelope: Tensor | None, total: bool
    ) -> Tensor:
        """Rotate back to the lab frame and, if total, sum on the targets."""
        if torch.compiler.is_compiling():
            return traced_rotation.rotate_from_edge(y, frame, envelope, total=total)
        if total:
            return rotate_scatter(
                y, frame.vectors, envelope, frame.wigner, frame.lmax, frame.target, frame.n_atoms
            )
        lab = rotate_back(y, frame.vectors, frame.wigner, frame.lmax)
        return lab if envelope is None else lab * envelope[:, None, None]

    def so2_linear(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        c_out: int,
        bias: Tensor | None,
        scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Mix degrees and channels within each order by one matrix product per order."""
        c_in = x.shape[2]
        degrees = [weight.shape[-1] // c_in for weight in weights]  # lmax - m + 1
        sizes = [n * min(m + 1, 2) for m, n in enumerate(degrees)]
        # One split: its gradient is one concatenation, where slices would each fill a tensor.
        rows = [part.flatten(1) for part in x.split(sizes, dim=1)]
        if scale is not None:
            factors = scale.split([n * c_in for n in degrees], dim=1)
            rows = [_scaled(part, factor) for part, factor in zip(rows, factors, strict=True)]
        mixed = [torch.nn.functional.linear(rows[0], weights[0], bias)]
        mixed += [_mix_pair(pair, w) for pair, w in zip(rows[1:], weights[1:], strict=True)]
        n_scalars = mixed[0].shape[1] - sizes[0] * c_out
        scalars, mixed[0] = mixed[0].split([n_scalars, sizes[0] * c_out], dim=1)
        return torch.cat(mixed, dim=1).unflatten(1, (sum(sizes), c_out)), scalars

    def escn_conv(
        self,
        x: Tensor,
        frame: EdgeFrame,
        first: list[Tensor],
        second: list[Tensor],
        radial: Tensor | None,
        radial_weight: Tensor | None,
        radial_bias: Tensor | None,
        envelope: Tensor | None,
        recompute: bool,
    ) -> Tensor:
        """Return a whole edge layer; everything is kept for the backward pass."""
        if radial is not None and radial_weight is not None:
            radial = torch.nn.functional.linear(radial, radial_weight, radial_bias)
        c_out, hidden = (size // (frame.lmax + 1) for size in second[0].shape)
        rows = self.rotate_to_edge(x, frame, (frame.source, frame.target))
        rows, gates = self.so2_linear(rows, first, hidden, None, radial)
        gates = torch.sigmoid(gates.unflatten(1, (frame.lmax, hidden))) if frame.lmax else gates
        scalars, higher = rows.split([1, rows.shape[1] - 1], dim=1)
        degrees = table_like(row_degrees, frame.lmax, frame.mmax, like=x)[1:]
        if frame.lmax:
            higher = higher * gates.index_select(1, degrees - 1)
        rows = torch.cat((torch.nn.functional.silu(scalars), higher), dim=1)
        rows, _ = self.so2_linear(rows, second, c_out, None, None)
        return self.rotate_from_edge(rows, frame, envelope, True)

    def tensor_product(
        self,
        x: Tensor,
        y: Tensor,
        weights: Tensor | None,
        paths: tuple[Path, ...],
        mode: Mode,
        stacked: bool,
    ) -> Tensor:
        """Couple groups of paths by one matrix each, weight them and sum those of equal l3."""
        form = Form(paths, mode, stacked)
        n_terms = form.n_terms(x.shape[-1], y.shape[-1])
        products: dict[int, Tensor] = {}
        for coupling in couplings(paths, mode):
            table = table_like(coupling_table, form, coupling, n_terms, like=x)
            coupled = _coupled(x, y, table, coupling, mode)  # (*, rows of these paths, channels)
            sizes = [2 * paths[number].l3 + 1 for number in coupling.numbers]
            for number, part in zip(coupling.numbers, coupled.split(sizes, dim=-2), strict=True):
                products[number] = _weighted(part, weights, number, mode)
        ordered = [products[number] for number in range(len(paths))]
        return torch.cat(ordered, dim=-2) if stacked else _summed(ordered, paths)

    def cg_conv(
        self,
        x: Tensor,
        y: Tensor,
        weights: Tensor | None,
        edge_index: Tensor,
        n_atoms: int,
        paths: tuple[Path, ...],
        mode: Mode,
        stacked: bool,
        radial_map: RadialMap | None,
    ) -> Tensor:
        """Gather x on the sources, couple it with y, sum on the targets."""
        weights = made_weights(weights, radial_map)
        gathered = x.index_select(0, edge_index[0])
        messages = self.tensor_product(gathered, y, weights, paths, mode, stacked)
        return self.segment_sum(messages, edge_index[1], n_atoms)

    def sphere_pointwise(
        self, x: Tensor, fn: Callable[[Tensor], Tensor], grid: SphereGrid
    ) -> Tensor:
        """Apply a function between two matrix products, in blocks unless a gradient is wanted."""
        to_grid, from_grid = grid.to_matrix(like=x), grid.from_matrix(like=x)
        flat = x.reshape(-1, *x.shape[-2:])
        results = []
        for block in blocks(flat.shape[0], grid.n_points * x.shape[-1], x.device):
            results.append(from_grid @ fn(to_grid @ flat[block]))
            if results[0].requires_grad:  # all at once: every block would keep a graph of its own
                return from_grid @ fn(to_grid @ x)
        if not results:
            return from_grid @ fn(to_grid @ x)
        return torch.cat(results).reshape(*x.shape[:-2], -1, x.shape[-1])

    def sphere_silu(self, x: Tensor, grid: SphereGrid) -> Tensor:
        """Apply SiLU between two matrix products, keeping nothing but the coefficients."""
        return silu_on_grid(x, grid)

    def sphere_product(
        self, x: Tensor, y: Tensor, left: Tensor, right: Tensor, out: Tensor
    ) -> Tensor:
        """Multiply values between matrix products, keeping nothing but the coefficients."""
        return pointwise_product(x, y, left, right, out)

    def segment_sum(self, x: Tensor, index: Tensor, n_segments: int) -> Tensor:
        """Sum the members of each segment, in their order."""
        return x.new_zeros(n_segments, *x.shape[1:]).index_add(0, index, x)

    def segment_softmax(self, logits: Tensor, index: Tensor, n_segments: int) -> Tensor:
        """Normalise the members of each segment."""
        # The shift cancels in the ratio, so it needs no gradient; it keeps exp from overflowing.
        rows = index.view(-1, *(1 for _ in logits.shape[1:])).expand_as(logits)
        lowest = logits.new_full((n_segments, *logits.shape[1:]), -torch.inf)
        peaks = lowest.scatter_reduce(0, rows, logits.detach(), reduce="amax")
        weights = (logits - peaks.index_select(0, index)).exp()
        totals = self.segment_sum(weights, index, n_segments)
        return weights / totals.index_select(0, index)


def _scaled(rows: Tensor, factor: Tensor) -> Tensor:
    """Multiply +m and -m, side by side in a row, by the same factors."""
    return (rows.unflatten(1, (-1, factor.shape[1])) * factor.unsqueeze(1)).flatten(1)


def _mix_pair(pair: Tensor, weight: Tensor) -> Tensor:
    """Multiply +m and -m, side by side in a row, by a real or by a complex matrix."""
    if weight.ndim == 2:
        return (pair.unflatten(1, (2, -1)) @ weight.T).flatten(1)
    real, imaginary = weight.unbind(0)
    # [[W_1, -W_2], [W_2, W_1]]: one matrix product instead of four and two sums
    matrix = torch.cat(
        (torch.cat((real, -imaginary), dim=1), torch.cat((imaginary, real), dim=1)), dim=0
    )
    return pair @ matrix.T


def _coupled(x: Tensor, y: Tensor, table: Tensor, coupling: Coupling, mode: Mode) -> Tensor:
    """Contract a group of paths with its table, (rows of y, rows of output, 2 l1 + 1)."""
    first, last = coupling.rows2
    left = x[..., coupling.l1**2 : (coupling.l1 + 1) ** 2, :]
    if mode == "uvu":
        return (y[..., first:last] @ table.flatten(1)).unflatten(-1, table.shape[1:]) @ left
    right = y[..., first:last, :]
    if mode == "uuu":
        outer = right.unsqueeze(-2) * left.unsqueeze(-3)  # (*, d2, d1, channels)
    else:
        outer = (right[..., :, None, None, :] * left[..., None, :, :, None]).flatten(-2)
    return table.transpose(0, 1).flatten(1) @ outer.flatten(-3, -2)  # (*, rows, channels)


def _weighted(part: Tensor, weights: Tensor | None, number: int, mode: Mode) -> Tensor:
    if weights is None:
        return part
    if mode == "uvw":
        return part @ weights[..., number, :, :, :].flatten(-3, -2)
    return part * weights[..., number, None, :]


def _summed(products: list[Tensor], paths: tuple[Path, ...]) -> Tensor:
    """Sum the paths of equal l3; a degree that no path reaches is zero."""
    totals: dict[int, Tensor] = {}
    for product, path in zip(products, paths, strict=True):
        totals[path.l3] = totals[path.l3] + product if path.l3 in totals else product
    *batch, _, channels = products[0].shape
    for l in range(max(totals)):
        if l not in totals:
            totals[l] = products[0].new_zeros(*batch, 2 * l + 1, channels)
    return torch.cat([totals[l] for l in range(len(totals))], dim=-2)
