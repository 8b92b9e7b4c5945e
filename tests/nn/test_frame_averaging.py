"""Frames turn along with what they belong to, degenerate or not."""

import math

import pytest
import torch
from scipy.spatial.transform import Rotation

from atomeq.nn.canonicalization import canonical_frames
from atomeq.nn.frame_averaging import PrincipalAxes, drawn, principal_frames

EXACT = 1e-10
TURN = torch.tensor(Rotation.from_rotvec([0.7, -1.3, 0.4]).as_matrix())
MIRROR = TURN @ torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))
CORNERS = torch.tensor(
    [[x, y, z] for x in (1, -1) for y in (1, -1) for z in (1, -1)], dtype=torch.float64
)
SHAPES = {
    "generic": torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "nothing": torch.zeros(0, 3, dtype=torch.float64),
    "line": torch.tensor([[1.0, 2.0, 2.0], [-2.0, -4.0, -4.0]], dtype=torch.float64),
    "nearly a line": torch.tensor([[1.0, 0, 0], [-1.0, 1e-8, 0], [2.0, 1e-8, 0]]).double(),
    "triangle": torch.tensor(
        [[math.cos(a), math.sin(a), 0.3] for a in (0.1 + 2 * math.pi / 3 * k for k in range(3))],
        dtype=torch.float64,
    ),
    "tetrahedron": CORNERS[[0, 3, 5, 6]],
    "cube": CORNERS,
    "octahedron": torch.cat([torch.eye(3), -torch.eye(3)]).double(),
}


def frames(vectors, **options):
    index = torch.zeros(len(vectors), dtype=torch.long)
    return principal_frames(vectors, index, n_graphs=1, **options)


def mean_of_generic_function(vectors, **options):
    """Average a function without any symmetry but that of exchanging vectors."""
    matrices, weights = frames(vectors, **options)
    seen = vectors @ matrices[:, 0]  # (n_frames, n_vectors, 3)
    mix = torch.tensor([[0.3, -0.9, 0.5], [1.1, 0.2, -0.4], [0.7, 0.6, 0.8]], dtype=torch.float64)
    values = torch.sin(seen @ mix + 0.4).prod(dim=2).sum(dim=1)
    return float((weights[:, 0] * values).sum())


@pytest.mark.parametrize("proper", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_frames_are_orthogonal_and_their_weights_sum_to_one(shape, proper):
    matrices, weights = frames(SHAPES[shape], proper=proper)
    eye = torch.eye(3, dtype=torch.float64).expand_as(matrices)
    torch.testing.assert_close(matrices.mT @ matrices, eye, rtol=0, atol=EXACT)
    torch.testing.assert_close(weights.sum(0), torch.ones(1, dtype=torch.float64))
    if proper:
        torch.testing.assert_close(torch.linalg.det(matrices), weights.new_ones(weights.shape))


@pytest.mark.parametrize("noise", [0.0, 1e-9], ids=["exact", "rounded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_mean_over_frames_is_invariant(shape, noise):
    vectors = SHAPES[shape]
    order = torch.randperm(len(vectors))
    rounding = noise * torch.randn(vectors.shape, dtype=torch.float64)
    for matrix in (TURN, MIRROR):
        turned = (vectors @ matrix.T + rounding)[order]
        assert mean_of_generic_function(turned) == pytest.approx(
            mean_of_generic_function(vectors), abs=EXACT + 100 * noise
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_proper_frames_see_no_rotation_but_a_reflection(shape):
    vectors = SHAPES[shape]
    before = mean_of_generic_function(vectors, proper=True)
    after = mean_of_generic_function(vectors @ TURN.T, proper=True)
    mirrored = mean_of_generic_function(vectors @ MIRROR.T, proper=True)
    assert after == pytest.approx(before, abs=EXACT)
    chiral = shape == "generic"
    assert (abs(mirrored - before) > 1e-4) == chiral


@pytest.mark.parametrize("shape", ["generic", "triangle", "tetrahedron", "cube"])
def test_frames_of_the_plane_keep_z(shape):
    vectors = SHAPES[shape]
    matrices, _ = frames(vectors, dim=2)
    assert len(matrices) % 4 == 0
    torch.testing.assert_close(matrices[:, 0, 2, 2], torch.ones(len(matrices)).double())
    about_z = torch.tensor(Rotation.from_rotvec([0, 0, 0.8]).as_matrix())
    assert mean_of_generic_function(vectors @ about_z.T, dim=2) == pytest.approx(
        mean_of_generic_function(vectors, dim=2), abs=EXACT
    )


def test_labels_break_ties():
    plain = frames(SHAPES["octahedron"])
    labelled = frames(SHAPES["octahedron"], labels=torch.tensor([9, 1, 1, 1, 1, 1]))
    assert len(plain.matrices) == 8 * 6
    assert len(labelled.matrices) == 8 * 2


def test_published_det_is_not_invariant():
    """The defect of the published single frame, kept for parity and documented."""
    before, after = (
        mean_of_generic_function(SHAPES["generic"] @ matrix.T, method="det")
        for matrix in (torch.eye(3).double(), TURN)
    )
    assert abs(before - after) > 1e-3


def test_stochastic_frames_come_from_all_and_from_their_seed():
    every = frames(SHAPES["tetrahedron"])
    index = torch.zeros(4, dtype=torch.long)
    draws = [
        principal_frames(
            SHAPES["tetrahedron"],
            index,
            n_graphs=1,
            method="stochastic",
            generator=torch.Generator().manual_seed(5),
        ).matrices
        for _ in range(2)
    ]
    torch.testing.assert_close(*draws)
    assert (every.matrices - draws[0]).abs().amax(dim=(1, 2, 3)).min() < EXACT
    with pytest.raises(ValueError, match="Generator"):
        drawn(every, None)


def test_frames_of_a_batch_are_those_of_its_members():
    shapes = list(SHAPES.values())
    index = torch.arange(len(shapes)).repeat_interleave(torch.tensor([len(s) for s in shapes]))
    together = principal_frames(torch.cat(shapes), index, n_graphs=len(shapes))
    for k, shape in enumerate(shapes):
        alone = frames(shape)
        present = together.weights[:, k] > 0
        assert len(alone.matrices) == int(present.sum())
        torch.testing.assert_close(together.weights[present, k], alone.weights[:, 0])
        torch.testing.assert_close(together.matrices[present, k], alone.matrices[:, 0])


def test_axes_have_first_and_second_derivatives():
    vectors = SHAPES["generic"].clone().requires_grad_()

    def projected(x):
        values, axes = PrincipalAxes.apply((x.T @ x)[None])
        return values, (x @ axes).abs().sum(dim=0)  # signs play no part

    assert torch.autograd.gradcheck(projected, (vectors,))
    assert torch.autograd.gradgradcheck(projected, (vectors,))


@pytest.mark.parametrize("shape", ["line", "nearly a line", "cube", "octahedron", "triangle"])
def test_degenerate_axes_have_finite_derivatives(shape):
    vectors = SHAPES[shape].clone().requires_grad_()
    matrices, _ = frames(vectors)
    torch.sin(vectors @ matrices[:, 0]).sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()


def test_canonical_frames_turn_along_and_know_when_they_cannot():
    vectors = torch.randn(3, 3, 3, dtype=torch.float64)
    vectors[1, :, 2] = vectors[1, :, 0] - 2 * vectors[1, :, 1]  # in one plane
    vectors[2] = 0.0
    vectors.requires_grad_()
    before, degenerate = canonical_frames(vectors)
    after, _ = canonical_frames(MIRROR @ vectors)
    assert degenerate.tolist() == [False, True, True]
    torch.testing.assert_close(after[0], MIRROR @ before[0], rtol=0, atol=EXACT)
    assert canonical_frames(vectors, proper=True)[1].tolist() == [False, False, True]
    before.sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()
