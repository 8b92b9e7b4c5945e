import math

import pytest
import torch

from atomeq.nn.gaunt import GauntProduct
from atomeq.ops.coupling.clebsch_gordan import clebsch_gordan
from atomeq.ops.coupling.operations import tensor_product
from atomeq.ops.edge.wigner import block_diagonal, rotation_matrix, wigner_from_matrix
from atomeq.ops.harmonics.operations import spherical_harmonics
from atomeq.ops.paths import Path, tensor_product_paths
from atomeq.ops.sphere.gaunt import gaunt_product

EXACT = 1e-12  # float64 rounding
DEGREES = [(0, 0, 0), (1, 1, 2), (2, 3, 5), (4, 4, 4), (6, 6, 6)]


def features(n: int, lmax: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(n, (lmax + 1) ** 2, channels, dtype=torch.float64)


@pytest.mark.parametrize(("lmax1", "lmax2", "lmax"), DEGREES)
def test_product_is_the_clebsch_gordan_sum_with_gaunt_coefficients(
    lmax1: int, lmax2: int, lmax: int
) -> None:
    x, y = features(4, lmax1), features(4, lmax2)
    paths = tensor_product_paths(lmax1, lmax2, lmax)
    weights = []
    for l1, l2, l3 in paths:
        # tensor_product multiplies the symbols by the norm of the path; Gaunt's integral of three
        # harmonics is the symbols times their element of m = 0 times this factor
        norm = math.sqrt((2 * l3 + 1) / sum(path.l3 == l3 for path in paths))
        factor = math.sqrt((2 * l1 + 1) * (2 * l2 + 1) * (2 * l3 + 1) / (4 * math.pi))
        weights.append(clebsch_gordan(l1, l2, l3)[l1, l2, l3] * factor / norm)
    per_channel = torch.stack(weights)[:, None].expand(-1, 3)
    expected = tensor_product(x, y, per_channel, paths, mode="uuu")
    found = gaunt_product(x, y, lmax)
    assert (found - expected).abs().max() <= EXACT * expected.abs().max()


def test_product_is_the_product_of_the_functions() -> None:
    x, y = features(1, 2), features(1, 3)
    points = torch.nn.functional.normalize(torch.randn(20, 3, dtype=torch.float64), dim=-1)
    values = [
        spherical_harmonics(points, lmax, normalization="integral") @ coefficients
        for lmax, coefficients in ((2, x), (3, y), (5, gaunt_product(x, y, 5)))
    ]
    torch.testing.assert_close(values[2], values[0] * values[1], atol=EXACT, rtol=EXACT)


def test_product_is_equivariant_to_rotations_and_reflections() -> None:
    quaternion = torch.nn.functional.normalize(torch.randn(4, dtype=torch.float64), dim=0)
    wigner = block_diagonal(wigner_from_matrix(-rotation_matrix(quaternion), 4))
    layer = GauntProduct(3, 2, 4, 3).double()
    for weights in layer.parameters():
        torch.nn.init.normal_(weights)
    x, y = features(5, 3), features(5, 2)
    expected = wigner @ layer(x, y)
    found = layer(wigner[:16, :16] @ x, wigner[:9, :9] @ y)
    assert (found - expected).abs().max() <= EXACT * expected.abs().max()


def test_cross_product_can_not_be_expressed() -> None:
    x, y = features(5, 1), features(5, 1)
    assert (gaunt_product(x, y, 2) - gaunt_product(y, x, 2)).abs().max() <= EXACT
    x[:, 0] = y[:, 0] = 0
    assert gaunt_product(x, y, 1)[:, 1:].abs().max() <= EXACT
    cross = tensor_product(x, y, None, [Path(1, 1, 1)], mode="uuu", output="paths")
    assert cross.abs().max() > 0.1


@pytest.mark.parametrize(("lmax", "n_paths"), [(1, 4), (2, 11), (3, 23)])
def test_layer_has_a_free_number_a_degree_where_paths_have_one_each(lmax: int, n_paths: int):
    """The price of freedom: the table of docs/operations.md."""
    n_sph = (lmax + 1) ** 2
    pairs = torch.cartesian_prod(torch.arange(n_sph), torch.arange(n_sph))
    x, y = torch.eye(n_sph, dtype=torch.float64)[pairs.T][:, :, :, None]
    layer = GauntProduct(lmax, lmax, lmax, 1).double()

    def coefficients(*weights: torch.Tensor) -> torch.Tensor:
        given = dict(zip(("first", "second", "third"), weights, strict=True))
        return torch.func.functional_call(layer, given, (x, y)).flatten()

    weights = tuple(torch.randn(lmax + 1, 1, dtype=torch.float64) for _ in range(3))
    slopes = torch.cat(torch.autograd.functional.jacobian(coefficients, weights), dim=1)
    assert torch.linalg.matrix_rank(slopes.flatten(1)) == 3 * (lmax + 1) - 2
    assert len(tensor_product_paths(lmax, lmax, lmax)) == n_paths


def test_layer_gives_unit_variance() -> None:
    layer = GauntProduct(3, 3, 4, 8)
    with torch.no_grad():
        out = layer(torch.randn(5000, 16, 8), torch.randn(5000, 16, 8))
    variance = out.square().mean((0, 2))
    assert (variance - 1).abs().max() < 0.1  # 40 000 samples with heavy tails


def test_derivatives_are_right() -> None:
    x, y = features(2, 1, 2).requires_grad_(), features(2, 2, 2).requires_grad_()

    def multiply(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return gaunt_product(x, y, 2)

    assert torch.autograd.gradcheck(multiply, (x, y))
    assert torch.autograd.gradgradcheck(multiply, (x, y))


def test_custom_operation_keeps_the_rules_of_torch() -> None:
    tables = [torch.randn(7, rows, dtype=torch.float64) for rows in (4, 9, 4)]
    factors = [features(2, 1).requires_grad_(), features(2, 2).requires_grad_()]
    torch.library.opcheck(torch.ops.atomeq.pointwise_product.default, (*factors, *tables))


def test_refuses_what_is_no_pair_of_functions() -> None:
    x = features(4, 1)
    with pytest.raises(ValueError, match=r"1, 4, 9, ... rows"):
        gaunt_product(x[:, :3], x, 1)
    with pytest.raises(ValueError, match="all axes but the rows must be equal"):
        gaunt_product(x, x[..., :1], 1)
    with pytest.raises(ValueError, match="lmax is 3; the product of degrees 1 and 1 has 0 to 2"):
        gaunt_product(x, x, 3)
    with pytest.raises(ValueError, match="lmax_out is 3"):
        GauntProduct(1, 1, 3, 2)
