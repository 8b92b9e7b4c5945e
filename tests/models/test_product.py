"""The product of functions on the sphere, as an option of models: exact, and the laws hold."""

from pathlib import Path

import pytest
import torch
import yaml
from structures import RATTLED

from atomeq.check.model import validate_model
from atomeq.nn.activations import activation_of
from atomeq.nn.feed_forward import FeedForward
from atomeq.ops.edge.wigner import block_diagonal, wigner_from_matrix, wigner_matrices
from atomeq.ops.orders import m_primary_order
from atomeq.ops.sphere.grid import SphereGrid
from atomeq.potential.checkpoint import build_model, scatter_weights
from atomeq.potential.potential import Potential

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
EXACT = 1e-12  # rounding of float64
ROTATION = wigner_matrices(
    torch.nn.functional.normalize(torch.tensor([0.3, -0.8, 0.4, 0.33]).double(), dim=0), 3
)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("equiformer_v2", {"feed_forward": "product"}),
        ("equiformer_v2", {"feed_forward": "product", "activation": "product"}),
        ("escn", {"update": "product"}),
        ("esen", {"feed_forward": "product", "activation": "product"}),
    ],
    ids=str,
)
def test_laws_hold(config, options):
    node = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    torch.manual_seed(0)
    potential = Potential(build_model({**node, "init_args": {**node["init_args"], **options}}))
    scatter_weights(potential.double())
    elements = ["Cu", "Mg", "O", "C", "H"]
    structures = [RATTLED[name]() for name in ("crystal", "slab", "molecule")]
    results = validate_model(potential, elements=elements, structures=structures)  # or it raises
    assert sum(result.passed is True for result in results) > 15


def features(n_rows: int, channels: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, n_rows, channels, generator=generator, dtype=torch.float64)


def on_grid(x: torch.Tensor, grid: SphereGrid) -> torch.Tensor:
    first, second = (grid.to_matrix(like=x) @ x).chunk(2, dim=-1)
    return grid.from_matrix(like=x) @ (first * second)


@pytest.mark.parametrize("lmax", [0, 1, 3])
@pytest.mark.parametrize("normalization", ["component", "integral"])
def test_the_exact_product_is_that_of_any_grid_which_resolves_it(lmax, normalization):
    fine = {"normalization": normalization, "grid_resolution": 18}
    exact = activation_of("product", lmax, lmax, 4, normalization=normalization)
    gridded = activation_of("product", lmax, lmax, 4, **fine)
    x = features((lmax + 1) ** 2, 8)
    expected = on_grid(x, gridded.grid)
    torch.testing.assert_close(exact.on_sphere(x), expected, atol=EXACT, rtol=0)


def test_a_coarse_grid_is_kept_as_it_was_asked_for():
    coarse = activation_of("product", 3, 3, 4, grid_resolution=8)
    x = features(16, 8)
    expected = on_grid(x, coarse.grid)
    torch.testing.assert_close(coarse.on_sphere(x), expected, atol=EXACT, rtol=0)
    assert (activation_of("product", 3, 3, 4).on_sphere(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["product", "separable_s2_square"])
def test_feed_forward_commutes_with_rotations_and_reflections(name):
    network = FeedForward(3, 6, 5, 6, nonlinearity=name).double()
    x = features(16, 6)
    for rotation in (block_diagonal(ROTATION), _mirror()):
        torch.testing.assert_close(network(rotation @ x), rotation @ network(x), atol=EXACT, rtol=0)


@pytest.mark.parametrize("mmax", [0, 1, 3])
def test_product_of_messages_does_not_see_the_roll(mmax):
    activation = activation_of("product", 3, mmax, 4, order="m")
    order = torch.as_tensor(m_primary_order(3, mmax))
    turn = wigner_matrices(torch.tensor([0.6, 0.0, 0.8, 0.0], dtype=torch.float64), 3)
    turn = block_diagonal(turn)[order][:, order]
    x, scalars = features(len(order), 8), features(12, 1)[..., 0]
    expected = turn @ activation(x, scalars)
    torch.testing.assert_close(activation(turn @ x, scalars), expected, atol=EXACT, rtol=0)


def _mirror() -> torch.Tensor:
    mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64))
    return block_diagonal(wigner_from_matrix(mirror, 3))
