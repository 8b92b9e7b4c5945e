import math

import pytest
import torch

from atomeq.nn.radial import BesselBasis, GaussianBasis, PolynomialEnvelope


@pytest.mark.parametrize("exponent", [5, 6])
def test_envelope_ends_with_two_continuous_derivatives(exponent):
    envelope = PolynomialEnvelope(4.0, exponent=exponent)
    r = torch.tensor([4.0 - 1e-6], dtype=torch.float64, requires_grad=True)
    value = envelope(r)
    first = torch.autograd.grad(value.sum(), r, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), r)[0]
    assert abs(value.item()) < 1e-15
    assert abs(first.item()) < 1e-10
    assert abs(second.item()) < 1e-4
    assert envelope(torch.tensor([0.0, 4.0, 5.0])).tolist() == [1.0, 0.0, 0.0]


def test_bessel_functions_are_the_formula_and_vanish_at_the_cutoff():
    basis = BesselBasis(4, 5.0)
    r = torch.tensor([1.3, 5.0], dtype=torch.float64)
    expected = [math.sin(n * math.pi * 1.3 / 5) / (math.pi * 1.3 / 5) for n in range(1, 5)]
    torch.testing.assert_close(basis(r)[0], torch.tensor(expected, dtype=torch.float64))
    assert basis(r)[1].abs().max() < 1e-14


def test_gaussians_peak_at_their_centres():
    basis = GaussianBasis(6, 5.0, width=0.5)
    values = basis(torch.arange(6, dtype=torch.float64))
    torch.testing.assert_close(values.diagonal(), torch.ones(6, dtype=torch.float64))
    assert values[0, 1].item() == pytest.approx(math.exp(-0.5 / 0.25))


@pytest.mark.parametrize("basis", [BesselBasis(8, 5.0), GaussianBasis(8, 5.0)])
def test_dtype_follows_the_lengths(basis):
    """No table of float64 in a float32 network, none of float32 in a float64 one."""
    r = torch.tensor([1.0, 2.0, 4.9])
    assert basis(r).dtype == torch.float32
    assert basis(r.double()).dtype == torch.float64
    torch.testing.assert_close(basis(r).double(), basis(r.double()), atol=1e-5, rtol=1e-5)


def test_one_gaussian_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        GaussianBasis(1, 5.0)
