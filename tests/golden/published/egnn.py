"""EGNN's generic form as published, and the names of the reference's weights in all three forms."""

import re

from torch import Tensor, nn

from atomeq.models.egnn_published import PublishedLayer
from atomeq.typing import EdgeIndex, Positions


class GenericEGNN(nn.Module):
    """The generic form: features and coordinates in, features and coordinates out.

    Args:
        n_inputs: Input features of an atom.
        n_outputs: Output features of an atom.
        hidden_channels: Channels of atoms and messages.
        n_edge_features: Features given with each edge.
        num_layers: Message-passing layers.
        residual: Add each layer's input to its output.
        attention: Weigh each message by a sigmoid of itself (eq. 8).
        normalize: Divide directions by their lengths.
        tanh: Bound the pull of a neighbour by its distance.
    """

    def __init__(
        self,
        n_inputs: int,
        n_outputs: int,
        *,
        hidden_channels: int = 64,
        n_edge_features: int = 0,
        num_layers: int = 4,
        residual: bool = True,
        attention: bool = False,
        normalize: bool = False,
        tanh: bool = False,
    ) -> None:
        super().__init__()
        self.embedding_in = nn.Linear(n_inputs, hidden_channels)
        self.layers = nn.ModuleList(
            PublishedLayer(
                hidden_channels,
                n_edge_features,
                residual=residual,
                attention=attention,
                normalization="length" if normalize else "none",
                tanh=tanh,
            )
            for _ in range(num_layers)
        )
        self.embedding_out = nn.Linear(hidden_channels, n_outputs)

    def forward(
        self, h: Tensor, pos: Positions, edge_index: EdgeIndex, edge_features: Tensor | None = None
    ) -> tuple[Tensor, Positions]:
        """Return features (n_atoms, n_outputs) and moved coordinates (n_atoms, 3)."""
        h = self.embedding_in(h)
        for layer in self.layers:
            h, pos = layer(h, pos, edge_index, edge_features)
        return self.embedding_out(h), pos


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the reference's weights: its layers are ``gcl_K``, ours ``layers.K``."""
    return {re.sub(r"^gcl_(\d+)\.", r"layers.\1.", name): w for name, w in state_dict.items()}
