"""Every operation of the Triton backend against the reference: value, gradient, second gradient."""

import operations
import pytest
import torch
from edge_layers import relative
from operations import OPERATIONS, PATHS, Operation, derivatives

from atomeq.ops.coupling.operations import cg_conv, tensor_product
from atomeq.ops.dispatch import use_backend
from atomeq.ops.explain import explain
from atomeq.ops.specification import Mode
from atomeq.ops.sphere.gaunt import gaunt_product
from atomeq.ops.sphere.grid import SphereGrid
from atomeq.ops.sphere.operations import sphere_form, sphere_silu

pytest.importorskip("triton", reason="Triton is not installed: pip install atomeq[cuda]")

pytestmark = pytest.mark.triton

SINGLE = 5e-6  # the bar of the kernels in float32, second gradients included
DOUBLE = 1e-12
DEVICE = operations.DEVICE
C = operations.C
GRID = operations.GRID


def errors(operation: Operation) -> list[float]:
    expected = derivatives("reference", operation, torch.float64)
    found = derivatives("triton", operation, torch.float32)
    return [relative(f.double(), e) for f, e in zip(found, expected, strict=True)]


@pytest.mark.parametrize(
    "name", sorted(OPERATIONS.keys() - {"geometric_product"})
)  # which has C alone
def test_operation_agrees_with_the_reference_in_value_and_both_gradients(name: str) -> None:
    found = errors(OPERATIONS[name])
    assert max(found) <= SINGLE, found


@pytest.mark.slow
@pytest.mark.parametrize("lmax", [2, 4, 6])
def test_functions_on_the_sphere_of_high_degree_agree_with_the_reference(lmax: int) -> None:
    grid, n_sph = SphereGrid(lmax, lmax, order="m"), (lmax + 1) ** 2
    for operation in (
        Operation(lambda x: sphere_silu(x, grid), [(2, n_sph, C)]),
        Operation(lambda x, y: gaunt_product(x, y, lmax), [(2, n_sph, C), (2, 4, C)]),
    ):
        found = errors(operation)
        assert max(found) <= SINGLE, found


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
def test_couplings_without_a_kernel_are_served_by_plain_torch_and_said_to_be(mode: Mode) -> None:
    weights = (4, C, C, C) if mode == "uvw" else (5, 4, C)

    def convolve(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        product = tensor_product(x.index_select(0, operations.INDEX), y, w, PATHS, mode=mode)
        conv = cg_conv(x, y, w, operations.EDGES, 4, PATHS, mode=mode)
        return torch.cat((product, conv))

    found = errors(Operation(convolve, [(4, 4, C), (5, 4, C), weights]))
    assert max(found) <= SINGLE, found
    with use_backend("triton"):
        report = explain(
            "cg_conv",
            lmax=1,
            mmax=1,
            channels=C,
            n_edges=2,
            dtype=torch.float32,
            device=DEVICE,
            mode=mode,
        )
    assert report.by_torch


def test_what_plain_torch_serves_is_said() -> None:
    size = {"lmax": 1, "mmax": 1, "channels": C, "n_edges": 2, "dtype": torch.float32}
    with use_backend("triton"):
        plain, kernel = (
            explain(op, device=DEVICE, **size) for op in ("spherical_harmonics", "segment_sum")
        )
    assert plain.by_torch
    assert "served by   triton, in plain torch (asked for: triton)" in str(plain)
    assert not kernel.by_torch
    assert "served by   triton (asked for: triton)" in str(kernel)
