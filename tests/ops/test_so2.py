import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from atomeq.ops.edge.operations import (
    rotate_from_edge,
    rotate_to_edge,
    so2_linear,
    so2_linear_with_scalars,
)
from atomeq.ops.edge.wigner import (
    block_diagonal,
    build_edge_frame,
    edge_quaternion,
    rotation_matrix,
    wigner_from_matrix,
    wigner_matrices,
)
from atomeq.ops.orders import m_primary_order

EXACT = 1e-12  # float64 rounding through second derivatives; 1e-14 measured
SINGLE = 2e-6  # float32
DEGREES = [(1, 0), (1, 1), (2, 2), (3, 1), (4, 2), (6, 2)]
POLES = [[0.0, 1.3, 0.0], [0.0, -1.3, 0.0], [1e-8, 1.0, 0.0], [0.0, -1.0, 1e-8]]


class Layer:
    """A convolution with all that surrounds it: both atoms, radial scale, gate, envelope, sum."""

    def __init__(self, lmax: int, mmax: int, *, dtype: torch.dtype = torch.float64) -> None:
        self.lmax, self.mmax, self.n_atoms, channels = lmax, mmax, 5, 3
        shapes = [(2 * (lmax + 1) + 1, 2 * channels * (lmax + 1))]
        degrees = [lmax - m + 1 for m in range(1, mmax + 1)]
        shapes += [(2, 2 * n, 2 * channels * n) for n in degrees]
        self.weights = [
            (torch.randn(shape, dtype=dtype) / math.sqrt(shape[-1])).requires_grad_()
            for shape in shapes
        ]
        self.frequencies = torch.rand(sum(s[-1] for s in shapes), dtype=dtype)
        self.x = torch.randn(self.n_atoms, (lmax + 1) ** 2, channels, dtype=dtype)
        self.vectors = torch.cat([torch.randn(9, 3, dtype=dtype), torch.tensor(POLES, dtype=dtype)])
        self.edge_index = torch.randint(0, self.n_atoms, (2, len(self.vectors)))

    def message(self, z: Tensor, lengths: Tensor) -> Tensor:
        y, scalars = so2_linear_with_scalars(
            z,
            self.weights,
            lmax=self.lmax,
            mmax=self.mmax,
            scale=torch.cos(lengths[:, None] * self.frequencies),
            n_scalars=1,
        )
        return y * torch.sigmoid(scalars)[:, :, None]

    def __call__(self, x: Tensor, vectors: Tensor) -> Tensor:
        frame = build_edge_frame(
            vectors, self.edge_index, n_atoms=self.n_atoms, lmax=self.lmax, mmax=self.mmax
        )
        y = self.message(rotate_to_edge(x, frame, side="both"), frame.lengths)
        return rotate_from_edge(y, frame, envelope=torch.exp(-frame.lengths))

    def through_the_matrix(self, x: Tensor, vectors: Tensor) -> Tensor:
        """The same, differentiated by autograd through D(v); smooth but where y = 0."""
        lengths = vectors.norm(dim=1, keepdim=True)
        full = block_diagonal(wigner_matrices(edge_quaternion(vectors / lengths), self.lmax))
        wigner = full[:, m_primary_order(self.lmax, self.mmax)]
        source, target = self.edge_index
        z = wigner @ torch.cat([x[source], x[target]], dim=-1)
        y = self.message(z, lengths[:, 0])
        lab = (wigner.mT @ y) * torch.exp(-lengths)[:, :, None]
        return torch.zeros(self.n_atoms, *lab.shape[1:], dtype=x.dtype).index_add(0, target, lab)


def relative(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


def derivatives(layer: Layer, function: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    """Return the output, all first derivatives and all of a scalar of the first ones."""
    generator = torch.Generator().manual_seed(1)
    x, vectors = layer.x.clone().requires_grad_(), layer.vectors.clone().requires_grad_()
    inputs = [x, vectors, *layer.weights]
    out = function(x, vectors)
    energy = (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum()
    energy = energy + out.square().sum()
    first = torch.autograd.grad(energy, inputs, create_graph=True)
    loss = first[1].square().sum() + (first[0] * torch.cos(first[0].detach())).sum()
    second = torch.autograd.grad(loss, inputs)
    return [out, *first, *second]


@pytest.mark.parametrize(("lmax", "mmax"), DEGREES)
def test_torque_identity_gives_the_derivatives_of_the_wigner_matrices(lmax: int, mmax: int) -> None:
    layer = Layer(lmax, mmax)
    found = derivatives(layer, layer)
    expected = derivatives(layer, layer.through_the_matrix)
    assert max(map(relative, found, expected)) <= EXACT


def test_gradients_are_those_of_finite_differences_in_the_vectors() -> None:
    layer = Layer(2, 1)
    x = layer.x.requires_grad_()
    vectors = layer.vectors.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, v: layer(a, v).square().sum(), (x, vectors))


@pytest.mark.parametrize("side", ["source", "target", "both"])
def test_operations_pass_gradcheck_and_gradgradcheck_in_the_features(side: str) -> None:
    layer = Layer(2, 1)
    frame = build_edge_frame(layer.vectors, layer.edge_index, n_atoms=5, lmax=2, mmax=1)
    x = layer.x[:, :, :1].clone().requires_grad_()
    y = torch.randn(13, 7, 1, dtype=torch.float64, requires_grad=True)
    envelope = torch.rand(13, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda a: rotate_to_edge(a, frame, side=side), x)
        assert check(lambda a, e: rotate_from_edge(a, frame, envelope=e), (y, envelope))
        assert check(lambda a: rotate_from_edge(a, frame, reduce="none"), y)


def test_invariants_pass_gradgradcheck_in_the_vectors() -> None:
    """Energies are invariant about every edge; for them the torque identity is exact."""
    layer = Layer(2, 2)
    layer.weights = [weight.detach() for weight in layer.weights]
    vectors = layer.vectors[:6].clone().requires_grad_()
    layer.edge_index = layer.edge_index[:, :6]
    assert torch.autograd.gradgradcheck(lambda v: layer(layer.x, v).square().sum(), vectors)


def test_torque_has_no_component_along_the_edge() -> None:
    """tau = v x dE/dv + (tau . v) v / v^2; the last term is what a roll of the frame would do."""
    layer = Layer(3, 2)
    rolls = torch.zeros(len(layer.vectors), dtype=torch.float64, requires_grad=True)
    half = rolls / 2
    zero = torch.zeros_like(half)
    about_y = wigner_matrices(torch.stack([half.cos(), zero, half.sin(), zero], dim=1), 3)
    rows = m_primary_order(3, 2)
    roll = block_diagonal(about_y)[:, rows][:, :, rows]
    frame = build_edge_frame(layer.vectors, layer.edge_index, n_atoms=5, lmax=3, mmax=2)
    y = layer.message(roll @ rotate_to_edge(layer.x, frame, side="both"), frame.lengths)
    out = rotate_from_edge(roll.mT @ y, frame)
    (along,) = torch.autograd.grad(out.square().sum() + out.sum(), rolls)
    assert along.abs().max() <= EXACT * out.square().sum()


def test_roll_of_the_frame_changes_nothing() -> None:
    layer = Layer(4, 2)
    lengths = layer.vectors.norm(dim=1, keepdim=True)
    rotation = rotation_matrix(edge_quaternion(layer.vectors / lengths))
    angles = torch.rand(len(rotation), dtype=torch.float64) * 6
    zero = torch.zeros_like(angles)
    roll = rotation_matrix(torch.stack([(angles / 2).cos(), zero, (angles / 2).sin(), zero], dim=1))
    outputs = []
    for given in (None, rotation, roll @ rotation):
        frame = build_edge_frame(
            layer.vectors, layer.edge_index, n_atoms=5, lmax=4, mmax=2, rotation=given
        )
        y = layer.message(rotate_to_edge(layer.x, frame, side="both"), frame.lengths)
        outputs.append(rotate_from_edge(y, frame))
    assert relative(outputs[1], outputs[0]) <= EXACT
    assert relative(outputs[2], outputs[0]) <= EXACT


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, EXACT), (torch.float32, SINGLE)])
@pytest.mark.parametrize(("lmax", "mmax"), DEGREES)
def test_layer_is_equivariant(lmax: int, mmax: int, dtype: torch.dtype, bar: float) -> None:
    layer = Layer(lmax, mmax, dtype=dtype)
    quaternion = torch.nn.functional.normalize(torch.randn(4, dtype=torch.float64), dim=0)
    rotation = rotation_matrix(quaternion)
    wigner = block_diagonal(wigner_from_matrix(rotation, lmax)).to(dtype)
    turned = layer.vectors.double() @ rotation.T
    expected = wigner @ layer(layer.x, layer.vectors)
    assert relative(layer(wigner @ layer.x, turned.to(dtype)), expected) <= bar


@pytest.mark.parametrize("lmax", [1, 3])
def test_map_without_imaginary_weights_commutes_with_reflections(lmax: int) -> None:
    layer = Layer(lmax, 1)
    layer.weights[1] = layer.weights[1][0]
    mirror = torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64))
    wigner = block_diagonal(wigner_from_matrix(mirror, lmax))
    expected = wigner @ layer(layer.x, layer.vectors)
    assert relative(layer(wigner @ layer.x, layer.vectors @ mirror), expected) <= EXACT


def test_there_and_back_is_the_identity() -> None:
    layer = Layer(3, 3)
    frame = build_edge_frame(layer.vectors, layer.edge_index, n_atoms=5, lmax=3, mmax=3)
    back = rotate_from_edge(rotate_to_edge(layer.x, frame), frame, reduce="none")
    torch.testing.assert_close(back, layer.x[frame.source])


def test_sum_is_over_the_edges_of_each_target() -> None:
    layer = Layer(2, 2)
    frame = build_edge_frame(layer.vectors, layer.edge_index, n_atoms=7, lmax=2, mmax=2)
    y = torch.randn(13, 9, 2, dtype=torch.float64)
    envelope = torch.rand(13, dtype=torch.float64)
    edges = rotate_from_edge(y, frame, envelope=envelope, reduce="none")
    atoms = rotate_from_edge(y, frame, envelope=envelope)
    for atom in range(7):
        torch.testing.assert_close(atoms[atom], edges[frame.target == atom].sum(0))


def test_so2_linear_is_the_formula() -> None:
    layer = Layer(2, 1)
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    scale = torch.rand(4, 30, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64)
    weights = [layer.weights[0][1:], layer.weights[1]]
    y = so2_linear(x, weights, lmax=2, mmax=1, bias=bias, scale=scale)
    zeroth = (x[:, :3].flatten(1) * scale[:, :18]) @ weights[0].T + bias
    plus = x[:, 3:5].flatten(1) * scale[:, 18:]
    minus = x[:, 5:].flatten(1) * scale[:, 18:]
    real, imaginary = weights[1]
    expected = [
        zeroth,
        plus @ real.T - minus @ imaginary.T,
        plus @ imaginary.T + minus @ real.T,
    ]
    torch.testing.assert_close(y.flatten(1), torch.cat(expected, dim=1))


def test_backward_saves_no_edge_feature_in_the_lab_frame() -> None:
    """What is kept between forward and backward grows with the atoms, not with edges x n_sph."""
    layer = Layer(2, 2)
    frame = build_edge_frame(
        layer.vectors.requires_grad_(), layer.edge_index, n_atoms=5, lmax=2, mmax=2
    )
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = layer.x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rotate_to_edge(x, frame)
    assert {tuple(tensor.shape) for tensor in saved} <= {(5, 9, 3), (13, 3), (13, 9, 9), (13,)}


def test_graph_without_edges_gives_zeros_and_gradients() -> None:
    vectors = torch.zeros(0, 3, requires_grad=True)
    frame = build_edge_frame(
        vectors, torch.zeros(2, 0, dtype=torch.long), n_atoms=3, lmax=2, mmax=1
    )
    x = torch.randn(3, 9, 4, requires_grad=True)
    out = rotate_from_edge(rotate_to_edge(x, frame), frame)
    assert out.shape == (3, 9, 4)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.eq(0).all()


def test_refuses_features_that_do_not_belong_to_the_frame() -> None:
    layer = Layer(2, 1)
    frame = build_edge_frame(layer.vectors, layer.edge_index, n_atoms=5, lmax=2, mmax=1)
    with pytest.raises(ValueError, match=r"needs \(5, 9, channels\)"):
        rotate_to_edge(layer.x[:, :4], frame)
    with pytest.raises(TypeError, match="float32 but the edge vectors"):
        rotate_to_edge(layer.x.float(), frame)
    with pytest.raises(ValueError, match="choose source, target or both"):
        rotate_to_edge(layer.x, frame, side="centre")  # type: ignore[arg-type]
    z = rotate_to_edge(layer.x, frame)
    with pytest.raises(ValueError, match="choose sum or none"):
        rotate_from_edge(z, frame, reduce="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="envelope is"):
        rotate_from_edge(z, frame, envelope=torch.ones(3, dtype=torch.float64))


def test_refuses_weights_that_do_not_fit() -> None:
    layer = Layer(2, 1)
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="1 rows too many"):
        so2_linear(x, layer.weights, lmax=2, mmax=1)
    with pytest.raises(ValueError, match="needs one per order"):
        so2_linear(x, layer.weights[:1], lmax=2, mmax=1)
    with pytest.raises(ValueError, match="weights are"):
        so2_linear(x, [layer.weights[0], layer.weights[1][:, :, :5]], lmax=2, mmax=1)
    with pytest.raises(ValueError, match="need 9 rows"):
        so2_linear(x, layer.weights, lmax=2, mmax=2)
    with pytest.raises(ValueError, match="scale is"):
        so2_linear_with_scalars(x, layer.weights, lmax=2, mmax=1, scale=x[:, 0])
