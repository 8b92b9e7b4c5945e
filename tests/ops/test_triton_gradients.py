"""Every operation of the Triton backend against the reference: value, gradient, second gradient."""

from collections.abc import Callable, Sequence

import pytest
import torch
from edge_layers import POLES, relative
from torch import Tensor

from atomeq.ops.dispatch import use_backend
from atomeq.ops.explain import explain
from atomeq.ops.gaunt import gaunt_product
from atomeq.ops.paths import Path
from atomeq.ops.registered.sphere import sphere_form
from atomeq.ops.segment import segment_mean, segment_softmax, segment_sum
from atomeq.ops.so2 import rotate_from_edge, rotate_to_edge, so2_linear
from atomeq.ops.sphere import sphere_silu
from atomeq.ops.sphere_grid import SphereGrid
from atomeq.ops.tensor_product import cg_conv, tensor_product
from atomeq.ops.wigner import build_edge_frame

pytest.importorskip("triton", reason="Triton is not installed: pip install atomeq[cuda]")

pytestmark = pytest.mark.triton

SINGLE = 5e-6  # the bar of the kernels in float32, second gradients included
DOUBLE = 1e-12
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

C = 16
EDGES = torch.tensor([[0, 1, 2, 1, 0], [2, 0, 0, 2, 2]], device=DEVICE)  # of 4 atoms, 2 have none
INDEX = EDGES[1]
PATHS = [Path(0, 1, 1), Path(1, 0, 1), Path(1, 1, 0), Path(1, 1, 1)]
GRID = SphereGrid(1, 1, order="m")


def frame_of(vectors: Tensor):
    return build_edge_frame(vectors, EDGES, n_atoms=4, lmax=1, mmax=1)


def rotate_both(x: Tensor, vectors: Tensor) -> Tensor:
    return rotate_to_edge(x, frame_of(vectors), side="both")


def rotate_back_and_sum(y: Tensor, vectors: Tensor, envelope: Tensor) -> Tensor:
    return rotate_from_edge(y, frame_of(vectors), envelope=envelope)


def rotate_back(y: Tensor, vectors: Tensor) -> Tensor:
    return rotate_from_edge(y, frame_of(vectors), reduce="none")


def mix(x: Tensor, zero: Tensor, one: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return so2_linear(x, [zero, one], lmax=1, mmax=1, bias=bias, scale=scale)


def convolve(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return cg_conv(x, y, weights, EDGES, 4, PATHS, output="paths")


def couple(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    return tensor_product(x, y, weights, PATHS)


Shapes = Sequence[tuple[int, ...]]
# Vectors, 5 x 3, have their poles among them.
OPERATIONS: dict[str, tuple[Callable[..., Tensor], Shapes]] = {
    "rotate_to_edge": (rotate_both, [(4, 4, C), (5, 3)]),
    "rotate_from_edge": (rotate_back_and_sum, [(5, 4, C), (5, 3), (5,)]),
    "rotate_from_edge per edge": (rotate_back, [(5, 4, C), (5, 3)]),
    "so2_linear": (
        mix,
        [(5, 4, C), (2 * C, 2 * C), (2, C, C), (2 * C,), (5, 3 * C)],
    ),
    "cg_conv": (convolve, [(4, 4, C), (5, 4), (5, 4, C)]),
    "cg_conv of shared weights": (convolve, [(4, 4, C), (5, 4), (4, C)]),
    "tensor_product": (couple, [(5, 4, C), (5, 4), (5, 4, C)]),
    "segment_sum": (lambda x: segment_sum(x, INDEX, 4), [(5, 3)]),
    "segment_mean": (lambda x: segment_mean(x, INDEX, 4), [(5, 2, 3)]),
    "segment_softmax": (lambda x: segment_softmax(x, INDEX, 4), [(5, 3)]),
    "sphere_silu": (lambda x: sphere_silu(x, GRID), [(3, 4, C)]),
    "sphere_product": (lambda x, y: gaunt_product(x, y, 1), [(2, 4, C), (2, 1, C)]),
}


def derivatives(
    backend: str, compute: Callable[..., Tensor], shapes: Shapes, dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def leaf(shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if shape == (5, 3) and len(shapes) > 1:
            values[: len(POLES)] = torch.tensor(POLES, dtype=torch.float64)
        return values.to(DEVICE, dtype).requires_grad_()

    leaves = [leaf(shape) for shape in shapes]
    with use_backend(backend):
        out = compute(*leaves)
        first = torch.autograd.grad((out.square() + out.sin()).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g.square() + g.sin()).sum() for g in first), leaves)
    return [out, *first, *second]


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_agrees_with_the_reference_in_value_and_both_gradients(name: str) -> None:
    compute, shapes = OPERATIONS[name]
    expected = derivatives("reference", compute, shapes, torch.float64)
    found = derivatives("triton", compute, shapes, torch.float32)
    errors = [relative(f.double(), e) for f, e in zip(found, expected, strict=True)]
    assert max(errors) <= SINGLE, errors


@pytest.mark.slow
@pytest.mark.parametrize("lmax", [2, 4, 6])
def test_functions_on_the_sphere_of_high_degree_agree_with_the_reference(lmax: int) -> None:
    grid, n_sph = SphereGrid(lmax, lmax, order="m"), (lmax + 1) ** 2
    for compute, shapes in (
        (lambda x: sphere_silu(x, grid), [(2, n_sph, C)]),
        (lambda x, y: gaunt_product(x, y, lmax), [(2, n_sph, C), (2, 4, C)]),
    ):
        expected = derivatives("reference", compute, shapes, torch.float64)
        found = derivatives("triton", compute, shapes, torch.float32)
        errors = [relative(f.double(), e) for f, e in zip(found, expected, strict=True)]
        assert max(errors) <= SINGLE, errors


def test_third_derivative_of_silu_on_the_sphere_is_that_of_the_reference() -> None:
    thirds = []
    for backend in ("triton", "reference"):
        x = torch.linspace(-2, 2, 4 * C, dtype=torch.float64, device=DEVICE).view(1, 4, C)
        x.requires_grad_()
        with use_backend(backend):
            value = sphere_silu(x, GRID).square().sum()
            for _ in range(3):
                (slope,) = torch.autograd.grad(value, x, create_graph=True)
                value = slope.sin().sum()
            thirds.append(slope)
    assert relative(*thirds) <= DOUBLE


def test_form_on_the_sphere_keeps_the_rules_of_torch() -> None:
    x, g = torch.randn(2, 1, 4, C, dtype=torch.float64, device=DEVICE)
    to_grid, from_grid = GRID.to_matrix(like=x), GRID.from_matrix(like=x)
    given = [x.requires_grad_(), g.requires_grad_()], [to_grid, from_grid.mT], to_grid.mT, 1
    torch.library.opcheck(sphere_form, (*given, "triton"))


@pytest.mark.parametrize("mode", ["uuu", "uvw"])
def test_couplings_without_a_kernel_are_refused_at_the_door(mode: str) -> None:
    y = torch.ones(2, 1, C, device=DEVICE)
    weights = torch.ones(1, C, C, C, device=DEVICE) if mode == "uvw" else None
    reason = f"its kernels couple in mode uvu, not {mode}"
    with use_backend("triton"):
        with pytest.raises(NotImplementedError, match=reason):
            tensor_product(y, y, weights, [Path(0, 0, 0)], mode=mode)
        report = explain(
            "tensor_product",
            lmax=0,
            mmax=0,
            channels=C,
            n_edges=2,
            dtype=y.dtype,
            device=DEVICE,
            mode=mode,
        )
    assert report.backend is None
    assert reason in str(report)


def test_what_plain_torch_serves_is_said() -> None:
    size = {"lmax": 1, "mmax": 1, "channels": C, "n_edges": 2, "dtype": torch.float32}
    with use_backend("triton"):
        plain, kernel = (
            explain(op, device=DEVICE, **size) for op in ("edge_wigner", "segment_sum")
        )
    assert plain.by_torch
    assert "served by   triton, in plain torch (asked for: triton)" in str(plain)
    assert not kernel.by_torch
    assert "served by   triton (asked for: triton)" in str(kernel)
