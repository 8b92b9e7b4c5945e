"""The geometric product: against matrices that multiply alike, kernels and derivatives."""

import pytest
import torch
from torch import Tensor

from atomeq.ops.clifford.algebra import algebra_of, blades, terms
from atomeq.ops.clifford.operations import geometric_product, number_of_paths
from atomeq.ops.dispatch import use_backend

EXACT = 1e-13  # of numbers of order one
SIGNATURES = [(3, 0), (1, 1), (0, 2), (2, 1), (4, 0), (1, 3), (3, 2)]
BACKENDS = ["cpu", "reference"]


def multivectors(signature: tuple[int, int], n: int = 3, channels: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (n, 2 ** sum(signature), channels)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def matrices(signature: tuple[int, int]) -> list[Tensor]:
    """The unit vectors as anticommuting matrices, Jordan and Wigner's, with squares of 1 and -1."""
    x = torch.tensor([[0, 1], [1, 0]], dtype=torch.complex128)
    y = torch.tensor([[0, -1j], [1j, 0]], dtype=torch.complex128)
    z, one = torch.diag(torch.tensor([1, -1], dtype=torch.complex128)), torch.eye(2).to(x)
    found = []
    for k in range(sum(signature)):
        factors = [z] * (k // 2) + [(x, y)[k % 2]] + [one] * (2 - k // 2)
        matrix = factors[0]
        for factor in factors[1:]:
            matrix = torch.kron(matrix, factor)
        found.append(matrix if k < signature[0] else 1j * matrix)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("signature", SIGNATURES)
def test_multivectors_multiply_as_matrices_do(signature: tuple[int, int], backend: str) -> None:
    vectors = matrices(signature)
    names = []
    for blade in blades(sum(signature)):
        matrix = torch.eye(len(vectors[0])).to(vectors[0])
        for vector in blade:
            matrix = matrix @ vectors[vector]
        names.append(matrix)
    basis = torch.stack(names)

    def matrix_of(x: Tensor) -> Tensor:
        return torch.einsum("nbc,bij->ncij", x.to(basis), basis)

    x, y, _ = multivectors(signature)
    with use_backend(backend):
        product = geometric_product(x, y, signature=signature)
    assert (matrix_of(product) - matrix_of(x) @ matrix_of(y)).abs().max() <= EXACT * 100


@pytest.mark.parametrize("sharing", ["grade", "quaternion"])
@pytest.mark.parametrize("signature", [(3, 0), (1, 1), (4, 0), (2, 3)])
def test_kernels_and_reference_agree_with_weights(signature: tuple[int, int], sharing) -> None:
    x, y, _ = multivectors(signature)
    weights = torch.randn(number_of_paths(signature, sharing), 2, dtype=torch.float64)
    found = []
    for backend in BACKENDS:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, y, weights)]
        with use_backend(backend):
            value = geometric_product(*leaves, signature=signature, sharing=sharing)
            first = torch.autograd.grad(value.sin().sum(), leaves, create_graph=True)
            square = torch.stack([part.square().sum() for part in first]).sum()
            found.append([value, *first, *torch.autograd.grad(square, leaves)])
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= EXACT * 10 * other.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("signature", [(3, 0), (1, 1)])
def test_derivatives_are_those_of_finite_differences(signature: tuple[int, int], backend) -> None:
    x, y, _ = multivectors(signature, n=2, channels=1)
    weights = torch.randn(number_of_paths(signature), 1, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, y, weights)]

    def product(*leaves: Tensor) -> Tensor:
        return geometric_product(*leaves, signature=signature)

    with use_backend(backend):
        assert torch.autograd.gradcheck(product, leaves)
        assert torch.autograd.gradgradcheck(product, leaves)


def test_leading_axes_and_no_rows_are_served() -> None:
    x, y, _ = multivectors((3, 0), n=6)
    for backend in BACKENDS:
        with use_backend(backend):
            flat = geometric_product(x, y)
            folded = geometric_product(x.view(2, 3, 8, 2), y.view(2, 3, 8, 2))
            assert torch.equal(folded.view(6, 8, 2), flat)
            assert geometric_product(x[:0], y[:0]).shape == (0, 8, 2)


def test_paths_are_counted_as_published() -> None:
    """Of CGENN 20 in three dimensions; of GLGENN 29 of 35 and 32 of 56 in four and five."""
    assert [number_of_paths((n, 0)) for n in (3, 4, 5)] == [20, 35, 56]
    assert [number_of_paths((n, 0), "quaternion") for n in (3, 4, 5)] == [20, 29, 32]
    own, shared = (algebra_of((3, 0), sharing) for sharing in ("grade", "quaternion"))
    assert own.path_numbers() == shared.path_numbers()
    assert len(terms(own)) == 64


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(2, 8, 3)
    with pytest.raises(ValueError, match="1 to 5 together"):
        geometric_product(x, x, signature=(3, 3))
    with pytest.raises(ValueError, match=r"both are \(\*, 16"):
        geometric_product(x, x, signature=(3, 1))
    with pytest.raises(ValueError, match=r"not \(20, 3\)"):
        geometric_product(x, x, torch.zeros(19, 3))
    with pytest.raises(ValueError, match="sharing 'all' is unknown"):
        geometric_product(x, x, sharing="all")  # pyright: ignore
    with pytest.raises(TypeError, match="cast them to one dtype"):
        geometric_product(x, x.double())
