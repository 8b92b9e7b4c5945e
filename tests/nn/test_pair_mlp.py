"""Perceptrons of pairs are perceptrons of the concatenated features, computed for less."""

import torch

from atomeq.nn.mlp import MLP
from atomeq.nn.pair_mlp import PairFeatures, RadialMLP

EXACT = 1e-12


def test_radial_mlp_is_the_perceptron_of_the_joined_features():
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    edge_index = torch.randint(0, 5, (2, 20), generator=generator)
    of_pair, of_source, of_target = random(20, 3), random(5, 2), random(5, 4)
    radial = RadialMLP((9, 8, 8, 6), layer_norm=True).double()
    plain = MLP((9, 8, 8, 6), layer_norm=True).double()
    plain.load_state_dict(radial.state_dict())
    source, target = edge_index
    joined = torch.cat([of_pair, of_source[source], of_target[target]], dim=1)
    pairs = PairFeatures(of_pair, of_source, of_target, edge_index)
    torch.testing.assert_close(radial(pairs), plain(joined), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(radial.hidden(pairs), plain.hidden(joined), rtol=EXACT, atol=EXACT)
