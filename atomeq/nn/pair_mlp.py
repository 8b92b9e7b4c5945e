"""The perceptron of messages between pairs, whose first layer is multiplied per atom."""

from torch import Tensor, nn
from torch.nn import functional

from atomeq.typing import EdgeIndex


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
        source, target = edge_index
        n = self.channels
        weight = first.weight  # (channels, 2 channels + n_pair_features), for h_i, h_j, e_ij
        of_target = functional.linear(h, weight[:, :n], first.bias)  # (n_atoms, channels)
        of_source = functional.linear(h, weight[:, n : 2 * n])
        of_pair = functional.linear(pair_features, weight[:, 2 * n :])  # (n_edges, channels)
        # index_select, for the gradient of plain indexing is a much slower scatter on CPUs.
        gathered = of_target.index_select(0, target) + of_source.index_select(0, source)
        return final_act(second(act(of_pair + gathered)))
