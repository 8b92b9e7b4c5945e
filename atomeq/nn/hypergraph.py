"""Convolutions between atoms and hyperedges (MHNN, arXiv:2312.13136), the blocks of EquiHGNN.

A hypergraph is a list of incidences, pairs of an atom and a hyperedge it belongs to; messages go
from atoms to hyperedges and back. Everything here takes tensors alone.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from atomeq.ops.segment.operations import segment_mean, segment_sum

Aggregation = Literal["mean", "sum"]
Normalization = Literal["ln", "bn", "none", "None"]  # the last one is the reference's word

_AGGREGATIONS = {"mean": segment_mean, "sum": segment_sum}


class HypergraphMLP(nn.Module):
    """Linear layers with, between them, an activation and then a normalisation.

    Args:
        n_in: Channels that come in.
        n_hidden: Channels of hidden layers.
        n_out: Channels that go out.
        num_layers: Linear layers.
        normalization: ``ln`` and ``bn`` are layer and batch normalisation.
        activation: Before the normalisation, as published ReLU.
        dropout: Probability, after the normalisation.
    """

    def __init__(
        self,
        n_in: int,
        n_hidden: int,
        n_out: int,
        *,
        num_layers: int = 2,
        normalization: Normalization = "ln",
        activation: Callable[[Tensor], Tensor] = torch.relu,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"a perceptron needs at least one layer, not {num_layers}")
        makers = {"ln": nn.LayerNorm, "bn": nn.BatchNorm1d, "none": lambda _: nn.Identity()}
        maker = makers.get(normalization.lower())
        if maker is None:
            raise ValueError(f"normalization {normalization!r} is unknown; there are ln, bn, none")
        widths = [n_in, *[n_hidden] * (num_layers - 1), n_out]
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.lins = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        # The first place is that of a normalisation of inputs, which no published model has.
        self.normalizations = nn.ModuleList(
            [nn.Identity(), *(maker(n_hidden) for _ in range(num_layers - 1))]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, n_in) to (n, n_out)."""
        *hidden, last = self.lins
        for linear, norm in zip(hidden, list(self.normalizations)[1:], strict=True):
            x = self.dropout(norm(self.activation(linear(x))))
        return last(x)


class MHNNConv(nn.Module):
    """Atoms and hyperedges update each other.

    A hyperedge gathers W1[x, e] of its atoms and becomes W2[e, M]; an atom gathers W3[x, e] of its
    hyperedges, already updated, and becomes W4[x, M].

    Args:
        channels: Of atoms and hyperedges.
        aggregate: How messages are gathered.
        depths: Linear layers of W1 to W4.
        mlp: Makes a perceptron, ``HypergraphMLP`` with its options.
    """

    def __init__(
        self,
        channels: int,
        *,
        aggregate: Aggregation = "mean",
        depths: tuple[int, int, int, int] = (2, 2, 2, 2),
        mlp: Callable[..., HypergraphMLP] = HypergraphMLP,
    ) -> None:
        super().__init__()
        self.aggregate = _AGGREGATIONS[aggregate]
        self.W1, self.W2, self.W3, self.W4 = (
            mlp(2 * channels, channels, channels, num_layers=depth) for depth in depths
        )

    def forward(self, x: Tensor, e: Tensor, incidence: Tensor) -> tuple[Tensor, Tensor]:
        """Return new atoms and hyperedges.

        Args:
            x: Atoms, (n_atoms, C).
            e: Hyperedges, (n_hyperedges, C).
            incidence: (2, n_incidences) of (atom, hyperedge).
        """
        atom, edge = incidence
        gathered = self.aggregate(self.W1(torch.cat([x[atom], e[edge]], dim=1)), edge, e.shape[0])
        e = self.W2(torch.cat([e, gathered], dim=1))
        gathered = self.aggregate(self.W3(torch.cat([x[atom], e[edge]], dim=1)), atom, x.shape[0])
        return self.W4(torch.cat([x, gathered], dim=1)), e


class MHNNSConv(nn.Module):
    """The simpler convolution, whose hyperedges have no features of their own.

    A hyperedge is what it gathers, W1[x]; an atom gathers W2[x, e] and becomes W3 of the average of
    that and of what it was at first.

    Args:
        channels: Of atoms.
        aggregate: How messages are gathered.
        depths: Linear layers of W1 to W3.
        mlp: Makes a perceptron, ``HypergraphMLP`` with its options.
    """

    def __init__(
        self,
        channels: int,
        *,
        aggregate: Aggregation = "mean",
        depths: tuple[int, int, int] = (2, 2, 2),
        mlp: Callable[..., HypergraphMLP] = HypergraphMLP,
    ) -> None:
        super().__init__()
        self.aggregate = _AGGREGATIONS[aggregate]
        self.W1 = mlp(channels, channels, channels, num_layers=depths[0])
        self.W2 = mlp(2 * channels, channels, channels, num_layers=depths[1])
        self.W3 = mlp(channels, channels, channels, num_layers=depths[2])

    def forward(self, x: Tensor, x_first: Tensor, incidence: Tensor, n_hyperedges: int) -> Tensor:
        """Return new atoms (n_atoms, C).

        Args:
            x: Atoms, (n_atoms, C).
            x_first: Atoms before the first convolution, (n_atoms, C).
            incidence: (2, n_incidences) of (atom, hyperedge).
            n_hyperedges: Number of hyperedges.
        """
        atom, edge = incidence
        e = self.aggregate(self.W1(x)[atom], edge, n_hyperedges)
        gathered = self.aggregate(self.W2(torch.cat([x[atom], e[edge]], dim=1)), atom, x.shape[0])
        return self.W3((gathered + x_first) / 2)
