"""The C kernels of a CPU against plain torch: value, gradient, second gradient; and their laws."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from atomeq.ops.c_compiler import unavailable
from atomeq.ops.coupling.operations import cg_conv, tensor_product
from atomeq.ops.dispatch import use_backend
from atomeq.ops.edge.operations import rotate_from_edge, rotate_to_edge
from atomeq.ops.edge.wigner import (
    block_diagonal,
    build_edge_frame,
    edge_wigner,
    rotation_matrix,
    wigner_from_matrix,
    wigner_rows,
)
from atomeq.ops.harmonics.cpu.kernels import slope_matrices
from atomeq.ops.harmonics.operations import spherical_harmonics
from atomeq.ops.harmonics.polynomials import harmonic_polynomials
from atomeq.ops.paths import Output, Path, tensor_product_paths
from atomeq.ops.segment.operations import segment_softmax, segment_sum
from atomeq.ops.specification import Mode

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no C kernels: {unavailable()}")

# Of the largest element: rounding, of sums in another order.
PARITY = {torch.float64: 1e-12, torch.float32: 5e-6}
EQUIVARIANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
DTYPES = [torch.float64, torch.float32]
N_SOURCES, N_TARGETS, N_EDGES = 5, 6, 23

Function = Callable[..., Tensor]


def derivatives(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the value, the gradients of a function of it and those of their squares."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    value = function(*inputs)
    direction = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)
    first = torch.autograd.grad(
        (direction * value + value.square()).sum(), inputs, create_graph=True
    )
    square = sum(part.square().sum() for part in first)
    return [value, *first, *torch.autograd.grad(square, inputs)]


def assert_same_as_reference(function: Function, inputs: Sequence[Tensor]) -> None:
    with use_backend("cpu"):
        found = derivatives(function, inputs)
    with use_backend("reference"):
        expected = derivatives(function, inputs)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= PARITY[one.dtype] * other.abs().max()


def edges() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(N_SOURCES, (N_EDGES,), generator=generator)
    return torch.stack((source, torch.randint(N_TARGETS, (N_EDGES,), generator=generator)))


def features(
    mode: Mode, lmax: int, channels: int, n_paths: int, weights: str, dtype: torch.dtype
) -> list[Tensor]:
    n_sph = (lmax + 1) ** 2
    x = torch.randn(N_SOURCES, n_sph, channels, dtype=dtype)
    y = torch.randn(N_EDGES, n_sph, *{"uvu": (), "uuu": (channels,), "uvw": (2,)}[mode])
    shape = (n_paths, channels, 2, 4) if mode == "uvw" else (n_paths, channels)
    per_edge = torch.randn(N_EDGES, *shape, dtype=dtype)
    inputs = [x, y.to(dtype)]
    return inputs + {"edge": [per_edge], "shared": [per_edge[0]], "none": []}[weights]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("mode", "lmax", "channels", "weights", "output"),
    [
        ("uvu", 2, 3, "edge", "sum"),  # fewer channels than a vector holds
        ("uvu", 3, 29, "edge", "paths"),  # two vectors, one, and a rest
        ("uvu", 2, 8, "shared", "paths"),
        ("uvu", 1, 16, "none", "sum"),
        ("uuu", 2, 3, "edge", "sum"),
        ("uuu", 2, 3, "none", "paths"),
        ("uvw", 1, 3, "edge", "paths"),
        ("uvw", 2, 3, "shared", "sum"),
    ],
)
def test_convolution_and_its_derivatives_equal_the_reference(
    mode: Mode, lmax: int, channels: int, weights: str, output: Output, dtype: torch.dtype
) -> None:
    paths = tensor_product_paths(lmax, lmax, lmax, pseudotensors=lmax < 3)
    inputs = features(mode, lmax, channels, len(paths), weights, dtype)

    def convolve(x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
        return cg_conv(x, y, weights, edges(), N_TARGETS, paths, mode=mode, output=output)

    assert_same_as_reference(convolve, inputs)


@pytest.mark.parametrize("mode", ["uvu", "uuu", "uvw"])
def test_product_of_any_batch_equals_the_reference(mode: Mode) -> None:
    paths = tensor_product_paths(1, 1, 2)
    x, y, weights = features(mode, 1, 3, len(paths), "edge", torch.float64)
    inputs = [tensor[:4].unflatten(0, (2, 2)) for tensor in (x.repeat_interleave(2, 0), y, weights)]
    assert_same_as_reference(lambda *given: tensor_product(*given, paths, mode=mode), inputs)


@pytest.mark.parametrize("mode", ["uvu", "uuu", "uvw"])
def test_convolution_passes_gradcheck_and_gradgradcheck(mode: Mode) -> None:
    paths = [Path(0, 1, 1), Path(1, 1, 0), Path(1, 1, 1)]
    inputs = [t[:3] for t in features(mode, 1, 2, len(paths), "edge", torch.float64)]
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    ends = torch.tensor([[0, 2, 0], [1, 0, 1]])

    def convolve(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        with use_backend("cpu"):
            return cg_conv(x, y, weights, ends, 2, paths, mode=mode)

    assert torch.autograd.gradcheck(convolve, inputs)
    assert torch.autograd.gradgradcheck(convolve, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution_is_equivariant_to_rotations_and_reflections(dtype: torch.dtype) -> None:
    paths = tensor_product_paths(4, 4, 4)
    x, y, weights = features("uvu", 4, 16, len(paths), "edge", dtype)
    quaternion = torch.nn.functional.normalize(torch.randn(4, dtype=torch.float64), dim=0)
    turn = block_diagonal(wigner_from_matrix(-rotation_matrix(quaternion), 4)).to(dtype)
    with use_backend("cpu"):
        expected = turn @ cg_conv(x, y, weights, edges(), N_TARGETS, paths)
        found = cg_conv(turn @ x, y @ turn.T, weights, edges(), N_TARGETS, paths)
    assert (found - expected).norm() <= EQUIVARIANCE[dtype] * expected.norm()


def test_threads_change_rounding_alone_and_their_results_are_repeatable() -> None:
    paths = tensor_product_paths(2, 2, 2)
    n_edges = 300
    inputs = [torch.randn(N_SOURCES, 9, 20), torch.randn(n_edges, 9)]
    inputs = [t.double() for t in (*inputs, torch.randn(n_edges, len(paths), 20))]
    ends = torch.stack([torch.randint(n, (n_edges,)) for n in (N_SOURCES, N_TARGETS)])

    def convolve(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        with use_backend("cpu"):
            return cg_conv(x, y, weights, ends, N_TARGETS, paths)

    before = torch.get_num_threads()
    expected = derivatives(convolve, inputs)
    try:
        torch.set_num_threads(3)
        found = derivatives(convolve, inputs)
        again = derivatives(convolve, inputs)
    finally:
        torch.set_num_threads(before)
    for one, other, repeated in zip(found, expected, again, strict=True):
        torch.testing.assert_close(one, other)
        assert torch.equal(one, repeated)


def test_strides_modes_and_empty_graphs_are_served() -> None:
    paths = tensor_product_paths(2, 2, 2)
    x, y, weights = features("uvu", 2, 8, len(paths), "edge", torch.float64)
    with use_backend("cpu"):
        expected = cg_conv(x, y, weights, edges(), N_TARGETS, paths)
        strided = [torch.stack((t, t), -1)[..., 1] for t in (x, y, weights)]
        both = torch.stack((edges(), edges()), -1)[..., 0]
        assert torch.equal(cg_conv(*strided, both, N_TARGETS, paths), expected)
        with torch.inference_mode():
            assert torch.equal(cg_conv(x, y, weights, edges(), N_TARGETS, paths), expected)
        nothing = cg_conv(x, y[:0], weights[:0], edges()[:, :0], 1, paths)
        assert torch.equal(nothing, torch.zeros(1, 9, 8, dtype=torch.float64))


def test_nan_comes_out_where_nan_goes_in() -> None:
    paths = tensor_product_paths(1, 1, 1)
    x, y, weights = features("uvu", 1, 8, len(paths), "edge", torch.float32)
    x[edges()[0, 0], 0, 3] = torch.nan
    with use_backend("cpu"):
        out = cg_conv(x, y, weights, edges(), N_TARGETS, paths)
        assert out[edges()[1, 0], 0, 3].isnan()
        assert spherical_harmonics(torch.full((1, 3), torch.nan), 2)[0, 1:].isnan().all()
        assert segment_sum(torch.tensor([torch.nan, 1]), torch.tensor([0, 1]), 2)[0].isnan()


def test_atoms_that_are_not_there_are_refused() -> None:
    paths = tensor_product_paths(1, 1, 1)
    x, y, weights = features("uvu", 1, 8, len(paths), "edge", torch.float32)
    for row in (0, 1):
        for number in (-1, 7):
            wrong = edges()
            wrong[row, 3] = number
            with use_backend("cpu"), pytest.raises(IndexError, match="names an atom"):
                cg_conv(x, y, weights, wrong, N_TARGETS, paths)
    with use_backend("cpu"), pytest.raises(IndexError, match="names a segment"):
        segment_sum(x, torch.full((len(x),), 9), 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lmax", [1, 6])
@pytest.mark.parametrize("normalize", [True, False])
def test_harmonics_and_their_derivatives_equal_the_reference(
    lmax: int, normalize: bool, dtype: torch.dtype
) -> None:
    vectors = torch.nn.functional.normalize(torch.randn(19, 3, dtype=dtype), dim=1) * 1.1
    for normalization in ("component", "integral", "norm"):
        assert_same_as_reference(
            lambda v: spherical_harmonics(
                v,
                lmax,
                normalize=normalize,
                normalization=normalization,  # noqa: B023
            ),
            [vectors],
        )


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 0, 3), (2, 4, 3)])
def test_harmonics_take_any_batch_and_none(shape: tuple[int, ...]) -> None:
    vectors = torch.randn(shape, dtype=torch.float64)
    assert spherical_harmonics(vectors, 2).shape == (*shape[:-1], 9)
    if vectors.numel():
        assert_same_as_reference(lambda v: spherical_harmonics(v, 2), [vectors])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("lmax", [1, 3])
def test_harmonics_have_derivatives_of_every_order(lmax: int, normalize: bool) -> None:
    vectors = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def harmonics(v: Tensor) -> Tensor:
        with use_backend("cpu"):
            return spherical_harmonics(v, lmax, normalize=normalize)

    def slope(v: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(harmonics(v).square().sum(), v, create_graph=True)
        return found + harmonics(v)[:, 1:4]

    assert torch.autograd.gradcheck(harmonics, vectors)
    assert torch.autograd.gradgradcheck(harmonics, vectors)
    assert torch.autograd.gradgradcheck(slope, vectors)


def test_derivatives_of_harmonics_are_harmonics_of_one_degree_less() -> None:
    v = torch.randn(4, 3, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacfwd(lambda v: harmonic_polynomials(v, 5)))(v)
    slopes = torch.einsum("iab,nb->nai", slope_matrices(5), harmonic_polynomials(v, 5))
    torch.testing.assert_close(slopes, jacobian)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lmax", "mmax"), [(0, 0), (2, 2), (4, 1), (6, 6)])
def test_frames_equal_the_reference_at_and_beside_the_poles(
    lmax: int, mmax: int, dtype: torch.dtype
) -> None:
    vectors = torch.randn(37, 3, dtype=dtype)  # more than the kernel takes at a time, and a rest
    poles = [[0, 1.3, 0], [0, -2, 0], [1e-8, 1, 0], [0, -1, 1e-30]]
    vectors[: len(poles)] = torch.tensor(poles, dtype=dtype)
    found = wigner_rows(vectors, lmax, mmax, "cpu")
    with use_backend("reference"):
        expected = edge_wigner(vectors, lmax, mmax)
    assert (found - expected).abs().max() <= PARITY[dtype]
    assert wigner_rows(vectors[:0], lmax, mmax, "cpu").shape == expected[:0].shape
    assert wigner_rows(vectors * torch.nan, lmax, mmax, "cpu")[:, -1].isnan().any() == (lmax > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [segment_sum, segment_softmax])
def test_segments_and_their_derivatives_equal_the_reference(
    function: Function, dtype: torch.dtype
) -> None:
    index = edges()[1]
    for shape in ((), (5,), (2, 3)):
        x = torch.randn(N_EDGES, *shape, dtype=dtype)
        assert_same_as_reference(lambda x: function(x, index, N_TARGETS + 2), [x])


@pytest.mark.parametrize("function", [segment_sum, segment_softmax])
def test_segments_pass_gradcheck_and_gradgradcheck(function: Function) -> None:
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([2, 0, 2, 2, 0])

    def segments(x: Tensor) -> Tensor:
        with use_backend("cpu"):
            return function(x, index, 4)

    assert torch.autograd.gradcheck(segments, x)
    assert torch.autograd.gradgradcheck(segments, x)


def test_segments_without_members_are_served() -> None:
    none = torch.zeros(0, dtype=torch.long)
    with use_backend("cpu"):
        assert torch.equal(segment_sum(torch.zeros(0, 3), none, 2), torch.zeros(2, 3))
        assert segment_softmax(torch.zeros(0, 3), none, 0).shape == (0, 3)


def test_mixed_dtypes_are_refused_and_those_of_autocast_are_promoted() -> None:
    """A C kernel would read bfloat16 as float32: NaN, and beyond the end of the memory."""
    paths, edges = [Path(0, 1, 1), Path(1, 1, 0)], torch.tensor([[0, 1, 2], [1, 2, 0]])
    x, y, h = torch.randn(3, 4, 16), torch.randn(3, 4), torch.randn(3, 8)
    weights, weight, bias = torch.randn(3, 2, 16), torch.randn(2, 16, 8), torch.randn(2, 16)
    with pytest.raises(TypeError, match="cast them to one dtype"):
        cg_conv(x, y, weights.bfloat16(), edges, 3, paths)
    with pytest.raises(TypeError, match="cast them to one dtype"):
        tensor_product(x, y.double(), None, paths)
    exact = cg_conv(x, y, weights, edges, 3, paths)
    radial = cg_conv(x, y, h, edges, 3, paths, radial_map=(weight, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = cg_conv(x, y, weights.bfloat16(), edges, 3, paths)
        mixed_radial = cg_conv(x, y, h.bfloat16(), edges, 3, paths, radial_map=(weight, bias))
    torch.testing.assert_close(mixed, exact, rtol=0.02, atol=0.05)
    torch.testing.assert_close(mixed_radial.float(), radial, rtol=0.02, atol=0.3)


def test_autocast_does_not_reach_into_formulas_of_gradients() -> None:
    """A formula multiplies matrices, and hands what it gets to a kernel that reads float32."""
    x = torch.randn(3, 9, 4, requires_grad=True)
    vectors = torch.randn(4, 3, requires_grad=True)
    edges = torch.tensor([[0, 1, 2, 0], [1, 0, 1, 2]])

    def gradients() -> tuple[Tensor, ...]:
        frame = build_edge_frame(vectors, edges, n_atoms=3, lmax=2, mmax=2)
        rows = rotate_to_edge(x, frame)
        value = rotate_from_edge(rows * rows, frame).square().sum()
        first = torch.autograd.grad(value, (x, vectors), create_graph=True)
        return first + torch.autograd.grad(first[1].square().sum(), (x, vectors))

    exact = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = gradients()
    for found, expected in zip(mixed, exact, strict=True):
        assert torch.equal(found, expected)
