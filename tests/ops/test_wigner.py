from collections.abc import Iterator

import pytest
import torch
from e3nn import o3

from atomeq.ops.edge.frame import EdgeFrame
from atomeq.ops.edge.wigner import (
    block_diagonal,
    build_edge_frame,
    edge_quaternion,
    generators,
    jd_matrix,
    rotation_matrix,
    wigner_from_matrix,
    wigner_matrices,
)
from atomeq.ops.harmonics.operations import spherical_harmonics
from atomeq.ops.orders import coefficient_index, m_primary_order

EXACT = 1e-12  # float64 rounding at l <= 6 with room to spare; 2e-14 measured
AXES = [[0.0, 1.0, 0.0], [0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]
BESIDE = [
    [1e-8, 1.0, 0.0],
    [0.0, 1.0, -1e-8],
    [1e-8, -1.0, 1e-8],
    [0.0, -1.0, 1e-8],
    [1e-3, -1.0, 0],
]


@pytest.fixture
def double_by_default() -> Iterator[None]:
    """e3nn builds its generators in the default dtype: in float32 its matrices are good to 1e-6."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random_quaternions(n: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, 4, dtype=torch.float64), dim=-1)


def directions(n: int = 200) -> torch.Tensor:
    """Random directions, the axes, and directions right beside the poles."""
    special = torch.tensor(AXES + BESIDE, dtype=torch.float64)
    vectors = torch.cat([torch.randn(n, 3, dtype=torch.float64), special])
    return vectors / vectors.norm(dim=1, keepdim=True)


def act(matrices: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)


def frame_of(vectors: torch.Tensor, lmax: int, mmax: int, **options: torch.Tensor) -> EdgeFrame:
    edge_index = torch.zeros(2, len(vectors), dtype=torch.long)
    return build_edge_frame(vectors, edge_index, n_atoms=1, lmax=lmax, mmax=mmax, **options)


@pytest.mark.usefixtures("double_by_default")
def test_wigner_matrices_equal_e3nn() -> None:
    quaternions = random_quaternions(50)
    rotations = rotation_matrix(quaternions)
    for l, matrix in enumerate(wigner_matrices(quaternions, 6)):
        expected = o3.Irrep(l, 1).D_from_matrix(rotations)
        assert (matrix - expected).abs().max() <= EXACT


@pytest.mark.usefixtures("double_by_default")
def test_rotated_harmonics_are_the_harmonics_of_the_rotated_vector() -> None:
    quaternions, vectors = random_quaternions(50), directions(41)
    rotated = act(rotation_matrix(quaternions), vectors)
    matrices = block_diagonal(wigner_matrices(quaternions, 11))
    error = act(matrices, spherical_harmonics(vectors, 11)) - spherical_harmonics(rotated, 11)
    assert error.abs().max() <= EXACT


def test_reflections_and_inversion_have_wigner_matrices_too() -> None:
    mirrors = -rotation_matrix(random_quaternions(20))
    vectors = torch.randn(20, 3, dtype=torch.float64)
    matrices = block_diagonal(wigner_from_matrix(mirrors, 6))
    harmonics = spherical_harmonics(act(mirrors, vectors), 6)
    assert (act(matrices, spherical_harmonics(vectors, 6)) - harmonics).abs().max() <= EXACT


def test_wigner_matrices_are_a_representation() -> None:
    a, b = rotation_matrix(random_quaternions(2))
    product = block_diagonal(wigner_from_matrix(a @ b, 5))
    factors = [block_diagonal(wigner_from_matrix(rotation, 5)) for rotation in (a, b)]
    assert (product - factors[0] @ factors[1]).abs().max() <= EXACT


def test_wigner_matrices_have_finite_gradients_at_the_poles() -> None:
    poles = torch.tensor(AXES[:2], dtype=torch.float64, requires_grad=True)
    matrices = block_diagonal(wigner_matrices(edge_quaternion(poles), 4))
    (gradient,) = torch.autograd.grad((matrices * torch.randn_like(matrices)).sum(), poles)
    assert gradient.abs().max() < 1e3  # Euler angles give 1 / sin(beta)


def test_jd_matrix_is_a_symmetric_involution() -> None:
    for l in range(12):
        jd = jd_matrix(l)
        assert (jd - jd.T).abs().max() <= EXACT
        assert (jd @ jd - torch.eye(2 * l + 1, dtype=jd.dtype)).abs().max() <= EXACT


def test_generators_are_the_derivatives_of_rotations() -> None:
    step = 1e-4
    for axis, generator in enumerate(generators(6)):
        turn = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64).repeat(2, 1)
        turn[:, axis + 1] = torch.tensor([step / 2, -step / 2])
        there, back = block_diagonal(wigner_matrices(torch.nn.functional.normalize(turn), 6))
        # the third derivative grows as l^3, times step^2 / 6
        assert ((there - back) / (2 * step) - generator).abs().max() <= 1e-6


def test_generators_are_antisymmetric_and_close_as_an_algebra() -> None:
    x, y, z = generators(6)
    for generator in (x, y, z):
        assert (generator + generator.T).abs().max() <= EXACT
    assert (x @ y - y @ x - z).abs().max() <= EXACT
    assert (y @ z - z @ y - x).abs().max() <= EXACT


def test_edge_quaternion_takes_every_edge_to_the_pole() -> None:
    vectors = directions()
    turned = act(rotation_matrix(edge_quaternion(vectors)), vectors)
    assert (turned - torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)).abs().max() <= 1e-15


@pytest.mark.parametrize(("lmax", "mmax"), [(0, 0), (1, 1), (2, 2), (4, 2), (6, 6), (11, 3)])
def test_frame_takes_every_edge_to_the_pole(lmax: int, mmax: int) -> None:
    vectors = 2.5 * directions()
    frame = frame_of(vectors, lmax, mmax)
    pole = spherical_harmonics(torch.tensor(AXES[:1], dtype=torch.float64), lmax)
    aligned = act(frame.wigner, spherical_harmonics(vectors, lmax))
    assert (aligned - pole[:, m_primary_order(lmax, mmax)]).abs().max() <= EXACT
    rows = frame.wigner @ frame.wigner.mT - torch.eye(frame.wigner.shape[1], dtype=vectors.dtype)
    assert rows.abs().max() <= EXACT


@pytest.mark.parametrize("lmax", [2, 4, 6])
def test_frame_is_aligned_in_single_precision(lmax: int) -> None:
    vectors = directions().float()
    frame = frame_of(vectors, lmax, lmax)
    pole = spherical_harmonics(torch.tensor(AXES[:1]), lmax)[:, m_primary_order(lmax, lmax)]
    error = act(frame.wigner, spherical_harmonics(vectors, lmax)) - pole
    assert error.abs().max() <= 2e-6 * pole.norm()


def test_frame_is_a_proper_rotation() -> None:
    frame = frame_of(directions(), 1, 1)
    y, z, x = frame.wigner[:, 1:, 1:].unbind(1)  # m-primary rows of l = 1: m = 0, +1, -1
    assert (torch.linalg.det(torch.stack([x, y, z], dim=1)) - 1).abs().max() <= EXACT


def test_frame_differs_from_that_of_the_quaternion_by_a_roll() -> None:
    vectors = directions()
    other = block_diagonal(wigner_matrices(edge_quaternion(vectors), 4))
    roll = frame_of(vectors, 4, 4).wigner @ other[:, m_primary_order(4, 4)].mT
    orders = torch.tensor([0] * 5 + [m for m in (1, 2, 3, 4) for _ in range(2 * (5 - m))])
    mixed = orders[:, None] != orders[None, :]
    assert roll[:, mixed].abs().max() <= EXACT


def test_frame_follows_a_given_rotation() -> None:
    vectors = directions()
    rotation = rotation_matrix(edge_quaternion(vectors))
    frame = frame_of(vectors, 3, 1, rotation=rotation)
    expected = block_diagonal(wigner_from_matrix(rotation, 3))[:, m_primary_order(3, 1)]
    torch.testing.assert_close(frame.wigner, expected, rtol=0, atol=0)


def test_frame_has_a_gradient_in_its_lengths_only() -> None:
    vectors = directions().requires_grad_()
    frame = frame_of(vectors, 2, 2)
    assert frame.vectors is vectors
    assert frame.lengths.requires_grad
    assert not frame.wigner.requires_grad


def test_truncated_frame_equals_one_built_with_fewer_orders() -> None:
    vectors = directions()
    truncated = frame_of(vectors, 4, 3).truncated(1)
    torch.testing.assert_close(truncated.wigner, frame_of(vectors, 4, 1).wigner)


def test_frame_without_edges_is_empty() -> None:
    assert frame_of(torch.zeros(0, 3), 2, 1).wigner.shape == (0, 7, 9)


def test_frame_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="got mmax=3, lmax=2"):
        frame_of(torch.randn(4, 3), 2, 3)
    with pytest.raises(ValueError, match="n_edges, 3"):
        build_edge_frame(
            torch.randn(4, 3), torch.zeros(2, 5, dtype=torch.long), n_atoms=1, lmax=1, mmax=1
        )
    with pytest.raises(ValueError, match="rotation is"):
        frame_of(torch.randn(4, 3), 2, 2, rotation=torch.eye(3))


def test_orders_of_rows() -> None:
    assert coefficient_index(2, 1) == [0, 1, 2, 3, 5, 6, 7]
    assert m_primary_order(2, 1) == [0, 2, 6, 3, 7, 1, 5]


def test_tables_first_built_in_inference_mode_can_be_trained_through() -> None:
    with torch.inference_mode():
        frame_of(torch.randn(4, 3), 7, 5)
        wigner_matrices(random_quaternions(1), 7)
    quaternions = random_quaternions(1).requires_grad_()
    block_diagonal(wigner_matrices(quaternions, 7)).sum().backward()
    assert quaternions.grad is not None
