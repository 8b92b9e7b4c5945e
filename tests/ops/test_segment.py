import pytest
import torch

from atomeq.ops.segment.operations import segment_mean, segment_softmax, segment_sum

INDEX = torch.tensor([2, 0, 2, 2, 4, 0])  # unsorted; 1, 3 and 5 are empty
N = 6


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(6, 3, dtype=torch.float64, requires_grad=True)


def test_sum_and_mean_are_those_of_the_members(x: torch.Tensor) -> None:
    sums, means = segment_sum(x, INDEX, N), segment_mean(x, INDEX, N)
    for segment in range(N):
        members = x[segment == INDEX]
        torch.testing.assert_close(sums[segment], members.sum(0))
        if len(members):
            torch.testing.assert_close(means[segment], members.mean(0))
        else:
            assert means[segment].eq(0).all()


def test_softmax_sums_to_one_in_every_segment(x: torch.Tensor) -> None:
    weights = segment_softmax(x, INDEX, N)
    for segment in range(N):
        members = x[segment == INDEX]
        torch.testing.assert_close(weights[segment == INDEX], members.softmax(0))


def test_softmax_of_large_logits_is_finite() -> None:
    logits = torch.tensor([1e4, -1e4, 3e4, 3e4, 0.0, 1e4])
    expected = torch.tensor([0.0, 0.0, 0.5, 0.5, 1.0, 1.0])
    torch.testing.assert_close(segment_softmax(logits, INDEX, N), expected)


def test_softmax_does_not_see_other_graphs() -> None:
    logits = torch.randn(6)
    lifted = torch.where(INDEX == 2, logits + 100, logits)
    both = segment_softmax(logits, INDEX, N), segment_softmax(lifted, INDEX, N)
    torch.testing.assert_close(*both, rtol=1e-4, atol=0)


@pytest.mark.parametrize("operation", [segment_sum, segment_mean, segment_softmax])
def test_derivatives_are_right(operation, x: torch.Tensor) -> None:
    assert torch.autograd.gradcheck(lambda x: operation(x, INDEX, N), x)
    assert torch.autograd.gradgradcheck(lambda x: operation(x, INDEX, N), x)


def test_sum_repeats_to_the_bit() -> None:
    x, index = torch.randn(10000, 4), torch.randint(0, 50, (10000,))
    assert segment_sum(x, index, 50).equal(segment_sum(x, index, 50))


@pytest.mark.parametrize("operation", [segment_sum, segment_mean, segment_softmax])
def test_nothing_to_reduce(operation) -> None:
    out = operation(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), 2)
    assert out.eq(0).all()


@pytest.mark.parametrize("operation", [segment_sum, segment_mean, segment_softmax])
def test_refuses_an_index_of_another_length(operation, x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="6 members"):
        operation(x, INDEX[:5], N)
