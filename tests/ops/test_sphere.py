import math

import pytest
import torch
from e3nn import o3

from atomeq.ops.edge.wigner import block_diagonal, wigner_matrices
from atomeq.ops.orders import coefficient_index, m_primary_order
from atomeq.ops.sphere.grid import SphereGrid
from atomeq.ops.sphere.operations import sphere_pointwise

EXACT = 1e-12  # float64 rounding
DOUBLE = torch.zeros((), dtype=torch.float64)
DEGREES = [(0, 0), (1, 1), (2, 2), (4, 2), (6, 6)]


@pytest.mark.parametrize("normalization", ["integral", "component"])
@pytest.mark.parametrize(("lmax", "mmax"), DEGREES)
def test_there_and_back_is_the_identity(lmax: int, mmax: int, normalization: str) -> None:
    grid = SphereGrid(lmax, mmax, normalization=normalization)
    product = grid.from_matrix(like=DOUBLE) @ grid.to_matrix(like=DOUBLE)
    assert (product - torch.eye(len(product), dtype=torch.float64)).abs().max() <= EXACT


@pytest.mark.parametrize("normalization", ["integral", "component"])
@pytest.mark.parametrize("lmax", [2, 4, 6])
def test_matrices_equal_e3nn(lmax: int, normalization: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        resolution = (2 * (lmax + 1), 2 * lmax + 3)
        to_grid = o3.ToS2Grid(lmax, resolution, normalization=normalization)
        from_grid = o3.FromS2Grid(resolution, lmax, normalization=normalization)
    finally:
        torch.set_default_dtype(torch.float32)
    expected_to = torch.einsum("mbi,am->bai", to_grid.shb, to_grid.sha).flatten(0, 1)
    expected_from = torch.einsum("am,mbi->bai", from_grid.sha, from_grid.shb).flatten(0, 1)
    grid = SphereGrid(lmax, lmax, normalization=normalization)
    assert grid.shape == resolution
    assert (grid.to_matrix(like=DOUBLE) - expected_to).abs().max() <= EXACT
    assert (grid.from_matrix(like=DOUBLE).T - expected_from).abs().max() <= EXACT


def test_rescaling_of_equiformer_is_no_identity_above_mmax() -> None:
    grid = SphereGrid(4, 2, normalization="component", rescale=True)
    product = grid.from_matrix(like=DOUBLE) @ grid.to_matrix(like=DOUBLE)
    degrees = [math.isqrt(row) for row in coefficient_index(4, 2)]
    expected = [(2 * l + 1) / 5 if l > 2 else 1.0 for l in degrees]
    diagonal = torch.diag(torch.tensor(expected, dtype=torch.float64))
    assert (product - diagonal).abs().max() <= EXACT


def test_values_have_unit_variance_in_component_normalisation() -> None:
    grid = SphereGrid(4, 4, normalization="component")
    values = grid.to_matrix(like=DOUBLE) @ torch.randn(25, 4000, dtype=torch.float64)
    assert abs(values.var() - 1) < 0.02


def test_order_of_rows_follows_the_edge_frame() -> None:
    x = torch.randn(3, 9, 2, dtype=torch.float64)
    by_degree = sphere_pointwise(x, torch.tanh, SphereGrid(2, 2))
    rows = m_primary_order(2, 2)
    by_order = sphere_pointwise(x[:, rows], torch.tanh, SphereGrid(2, 2, order="m"))
    torch.testing.assert_close(by_order, by_degree[:, rows])


def test_square_of_a_low_degree_is_exactly_equivariant() -> None:
    """The square of l = 2 has l <= 4, which this grid resolves: no aliasing is left."""
    grid = SphereGrid(4, 4, n_alpha=18, n_beta=18)
    x = torch.zeros(1, 25, 2, dtype=torch.float64)
    x[:, :9] = torch.randn(1, 9, 2)
    quaternion = torch.nn.functional.normalize(torch.randn(4, dtype=torch.float64), dim=0)
    wigner = block_diagonal(wigner_matrices(quaternion, 4))
    expected = wigner @ sphere_pointwise(x, torch.square, grid)
    found = sphere_pointwise(wigner @ x, torch.square, grid)
    assert (found - expected).abs().max() <= EXACT


def test_finer_grids_are_more_equivariant() -> None:
    x = torch.randn(1, 9, 2, dtype=torch.float64)
    quaternion = torch.nn.functional.normalize(torch.randn(4, dtype=torch.float64), dim=0)
    wigner = block_diagonal(wigner_matrices(quaternion, 2))
    errors = []
    for n in (6, 12, 24):
        grid = SphereGrid(2, 2, n_beta=n, n_alpha=n)
        silu = torch.nn.functional.silu
        error = sphere_pointwise(wigner @ x, silu, grid) - wigner @ sphere_pointwise(x, silu, grid)
        errors.append(error.abs().max().item())
    assert errors[0] > 30 * errors[1] > 900 * errors[2]


def test_function_may_change_the_channels() -> None:
    mix = torch.nn.Linear(3, 5)
    assert sphere_pointwise(torch.randn(2, 4, 3), mix, SphereGrid(1, 1)).shape == (2, 4, 5)


def test_derivatives_are_right() -> None:
    x = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)

    def activate(x: torch.Tensor) -> torch.Tensor:
        return sphere_pointwise(x, torch.nn.functional.silu, SphereGrid(1, 1))

    assert torch.autograd.gradcheck(activate, x)
    assert torch.autograd.gradgradcheck(activate, x)


def test_refuses_grids_that_cannot_resolve_the_features() -> None:
    with pytest.raises(ValueError, match="n_beta must be even and at least 10"):
        SphereGrid(4, 2, n_beta=8)
    with pytest.raises(ValueError, match="n_beta must be even"):
        SphereGrid(4, 2, n_beta=11)
    with pytest.raises(ValueError, match="n_alpha at least 5"):
        SphereGrid(4, 2, n_alpha=4)
    with pytest.raises(ValueError, match="mmax must lie between 0 and lmax"):
        SphereGrid(2, 3)
    with pytest.raises(ValueError, match="'norm'"):
        SphereGrid(2, 2, normalization="norm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has 9 rows"):
        sphere_pointwise(torch.randn(2, 8, 1), torch.tanh, SphereGrid(2, 2))
