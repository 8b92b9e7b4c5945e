import pytest
import torch
from e3nn import o3

from atomeq.ops.harmonics.operations import spherical_harmonics

# Two roundings of the direction, amplified by the degree; through l = 6 this is 2.2e-15 measured.
RELATIVE = 1e-14


@pytest.mark.parametrize("normalization", ["component", "integral", "norm"])
@pytest.mark.parametrize("normalize", [True, False])
def test_harmonics_equal_e3nn(normalization: str, normalize: bool) -> None:
    vectors = torch.randn(500, 3, dtype=torch.float64)
    expected = o3.spherical_harmonics(list(range(12)), vectors, normalize, normalization)
    values = spherical_harmonics(vectors, 11, normalize=normalize, normalization=normalization)
    for l in range(12):
        degree = slice(l * l, (l + 1) ** 2)
        error = (values[:, degree] - expected[:, degree]).abs().max()
        assert error <= RELATIVE * expected[:, degree].abs().max()


def test_first_degree_is_the_vector() -> None:
    vectors = torch.randn(5, 3)
    values = spherical_harmonics(vectors, 1, normalize=False, normalization="norm")
    torch.testing.assert_close(values[:, 1:], vectors)


def test_squares_of_a_degree_sum_to_its_dimension() -> None:
    values = spherical_harmonics(torch.randn(20, 3, dtype=torch.float64), 6).square()
    sums = torch.stack([values[:, l * l : (l + 1) ** 2].sum(1) for l in range(7)], dim=1)
    torch.testing.assert_close(sums, (2.0 * torch.arange(7) + 1).double().expand(20, 7))


@pytest.mark.parametrize("normalize", [True, False])
def test_derivatives_are_right(normalize: bool) -> None:
    vectors = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def harmonics(v: torch.Tensor) -> torch.Tensor:
        return spherical_harmonics(v, 4, normalize=normalize)

    assert torch.autograd.gradcheck(harmonics, vectors)
    assert torch.autograd.gradgradcheck(harmonics, vectors)


@pytest.mark.parametrize("normalize", [True, False])
def test_zero_vector_gives_no_nan(normalize: bool) -> None:
    vectors = torch.zeros(2, 3, requires_grad=True)
    values = spherical_harmonics(vectors, 3, normalize=normalize)
    assert values[:, 1:].eq(0).all()
    assert values[:, 0].eq(1).all()
    (gradient,) = torch.autograd.grad(
        values.square().sum() + values.sum(), vectors, create_graph=True
    )
    (second,) = torch.autograd.grad(gradient.square().sum(), vectors)
    assert gradient.isfinite().all()
    assert second.isfinite().all()


def test_batch_axes_and_empty_batches_are_kept() -> None:
    assert spherical_harmonics(torch.randn(2, 3, 4, 3), 2).shape == (2, 3, 4, 9)
    assert spherical_harmonics(torch.randn(0, 3), 2).shape == (0, 9)


def test_refuses_what_is_no_vector() -> None:
    with pytest.raises(ValueError, match="last axis must be 3"):
        spherical_harmonics(torch.randn(3, 4), 2)
    with pytest.raises(ValueError, match="lmax is -1"):
        spherical_harmonics(torch.randn(3, 3), -1)
    with pytest.raises(ValueError, match="'orthonormal' is unknown; choose one of component"):
        spherical_harmonics(torch.randn(3, 3), 2, normalization="orthonormal")  # type: ignore[arg-type]
