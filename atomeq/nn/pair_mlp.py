"""Perceptrons of pairs of atoms, whose first layer is multiplied per atom and not per pair."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from atomeq.nn.mlp import MLP
from atomeq.typing import EdgeIndex


class PairFeatures(NamedTuple):
    """Features of pairs in three parts: [e_ij, a_j, b_i] is what belongs to the pair.

    Attributes:
        of_pair: e_ij, (n_edges, n_pair_features).
        of_source: a, (n_atoms, n_source_features).
        of_target: b, (n_atoms, n_target_features).
        edge_index: Row 0 is j, row 1 is i.
    """

    of_pair: Tensor
    of_source: Tensor
    of_target: Tensor
    edge_index: EdgeIndex


class TabulatedPairs(NamedTuple):
    """What stands for the features of pairs where networks were read off tables.

    Attributes:
        hidden: What the last linear layer of a network is given, (n_edges, its width).
        enveloped: What a network gives, times the envelope, (n_edges, width of its output).
    """

    hidden: Mapping[nn.Module, Tensor]
    enveloped: Mapping[nn.Module, Tensor]


Pairs = PairFeatures | TabulatedPairs


class RadialMLP(MLP):
    """The perceptron of [e_ij, a_j, b_i], with the weights of :class:`~atomeq.nn.mlp.MLP`.

    The gradient then goes to e_ij alone where a and b do not depend on positions.
    """

    def forward(self, input: Pairs) -> Tensor:  # named as in nn.Sequential
        """Return (n_edges, width of the output); read off a table, it has the envelope."""
        if isinstance(input, TabulatedPairs) and self in input.enveloped:
            return input.enveloped[self]
        return self[self._last_linear](self.hidden(input))

    def hidden(self, x: Pairs) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return what the last linear layer is given, (n_edges, width of the last hidden layer)."""
        if isinstance(x, TabulatedPairs):
            return x.hidden[self]
        first, *others = list(self)[: self._last_linear]
        assert isinstance(first, nn.Linear)
        sizes = [part.shape[1] for part in x[:3]]
        of_pair, of_source, of_target = first.weight.split(sizes, dim=1)
        hidden = functional.linear(x.of_pair, of_pair, first.bias)
        if sizes[1] or sizes[2]:
            source = functional.linear(x.of_source, of_source)
            target = functional.linear(x.of_target, of_target)
            hidden = hidden + gathered(source, target, x.edge_index)
        for layer in others:
            hidden = layer(hidden)
        return hidden

    @property
    def last_linear(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the last linear layer."""
        layer = self[self._last_linear]
        assert isinstance(layer, nn.Linear)
        return layer.weight, layer.bias


class PairMLP(nn.ModuleList):
    """φ(h_i, h_j, e_ij): two linear layers with SiLU after each, EGNN's message function.

    The first layer is linear in the concatenation [h_i, h_j, e_ij], so its parts for h_i and h_j
    are computed once per atom and gathered, rather than once per edge: the same function and the
    same weights as a perceptron of the concatenation, at about half of its operations.

    Args:
        channels: Width of the atoms' features and of the messages.
        n_pair_features: Width of e_ij.
    """

    def __init__(self, channels: int, n_pair_features: int) -> None:
        self.channels = channels
        first = nn.Linear(2 * channels + n_pair_features, channels)
        super().__init__([first, nn.SiLU(), nn.Linear(channels, channels), nn.SiLU()])

    def forward(self, h: Tensor, pair_features: Tensor, edge_index: EdgeIndex) -> Tensor:
        """Return the messages.

        Args:
            h: Atoms, (n_atoms, channels).
            pair_features: e_ij, (n_edges, n_pair_features).
            edge_index: Row 0 is j, row 1 is i.

        Returns:
            (n_edges, channels).
        """
        first, act, second, final_act = self
        assert isinstance(first, nn.Linear)
        n = self.channels
        weight = first.weight  # (channels, 2 channels + n_pair_features), for h_i, h_j, e_ij
        of_target = functional.linear(h, weight[:, :n], first.bias)  # (n_atoms, channels)
        of_source = functional.linear(h, weight[:, n : 2 * n])
        of_pair = functional.linear(pair_features, weight[:, 2 * n :])  # (n_edges, channels)
        return final_act(second(act(of_pair + gathered(of_source, of_target, edge_index))))


def gathered(
    of_source: Tensor, of_target: Tensor, edge_index: EdgeIndex | tuple[Tensor, Tensor]
) -> Tensor:
    """Return b_i + a_j of each edge, (n_edges, C), from b and a of atoms, (n_atoms, C)."""
    # index_select, for the gradient of plain indexing is a much slower scatter on CPUs.
    source, target = edge_index
    return of_target.index_select(0, target) + of_source.index_select(0, source)
