import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from e3nn import o3
from torch import Tensor

from atomeq.ops.coupling.clebsch_gordan import clebsch_gordan
from atomeq.ops.coupling.operations import cg_conv, tensor_product
from atomeq.ops.edge.wigner import block_diagonal, rotation_matrix, wigner_from_matrix
from atomeq.ops.paths import Path, tensor_product_paths

EXACT = 1e-12  # float64 rounding
CHANNELS = 3
MODES = ["uvu", "uuu", "uvw"]


def rows_of(l: int) -> slice:
    return slice(l * l, (l + 1) ** 2)


def e3nn_features(x: Tensor) -> Tensor:
    """(*, n_sph, C) to e3nn's flat layout: degree after degree, the channel running slowest."""
    lmax = math.isqrt(x.shape[-2]) - 1
    return torch.cat([x[..., rows_of(l), :].mT.flatten(-2) for l in range(lmax + 1)], dim=-1)


def our_features(flat: Tensor, degrees: list[int], channels: int) -> Tensor:
    parts = flat.split([(2 * l + 1) * channels for l in degrees], dim=-1)
    rows = [p.unflatten(-1, (channels, -1)).mT for p in parts]
    return torch.cat(rows, dim=-2)


def irreps(lmax: int, channels: int) -> str:
    # e3nn checks parities; with all even it allows every path
    return " + ".join(f"{channels}x{l}e" for l in range(lmax + 1))


def inputs(mode: str, lmax: int, paths: tuple[Path, ...]) -> tuple[Tensor, Tensor, Tensor]:
    n_sph = (lmax + 1) ** 2
    x = torch.randn(7, n_sph, CHANNELS, dtype=torch.float64)
    y = torch.randn(*{"uvu": (7, n_sph), "uuu": (7, n_sph, CHANNELS), "uvw": (7, n_sph, 2)}[mode])
    shape = (CHANNELS, 2, 4) if mode == "uvw" else (CHANNELS,)
    weights = torch.randn(7, len(paths), *shape, dtype=torch.float64)
    return x, y.double(), weights


@pytest.fixture
def double_by_default() -> Iterator[None]:
    """e3nn makes the constants of a product in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_by_default")
@pytest.mark.parametrize("output", ["sum", "paths"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lmax", [1, 2, 3])
def test_product_equals_e3nn(lmax: int, mode: str, output: str) -> None:
    paths = tensor_product_paths(lmax, lmax, lmax, pseudotensors=True)
    x, y, weights = inputs(mode, lmax, paths)
    found = tensor_product(x, y, weights, paths, mode=mode, output=output)

    channels2 = {"uvu": 1, "uuu": CHANNELS, "uvw": 2}[mode]
    channels3 = 4 if mode == "uvw" else CHANNELS
    degrees = list(range(lmax + 1)) if output == "sum" else [path.l3 for path in paths]
    slots = [path.l3 if output == "sum" else number for number, path in enumerate(paths)]
    product = o3.TensorProduct(
        irreps(lmax, CHANNELS),
        irreps(lmax, channels2),
        " + ".join(f"{channels3}x{l}e" for l in degrees),
        [(p.l1, p.l2, slot, mode, True) for p, slot in zip(paths, slots, strict=True)],
        shared_weights=False,
        internal_weights=False,
    )
    second = e3nn_features(y.unsqueeze(-1) if mode == "uvu" else y)
    flat = product(e3nn_features(x), second, weights.flatten(1))
    expected = our_features(flat, degrees, channels3)
    assert (found - expected).abs().max() <= EXACT * expected.abs().max()


def test_symbols_couple_rotated_features() -> None:
    rotation = rotation_matrix(torch.tensor([0.5, -0.1, 0.7, 0.5], dtype=torch.float64))
    wigner = wigner_from_matrix(rotation, 6)
    for path in tensor_product_paths(4, 4, 6, pseudotensors=True):
        turns = [wigner[l] for l in path]
        symbols = clebsch_gordan(*path)
        turned = torch.einsum("abc,ai,bj,ck->ijk", symbols, *turns)
        assert (turned - symbols).abs().max() <= 1e-9


@pytest.mark.parametrize("mode", MODES)
def test_product_is_equivariant_to_rotations_and_reflections(mode: str) -> None:
    paths = tensor_product_paths(2, 2, 3)
    x, y, weights = inputs(mode, 2, paths)
    quaternion = torch.nn.functional.normalize(torch.randn(4, dtype=torch.float64), dim=0)
    wigner = block_diagonal(wigner_from_matrix(-rotation_matrix(quaternion), 3))
    turn = wigner[:9, :9]
    expected = wigner @ tensor_product(x, y, weights, paths, mode=mode)
    turned_y = y @ turn.T if mode == "uvu" else turn @ y
    found = tensor_product(turn @ x, turned_y, weights, paths, mode=mode)
    assert (found - expected).abs().max() <= EXACT * expected.abs().max()


def test_pseudotensors_change_sign_under_inversion() -> None:
    cross = [Path(1, 1, 1)]
    x, y = torch.randn(2, 4, 1), torch.randn(2, 4)
    out = tensor_product(x, y, None, cross, output="paths")[..., 0]
    expected = torch.linalg.cross(x[:, 1:, 0], y[:, 1:])
    torch.testing.assert_close(out.abs(), expected.abs() * math.sqrt(0.5))


def test_output_has_unit_variance() -> None:
    paths = tensor_product_paths(2, 2, 2)
    x, y = torch.randn(20000, 9, 2), torch.randn(20000, 9)
    variance = tensor_product(x, y, torch.randn(20000, len(paths), 2), paths).square().mean()
    assert abs(variance - 1) < 0.05  # 1/sqrt(samples), with heavy tails


def test_dot_and_scalar_products() -> None:
    x, y = torch.randn(5, 4, 2), torch.randn(5, 4)
    dot = tensor_product(x, y, None, [Path(1, 1, 0)])
    expected = torch.einsum("nic,ni->nc", x[:, 1:], y[:, 1:]) / math.sqrt(3)
    torch.testing.assert_close(dot[:, 0], expected)
    scaled = tensor_product(x, y, None, [Path(0, 1, 1)], output="paths")
    torch.testing.assert_close(scaled, x[:, :1] * y[:, 1:, None])


def test_degree_that_no_path_reaches_is_zero() -> None:
    out = tensor_product(torch.ones(2, 1, 1), torch.ones(2, 9), None, [Path(0, 2, 2)])
    assert out.shape == (2, 9, 1)
    assert out[:, :4].eq(0).all()


def test_weights_may_be_shared() -> None:
    for mode in MODES:
        paths = tensor_product_paths(1, 1, 1)
        x, y, weights = inputs(mode, 1, paths)
        shared = tensor_product(x, y, weights[0], paths, mode=mode)
        repeated = tensor_product(x, y, weights[:1].expand_as(weights), paths, mode=mode)
        torch.testing.assert_close(shared, repeated)


@pytest.mark.parametrize("mode", MODES)
def test_convolution_is_gather_product_scatter(mode: str) -> None:
    paths = tensor_product_paths(2, 2, 2)
    _, y, weights = inputs(mode, 2, paths)
    x = torch.randn(4, 9, CHANNELS, dtype=torch.float64)
    edge_index = torch.randint(0, 4, (2, 7))
    out = cg_conv(x, y, weights, edge_index, 5, paths, mode=mode)
    messages = tensor_product(x[edge_index[0]], y, weights, paths, mode=mode)
    for atom in range(5):
        torch.testing.assert_close(out[atom], messages[edge_index[1] == atom].sum(0))


@pytest.mark.parametrize("mode", MODES)
def test_convolution_passes_gradcheck_and_gradgradcheck(mode: str) -> None:
    paths = tensor_product_paths(1, 1, 1)
    _, y, weights = inputs(mode, 1, paths)
    x = torch.randn(3, 4, CHANNELS, dtype=torch.float64, requires_grad=True)
    edge_index = torch.randint(0, 3, (2, 2))
    edges = (y[:2].clone().requires_grad_(), weights[:2].clone().requires_grad_())

    def convolve(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        return cg_conv(x, y, weights, edge_index, 3, paths, mode=mode)

    # Along random directions: test_cpu_kernels.py checks the same kernels entry by entry.
    assert torch.autograd.gradcheck(convolve, (x, *edges), fast_mode=True)
    assert torch.autograd.gradgradcheck(convolve, (x, *edges), fast_mode=True)


def test_convolution_without_edges_gives_zeros() -> None:
    out = cg_conv(
        torch.randn(3, 4, 2),
        torch.zeros(0, 4),
        torch.zeros(0, 4, 2),
        torch.zeros(2, 0, dtype=torch.long),
        3,
        tensor_product_paths(1, 1, 1),
    )
    assert out.shape == (3, 4, 2)
    assert out.eq(0).all()


def test_paths_of_given_degrees() -> None:
    assert len(tensor_product_paths(2, 2, 2)) == 11
    assert len(tensor_product_paths(2, 2, 2, pseudotensors=True)) == 15
    assert len(tensor_product_paths(4, 4, 4)) == 42
    assert all(a < b for a, b in pairwise(tensor_product_paths(3, 3, 3)))


def test_refuses_what_cannot_be_coupled() -> None:
    x, y = torch.randn(5, 4, 2), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"\(0, 1, 2\) breaks"):
        tensor_product(x, y, None, [Path(0, 1, 2)])
    with pytest.raises(ValueError, match="paths is empty"):
        tensor_product(x, y, None, [])
    with pytest.raises(ValueError, match=r"needs at least \(\*, 9, channels\)"):
        tensor_product(x, y, None, [Path(2, 0, 2)])
    with pytest.raises(ValueError, match=r"needs \(\[\*,\] 1, 2\)"):
        tensor_product(x, y, torch.ones(5, 3, 2), [Path(0, 0, 0)])
    with pytest.raises(ValueError, match="mode uvw needs weights"):
        tensor_product(x, x, None, [Path(0, 0, 0)], mode="uvw")
    with pytest.raises(ValueError, match="equal channels"):
        tensor_product(x, x[..., :1], None, [Path(0, 0, 0)], mode="uuu")
    with pytest.raises(ValueError, match="'uvv' with output 'sum' is unknown"):
        tensor_product(x, y, None, [Path(0, 0, 0)], mode="uvv")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="y has 5 edges"):
        cg_conv(x, y, None, torch.zeros(2, 4, dtype=torch.long), 5, [Path(0, 0, 0)])
