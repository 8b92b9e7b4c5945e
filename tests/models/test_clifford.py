"""CGENN: symmetry in other signatures, GLGENN's form, and what the mean of the system did."""

import pytest
import torch
from torch import Tensor

from atomeq.models.clifford import CGENNPropagator
from atomeq.nn.clifford import GeometricBlock
from atomeq.ops.clifford.algebra import Sharing, blades
from atomeq.propagation.particles import fully_connected

EXACT = 1e-11  # float64 through some layers


def induced(map_of_vectors: Tensor) -> Tensor:
    """What an orthogonal map of vectors does to blades: determinants of its minors."""
    names = blades(len(map_of_vectors))
    matrix = torch.zeros(len(names), len(names), dtype=torch.float64)
    for i, rows in enumerate(names):
        for j, columns in enumerate(names):
            if len(rows) == len(columns):
                matrix[i, j] = torch.linalg.det(map_of_vectors[list(rows)][:, list(columns)])
    return matrix


@pytest.mark.parametrize("sharing", ["grade", "quaternion"])
@pytest.mark.parametrize("dimension", [2, 3, 4])
def test_blocks_turn_and_mirror_with_their_input(dimension: int, sharing: Sharing) -> None:
    block = GeometricBlock((dimension, 0), 3, 2, sharing=sharing).double()
    q, _ = torch.linalg.qr(torch.randn(dimension, dimension, dtype=torch.float64))
    for map_of_vectors in (q, -q, q[:, [*range(1, dimension), 0]]):
        turn = induced(map_of_vectors)
        x = torch.randn(5, 2**dimension, 2, dtype=torch.float64)
        expected = turn @ block(x)
        assert (block(turn @ x) - expected).abs().max() <= EXACT * expected.abs().max()


def test_glgenn_is_the_product_between_linear_maps_alone() -> None:
    names = {name.partition(".")[0] for name, _ in GeometricBlock((3, 0), 4, 4).named_parameters()}
    assert names == {"linear", "gate", "product", "norm"}
    block = GeometricBlock((3, 0), 4, 4, sharing="quaternion")
    assert [name for name, _ in block.named_parameters()] == [
        "linear.weight",
        "product.weight",
        "product.linear_right.weight",
        "product.normalization.a",
    ]


def test_a_far_body_without_edges_changes_nothing() -> None:
    """As published positions are relative to the mean of what an edge joins."""
    pos, velocities = (torch.randn(6, 3, dtype=torch.float64) for _ in range(2))
    pos[5] += 100.0
    within = fully_connected(1, 5)
    features = torch.randn(6, 1).double(), torch.randn(within.shape[1], 2).double()
    model = CGENNPropagator(hidden_channels=4, num_layers=1).double()
    alone, _ = model(pos[:5], velocities[:5], features[0][:5], features[1], within)
    beside, _ = model(pos, velocities, *features, within)
    assert (beside[:5] - alone).abs().max() <= EXACT * alone.abs().max()
