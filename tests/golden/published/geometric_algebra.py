"""Geometric-algebra attention over dense clouds, and the potential of its notebook, as published.

Spellings, arXiv:2110.02393; reference klarh/geometric_algebra_attention, commit df6dcbd. Clouds are
(batch, n, ...); a tuple of ``rank`` points has an axis for each of them.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from atomeq.nn.multivector_attention import Mode, invariants_of, products_of, vectors_of

Layout = Literal["vector", "multivector"]


class TupleAttention(nn.Module):
    """Attention over tuples: invariants, or with ``covariant`` vectors or multivectors, come out.

    Args:
        n_dim: Channels of the points.
        layout: What points are.
        covariant: Which products are summed to the output; None for invariants.
        rank: Points in a tuple.
        reduce: Sum over all tuples; else over all but the first point.
        invariant_mode: Which products the invariants are of.
        merge: How features of the points become one: ``mean`` or ``concat``.
        join: How these and the value become one.
        nets: Score, value and scale networks; None for Linear-SiLU-Linear of seven hidden units.
    """

    def __init__(
        self,
        n_dim: int,
        *,
        layout: Layout,
        covariant: Mode | None = None,
        rank: int = 2,
        reduce: bool = True,
        invariant_mode: Mode = "single",
        merge: str = "mean",
        join: str = "mean",
        nets: dict[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.layout, self.covariant, self.mode = layout, covariant, invariant_mode
        self.rank, self.reduce = rank, reduce
        n_invariants = count_invariants(layout, rank, invariant_mode)
        widths = {"score_net": (n_dim, 1), "value_net": (n_invariants, n_dim)}
        widths |= {"scale_net": (n_dim, 1)} if covariant else {}
        for name, (n_in, n_out) in widths.items():
            made = nn.Sequential(nn.Linear(n_in, 7), nn.SiLU(), nn.Linear(7, n_out))
            self.add_module(name, nets[name] if nets else made)
        n_vectors = len(spans(rank, covariant)) if covariant else 0
        self.vector_kernels = nn.Parameter(torch.zeros(n_vectors)) if n_vectors > 1 else None
        self.merge_kernels = kernels(n_dim, rank) if merge == "concat" else None
        self.join_kernels = kernels(n_dim, 2) if join == "concat" else None

    def forward(self, r: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and the weights of the tuples, of (*, n, 3 or 8) and (*, n, n_dim)."""
        points = [self._spread(as_multivectors(r), k) for k in range(self.rank)]
        features = [self._spread(v, k) for k in range(self.rank)]
        of_mode = products_of(points, self.mode)
        invariants = [invariants_of(p, k, vector=self.layout == "vector") for p, k in of_mode]
        shape = torch.broadcast_shapes(*(part.shape[:-1] for part in invariants))
        invariants = torch.cat([part.expand(*shape, -1) for part in invariants], dim=-1)
        value = self.get_submodule("value_net")(invariants)
        value = combine([value, combine(features, self.merge_kernels)], self.join_kernels)
        scores = self.get_submodule("score_net")(value)
        first = -1 - self.rank if self.reduce else -self.rank
        shape = scores.shape
        weights = scores.flatten(first, -2).softmax(dim=-2).view(shape)
        if self.covariant is None:
            result = weights * value
        else:
            result = weights * self.get_submodule("scale_net")(value) * self._covariants(points)
        return result.flatten(first, -2).sum(dim=-2), weights

    def _covariants(self, points: list[Tensor]) -> Tensor:
        assert self.covariant is not None
        found = products_of(points, self.covariant)
        parts = [vectors_of(p, k) if self.layout == "vector" else p for p, k in found]
        if self.vector_kernels is None:
            return parts[0]
        return sum(a * part for a, part in zip(self.vector_kernels, parts, strict=True))  # type: ignore[return-value]

    def _spread(self, x: Tensor, place: int) -> Tensor:
        axes = [x.shape[-2] if k == place else 1 for k in range(self.rank)]
        return x.reshape(*x.shape[:-2], *axes, x.shape[-1])


def spans(rank: int, mode: Mode) -> list[tuple[int, int]]:
    """Return first point and number of points of each product of a mode."""
    partial = [(0, n) for n in range(rank, 0, -1)]
    if mode == "single":
        return partial[:1]
    if mode == "partial":
        return partial
    return [(start, n) for start in range(rank) for n in range(rank - start, 0, -1)]


def count_invariants(layout: Layout, rank: int, mode: Mode) -> int:
    """Return how many invariants the products of a mode have."""
    return sum(4 if layout == "multivector" else min(n, 2) for _, n in spans(rank, mode))


def kernels(n_dim: int, count: int) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.zeros(n_dim, n_dim)) for _ in range(count))


def combine(parts: list[Tensor], matrices: nn.ParameterList | None) -> Tensor:
    """Return the mean, or the sum of products with a matrix each."""
    if matrices is None:
        return sum(parts) / len(parts)  # type: ignore[return-value]
    return sum(x @ matrix for x, matrix in zip(parts, matrices, strict=True))  # type: ignore[return-value]


def as_multivectors(r: Tensor) -> Tensor:
    return r if r.shape[-1] == 8 else nn.functional.pad(r, (1, 4))


class Momentum(nn.Module):
    """Normalise by recorded means and deviations."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("momentum", torch.tensor(0.99))
        self.register_buffer("mu", torch.zeros(channels))
        self.register_buffer("sigma", torch.ones(channels))

    mu: Tensor
    sigma: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mu) / self.sigma


class DetachedNorm(nn.Module):
    """Layer normalisation whose mean and deviation have no gradient: forces are then none."""

    def forward(self, x: Tensor) -> Tensor:
        fixed = x.detach()
        mean, sigma = fixed.mean(dim=-1, keepdim=True), fixed.std(dim=-1, keepdim=True)
        return (x - mean) / sigma.clamp(min=1e-7)


class GalaPotential(nn.Module):
    """The notebook's potential: a cloud around each atom, and its energies summed."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, n_blocks = config["D"], config["depth"] + 1
        hidden = int(config["dilation"] * width)

        def network(n_in: int, n_out: int, norm: str | None, first: str | None = None) -> nn.Module:
            layers = [Momentum(n_in)] if first else []
            layers += [nn.Linear(n_in, hidden), *([DetachedNorm()] if norm else []), nn.SiLU()]
            return nn.Sequential(*layers, nn.Linear(hidden, n_out))

        of_value, of_score = config["value_normalization"], config["score_normalization"]
        recorded = config["invar_value_normalization"]

        def attention(covariant: Mode | None, reduce: bool) -> TupleAttention:
            nets = {
                "score_net": network(width, 1, of_score),
                "value_net": network(4, width, of_value, recorded),
                "scale_net": network(width, 1, of_score),
            }
            return TupleAttention(
                width, layout="multivector", covariant=covariant, reduce=reduce, nets=nets
            )

        self.up_project = nn.Linear(2 * config["D_in"], width)
        self.eqvar_att_nets = nn.ModuleList(attention("partial", False) for _ in range(n_blocks))
        self.invar_att_nets = nn.ModuleList(
            attention(None, number == n_blocks - 1) for number in range(n_blocks)
        )
        self.nonlin_mlps = nn.ModuleList(network(width, width, of_value) for _ in range(n_blocks))
        self.block_norm = DetachedNorm() if config["block_normalization"] else nn.Identity()
        self.final_mlp = network(width, width, of_value, recorded)
        self.energy_projection = nn.Linear(width, 1, bias=False)

    def forward(self, r: Tensor, v: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the energy (1, 1) and what each block's attentions give."""
        relative = as_multivectors(r[:, None, :] - r[:, :, None])  # (1, i, j, 8)
        own, other = v[:, :, None], v[:, None, :]
        features = self.up_project(torch.cat([other + own, other - own], dim=-1))
        points, after = relative, []
        for number, (turning, still, mlp) in enumerate(
            zip(self.eqvar_att_nets, self.invar_att_nets, self.nonlin_mlps, strict=True)
        ):
            turned = turning(points, features)[0]
            invariants = still(turned, features)[0]
            after.append((turned, invariants))
            last = number == len(self.nonlin_mlps) - 1
            features = self.block_norm(mlp(invariants) + (0.0 if last else features))
            points = turned + points + relative
        return self.energy_projection(self.final_mlp(features).sum(dim=-2)), after
