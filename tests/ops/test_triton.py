"""The Triton kernels against the reference: interpreted on a CPU, compiled where there is CUDA."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from edge_layers import EdgeLayer, relative

from atomeq.ops.coupling.operations import cg_conv, tensor_product
from atomeq.ops.dispatch import use_backend
from atomeq.ops.edge.along import Ends, Found, Moved
from atomeq.ops.edge.rotation import turning
from atomeq.ops.edge.so2_map import SO2Shape
from atomeq.ops.edge.wigner import edge_wigner
from atomeq.ops.paths import Path, tensor_product_paths
from atomeq.ops.precision import Precision, use_precision
from atomeq.ops.registration import kernels_of
from atomeq.ops.segment.operations import segment_softmax, segment_sum

pytest.importorskip("triton", reason="Triton is not installed: pip install atomeq[cuda]")
import triton
import triton.language as tl

from atomeq.ops import triton_launch
from atomeq.ops.edge.triton import rotation
from atomeq.ops.edge.triton.so2_kernels import place_of_program
from benchmarks import triton_compile

pytestmark = pytest.mark.triton

SINGLE = 5e-6  # the bar of the kernels in float32, second derivatives included
DOUBLE = 1e-12
HALF = 5e-3  # bfloat16 has 8 bits; one rounding of operands and one of results

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 0), (1, 1), (2, 1)]
SLOW_SHAPES = [(2, 0), (2, 2), (3, 1), (3, 3), (4, 2), (4, 4), (5, 2), (6, 2), (6, 6)]


def on_device(layer: EdgeLayer) -> EdgeLayer:
    layer.edge_index = layer.edge_index.to(DEVICE)
    layer.leaves = {
        name: leaf.detach().to(DEVICE).requires_grad_() for name, leaf in layer.leaves.items()
    }
    return layer


def layer_errors(lmax: int, mmax: int, dtype: torch.dtype, **options) -> dict[str, float]:
    def build(precision: torch.dtype) -> EdgeLayer:
        layer = EdgeLayer(lmax, mmax, channels=16, hidden=16, dtype=dtype, **options)
        layer.leaves = {
            name: leaf.detach().to(precision).requires_grad_()
            for name, leaf in layer.leaves.items()
        }
        return on_device(layer)

    found = build(dtype).derivatives("triton")
    expected = build(torch.float64).derivatives("reference")
    return {name: relative(found[name].double(), expected[name]) for name in expected}


def check_layer(lmax: int, mmax: int) -> None:
    errors = layer_errors(lmax, mmax, torch.float32, chiral=mmax != 1)
    assert max(errors.values()) <= SINGLE, errors


@pytest.mark.parametrize(("lmax", "mmax"), SHAPES)
def test_layer_agrees_with_the_reference_in_value_and_both_derivatives(
    lmax: int, mmax: int
) -> None:
    check_layer(lmax, mmax)


@pytest.mark.slow
@pytest.mark.parametrize(("lmax", "mmax"), SLOW_SHAPES)
def test_layer_of_higher_degree_agrees_with_the_reference(lmax: int, mmax: int) -> None:
    check_layer(lmax, mmax)


def test_layer_in_double_precision_agrees_to_rounding() -> None:
    errors = layer_errors(2, 1, torch.float64, chiral=True, biased=True, radial="factors")
    assert max(errors.values()) <= DOUBLE, errors


def test_recomputing_changes_no_bit() -> None:
    layer = on_device(EdgeLayer(1, 1, channels=16, hidden=16, dtype=torch.float32))
    kept, made_again = (layer.derivatives("triton", recompute=again) for again in (False, True))
    # What is made again comes in tiles of another shape, which a BLAS below the interpreter may
    # round otherwise; a GPU adds in the same order.
    bar = 0.0 if DEVICE == "cuda" else 1e-6
    for name, value in kept.items():
        assert relative(made_again[name], value) <= bar, name


@pytest.mark.parametrize("lmax", [4, 6])
def test_rotations_of_high_degree_agree_with_the_reference(lmax: int) -> None:
    mmax, n_edges, channels = 2, 8, 16
    wigner = edge_wigner(torch.randn(n_edges, 3, dtype=torch.float64), lmax, mmax)
    x = torch.randn(3, (lmax + 1) ** 2, channels, dtype=torch.float64)
    rows = torch.randn(n_edges, wigner.shape[1], channels, dtype=torch.float64)
    target = torch.tensor([0, 2, 0, 2, 2, 0, 2, 2])  # the atom between has no edges
    segments = list(sorted_edges(target, 3))

    def results(name: str, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        w, a, r = (t.to(device, dtype) for t in (wigner, x, rows))
        index, parts = [target.to(device)], [part.to(device) for part in segments]
        kernels = kernels_of("edge", name)
        return [
            kernels.gather_rotate(a, w, index),
            kernels.rotate_scatter(r, w, index, parts, 3),
            kernels.rotate_scatter(r, w, [], [], 3),
            kernels.torque(a, r, w, index),
        ]

    expected = results("cpu", torch.float64, "cpu")
    for dtype, bar in ((torch.float32, SINGLE), (torch.bfloat16, 2 * HALF)):
        found = results("triton", dtype, DEVICE)
        errors = [relative(f.cpu().double(), e) for f, e in zip(found, expected, strict=True)]
        assert max(errors) <= bar, (dtype, errors)


def sorted_edges(index: torch.Tensor, n_atoms: int) -> tuple[torch.Tensor, torch.Tensor]:
    ordered, order = index.sort(stable=True)
    return torch.searchsorted(ordered, torch.arange(n_atoms + 1)), order


@pytest.mark.parametrize("many", [False, True], ids=["grouped", "cublas"])
@pytest.mark.parametrize(
    ("dtype", "bar"),
    [(torch.float32, SINGLE), (torch.bfloat16, HALF), (torch.float64, DOUBLE)],
    ids=["float32", "bfloat16", "float64"],
)
def test_so2_products_agree_with_one_dense_matrix(
    dtype: torch.dtype, bar: float, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atomeq.ops.edge.triton import so2

    monkeypatch.setattr(so2, "_MANY_EDGES", 0 if many else 100)
    shape = SO2Shape(2, 2, 32, 16, 16)
    weights = [
        torch.randn(*((2,) if block.order == 1 else ()), *sizes(block), device=DEVICE).to(dtype)
        for block in shape.blocks
    ]
    dense = torch.zeros(shape.width, shape.n_rows * shape.c_in, dtype=torch.float64, device=DEVICE)
    for block, weight in zip(shape.blocks, weights, strict=True):
        for place, (out, into) in enumerate(zip(block.outputs, block.inputs, strict=True)):
            dense[out, into] = (weight[0] if weight.ndim == 3 else weight).double()
            if weight.ndim == 3:
                other = block.inputs[1 - place]
                dense[out, other] = (weight[1] if place else -weight[1]).double()
    rows = torch.randn(21, dense.shape[1], device=DEVICE).to(dtype)
    grad = torch.randn(21, dense.shape[0], device=DEVICE).to(dtype)
    so2_map = so2.SO2Map(weights, shape)
    forward = so2_map.forward(rows, rows.new_empty(21, dense.shape[0]))
    back = so2_map.transposed(grad, rows.new_empty(21, dense.shape[1]))
    assert relative(forward.double(), rows.double() @ dense.T) <= bar
    assert relative(back.double(), grad.double() @ dense) <= bar


@pytest.mark.parametrize(
    ("lmax", "mmax", "hidden", "precision", "keep", "generation"),
    [
        (2, 2, 16, "medium", True, 90),
        (2, 2, 16, "highest", False, 80),  # each has tiles of its own
        (1, 0, 80, "medium", False, 100),  # more channels than a tile has
        (0, 0, 16, "highest", True, 90),
    ],
)
def test_gates_opened_and_passed_by_maps_are_those_of_a_pass_of_their_own(
    lmax: int,
    mmax: int,
    hidden: int,
    precision: Precision,
    keep: bool,
    generation: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from atomeq.ops.edge.triton import so2
    from atomeq.ops.edge.triton.gate import Gate

    if DEVICE == "cpu":
        monkeypatch.setattr(so2, "architecture", lambda like: generation)
    first = SO2Shape(lmax, mmax, 16, hidden, lmax * hidden)
    second = SO2Shape(lmax, mmax, hidden, 16, 0)
    maps = []
    for shape in (first, second):
        pairs = [(2,) if block.order == 2 else () for block in shape.blocks]
        size = zip(pairs, map(sizes, shape.blocks), strict=True)
        weights = [torch.randn(*pair, *both, device=DEVICE) / 4 for pair, both in size]
        maps.append(so2.SO2Map(weights, shape))
    rows, grad = torch.randn(21, first.width_in), torch.randn(21, second.width)
    also, bias = torch.randn(21, first.width), torch.randn(first.n_biases)
    rows, grad, also, bias = (tensor.to(DEVICE) for tensor in (rows, grad, also, bias))
    with use_precision(precision):
        y = maps[0].forward(rows, None, bias)
        gate, pull = Gate(y, first), maps[1].transposed(grad)
        found_y, found_pull = torch.zeros_like(y), torch.zeros_like(pull)
        value, found_value = torch.empty_like(pull), torch.empty_like(pull)
        expected = gate.gradient(pull, also, value)
        gated = maps[0].gated(rows, bias, found_y if keep else None)
        wanted = (found_pull, also, found_value) if keep else (None, None, None)
        found = maps[1].transposed_through(gate, grad, *wanted)
    assert (gated.dtype == torch.bfloat16) == (precision == "medium")
    bar = SINGLE if gated.dtype == torch.float32 else HALF
    assert relative(gated.float(), value) <= bar
    if not keep:
        assert relative(found, gate.gradient(pull)) <= SINGLE
        return
    pairs = (found_y, y), (found_pull, pull), (found_value, value), (found, expected)
    assert max(relative(one, other) for one, other in pairs) <= SINGLE


def test_programs_at_a_time_read_few_rows_and_few_weights() -> None:
    from atomeq.ops.edge.triton import so2

    n_edge_tiles, n_tiles = 21, 5
    places = torch.full((n_edge_tiles * n_tiles, 2), -1, device=DEVICE)
    _write_place[(len(places),)](places, n_edge_tiles, N_TILES=n_tiles, TOGETHER=so2._TOGETHER)
    places = places.cpu()
    assert len(torch.unique(places, dim=0)) == len(places)  # each tile once, and all of them:
    assert places.amin(0).tolist() == [0, 0]
    assert places.amax(0).tolist() == [n_edge_tiles - 1, n_tiles - 1]
    at_a_time = so2._TOGETHER * n_tiles
    for first in range(0, len(places), at_a_time):
        assert len(places[first : first + at_a_time, 0].unique()) <= so2._TOGETHER
    for first in range(0, len(places) - at_a_time, so2._TOGETHER):
        assert len(places[first : first + so2._TOGETHER, 1].unique()) == 1


@triton.jit
def _write_place(places, n_edge_tiles, N_TILES: tl.constexpr, TOGETHER: tl.constexpr):
    edge_tile, tile = place_of_program(n_edge_tiles, N_TILES, TOGETHER)
    tl.store(places + 2 * tl.program_id(0), edge_tile)
    tl.store(places + 2 * tl.program_id(0) + 1, tile)


def test_radial_factors_meet_the_rows_of_both_signs() -> None:
    kernels, truth = kernels_of("edge", "triton"), kernels_of("edge", "cpu")
    for lmax, mmax in ((0, 0), (3, 2), (6, 6)):
        shape = SO2Shape(lmax, mmax, 16, 16, 0)
        rows, other = torch.randn(2, 9, shape.n_rows * 16)
        scale = torch.randn(9, shape.n_scales)
        given = [tensor.to(DEVICE) for tensor in (rows, other, scale)]
        scaled = kernels.scaled_rows(given[0], given[2], shape).cpu()
        products = kernels.row_products(given[0], given[1], shape).cpu()
        assert relative(scaled, truth.scaled_rows(rows, scale, shape)) <= SINGLE
        assert relative(products, truth.row_products(rows, other, shape)) <= SINGLE


@pytest.mark.parametrize(
    ("dtype", "bar", "n_radial", "biased"),
    [
        (torch.float32, SINGLE, 5, True),
        (torch.float32, SINGLE, 140, True),  # too many to be multiplied on the way
        (torch.bfloat16, 2 * HALF, 20, False),
        (torch.float64, DOUBLE, 5, True),
    ],
)
def test_factors_made_on_the_way_are_those_of_a_linear_layer(
    dtype: torch.dtype, bar: float, n_radial: int, biased: bool
) -> None:
    n_edges, lmax, channels = 19, 2, 48
    n_scales = SO2Shape(lmax, 1, 2 * channels, channels, 0).n_scales
    sizes = (4, 9, channels), (n_edges, 3), (n_edges, n_radial), (n_scales, n_radial), (n_scales,)
    x, vectors, values, weight, bias = (torch.randn(*size, dtype=torch.float64) for size in sizes)
    wigner, weight = edge_wigner(vectors, lmax, 1), weight / n_radial**0.5
    ends = torch.randint(0, 4, (2, n_edges))

    def rows(name: str, dtype: torch.dtype, device: str) -> torch.Tensor:
        a, w, h, m, b = (t.to(device, dtype) for t in (x, wigner, values, weight, bias))
        radial = (h, m, b if biased else None)
        return kernels_of("edge", name).gather_rotate(a, w, list(ends.to(device)), radial=radial)

    truth = rows("cpu", torch.float64, "cpu")
    assert relative(rows("triton", dtype, DEVICE).cpu().double(), truth) <= bar


@pytest.mark.parametrize("still", ["", "x scale", "turn", "rows factor"])
@pytest.mark.parametrize("lmax", [1, 3])
def test_derivatives_along_a_direction_are_those_of_single_steps(
    lmax: int, still: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, "_WIDEST_OF_MANY", 8)  # two tiles at lmax = 3
    n_edges, channels, mmax = 7, 16, min(lmax, 2)
    shape = SO2Shape(lmax, mmax, 2 * channels, channels, 0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64)

    wigner = edge_wigner(random(n_edges, 3), lmax, mmax)
    turned = torch.bmm(wigner, turning(turn := random(n_edges, 3), (lmax + 1) ** 2))
    source, target = torch.tensor([[0, 2, 0, 2, 2, 0, 2], [2, 2, 0, 0, 2, 2, 0]])
    x, moved_x = random(2, 3, (lmax + 1) ** 2, channels)
    total = random(3, (lmax + 1) ** 2, channels)
    rows, moved_rows = random(2, n_edges, shape.width_in)
    scale, moved_scale = random(2, n_edges, shape.n_scales)
    factor, moved_factor = random(2, n_edges)
    given = x, moved_x, wigner, turned, turn, scale, moved_scale, factor, moved_factor
    given = *given, rows, moved_rows, total

    def results(name: str, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        by = kernels_of("edge", name)
        x, dx, w, dw, t, s, ds, f, df, y, dy, total = (g.to(device, dtype).clone() for g in given)
        segments = [*sorted_edges(source, 3), *sorted_edges(target, 3)]
        indices = [index.to(device) for index in (source, target)]
        ends = Ends(by, w, indices, [part.to(device) for part in segments])
        moved = Moved(dx, dw, t, ds, df, dy)
        frame = ("wigner",) if "turn" in still else ()
        moved = moved._replace(**dict.fromkeys((*still.split(), *frame)))
        into = Found(s.new_empty(s.shape), s.new_empty(s.shape), y.new_empty(y.shape))
        into = into._replace(factor=f.new_empty(f.shape), turn=t.new_ones(t.shape))
        by.gradient_along(x, ends, y, s, f, moved, shape, into)
        by.scatter_along(ends, y, s, f, moved, shape, total)
        return [*into, total, by.rotate_along(x, ends, s, moved, shape)]

    truth = results("cpu", torch.float64, "cpu")
    for dtype, bar in ((torch.float32, SINGLE), (torch.float64, DOUBLE)):
        for one, expected in zip(results("triton", dtype, DEVICE), truth, strict=True):
            assert relative(one.cpu().double(), expected) <= bar


@pytest.fixture
def halved() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("halved")
def test_medium_precision_rounds_the_operands_of_so2_products_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from atomeq.ops.edge.triton import so2

    monkeypatch.setattr(so2, "_MANY_EDGES", 0)  # asked for, it holds at any number of edges
    shape = SO2Shape(1, 1, 16, 16, 0)
    weights = [torch.randn(32, 32, device=DEVICE), torch.randn(2, 16, 16, device=DEVICE)]
    rows, grad = torch.randn(2, 21, 64, device=DEVICE)

    def matrix(zero: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
        real, imaginary = pair.double()
        upper, lower = torch.cat((real, -imaginary), 1), torch.cat((imaginary, real), 1)
        return torch.block_diag(zero.double(), torch.cat((upper, lower)))

    exact, rounded = matrix(*weights), matrix(*(weight.bfloat16() for weight in weights))
    so2_map = so2.SO2Map(weights, shape)
    forward = so2_map.forward(rows, torch.empty_like(rows)).double()
    back = so2_map.transposed(grad, torch.empty_like(grad)).double()
    assert relative(forward, to_half(rows).double() @ rounded.T) <= SINGLE
    assert relative(back, to_half(grad).double() @ rounded) <= SINGLE
    assert SINGLE < relative(forward, rows.double() @ exact.T) <= HALF
    assert SINGLE < relative(back, grad.double() @ exact) <= HALF


@pytest.mark.usefixtures("halved")
@pytest.mark.parametrize("trained", [True, False])
def test_layer_of_medium_precision_keeps_the_bar_of_bfloat16(trained: bool) -> None:
    """Both derivatives too; with fixed weights the backward pass hands on what it rounds."""
    sizes = {"channels": 16, "hidden": 16, "chiral": True}
    layer = on_device(EdgeLayer(2, 1, dtype=torch.float32, **sizes))
    truth = on_device(EdgeLayer(2, 1, **sizes))

    def found(layer: EdgeLayer, backend: str) -> dict[str, torch.Tensor]:
        if trained:
            return layer.derivatives(backend)
        moved = {name: layer.leaves[name] for name in ("x", "vectors", "radial", "envelope")}
        for name in layer.leaves.keys() - moved.keys():
            layer.leaves[name].requires_grad_(False)
        gradients = torch.autograd.grad(layer(backend).square().sum(), list(moved.values()))
        return dict(zip(moved, gradients, strict=True))

    expected = found(truth, "reference")
    for name, value in found(layer, "triton").items():
        # a loss of sines of gradients doubles what they miss; the interpreter cuts off: see to_half
        bar = (2 if "second" in name else 1) * (2 if DEVICE == "cuda" else 4) * HALF
        assert value.dtype == torch.float32
        assert SINGLE < relative(value.double(), expected[name]) <= bar, name


def to_half(x: torch.Tensor) -> torch.Tensor:
    """Round as the kernels do; Triton's interpreter cuts off what a GPU rounds to nearest."""
    return x.bfloat16() if DEVICE == "cuda" else (x.view(torch.int32) & -(2**16)).view(x.dtype)


def sizes(block) -> tuple[int, int]:
    return tuple(part[0].stop - part[0].start for part in (block.outputs, block.inputs))


COUPLED = [Path(0, 0, 0), Path(1, 1, 0), Path(1, 1, 1), Path(2, 1, 1), Path(1, 1, 2)]
EVERY = tuple(tensor_product_paths(2, 1, 2, pseudotensors=True))


def coupling_derivatives(backend: str, dtype: torch.dtype, paths, n_edges: int):
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(DEVICE, dtype).requires_grad_()

    edges = torch.randint(0, 3, (2, n_edges), generator=generator).to(DEVICE)  # atom 3 has none
    leaves = [leaf(4, 9, 16), leaf(n_edges, 4), leaf(n_edges, len(paths), 16)]
    with use_backend(backend):
        out = cg_conv(*leaves, edges, 4, paths)
        first = torch.autograd.grad(out.square().sum() + out.sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return [out, *first, *second]


@pytest.mark.parametrize(
    ("paths", "n_edges"),
    [(COUPLED, 5), pytest.param(EVERY, 9, marks=pytest.mark.slow)],
    ids=["few paths", "every path"],
)
def test_convolution_agrees_with_the_reference_in_value_and_both_derivatives(
    paths: list[Path], n_edges: int
) -> None:
    expected = coupling_derivatives("reference", torch.float64, paths, n_edges)
    found = coupling_derivatives("triton", torch.float32, paths, n_edges)
    errors = [relative(f.double(), e) for f, e in zip(found, expected, strict=True)]
    assert max(errors) <= SINGLE, errors


def test_product_without_atoms_agrees_with_the_reference() -> None:
    paths = tensor_product_paths(1, 1, 1)
    x, y = torch.randn(2, 3, 4, 16, device=DEVICE), torch.randn(2, 3, 4, device=DEVICE)
    weights = torch.randn(2, 3, len(paths), 16, device=DEVICE)
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            results.append(tensor_product(x, y, weights, paths))
    assert relative(*results) <= SINGLE


@pytest.mark.parametrize(("lmax", "mmax"), [(0, 0), (2, 1), (3, 3)])
def test_frames_are_those_of_the_reference_at_the_poles_too(lmax: int, mmax: int) -> None:
    vectors = torch.randn(9, 3, dtype=torch.float64, device=DEVICE)
    beside = torch.tensor([[0.0, 1, 0], [0, -2, 0], [1e-200, 1, -2e-200]], dtype=torch.float64)
    vectors[:3] = beside.to(vectors)
    with use_backend("reference"):
        expected = edge_wigner(vectors, lmax, mmax)
    with use_backend("triton"):
        assert (edge_wigner(vectors, lmax, mmax) - expected).abs().max() <= DOUBLE


def test_no_edge_gives_zeros() -> None:
    layer = on_device(EdgeLayer(1, 1, channels=16, hidden=16, n_edges=0, dtype=torch.float32))
    assert not layer("triton").any()


def test_segment_kernels_agree_with_the_reference() -> None:
    index = torch.tensor([3, 0, 0, 3, 1] + [0] * 20, device=DEVICE)  # more than one block of 0
    x = 3 * torch.randn(25, 3, 2, dtype=torch.float64, device=DEVICE)
    total = x.new_zeros(5, 3, 2).index_add(0, index, x)
    with use_backend("triton"):
        found = segment_sum(x, index, 5), segment_softmax(x, index, 5)
    assert relative(found[0], total) <= DOUBLE
    weights = torch.zeros_like(x)
    for segment in range(5):
        weights[index == segment] = x[index == segment].softmax(0)
    assert relative(found[1], weights) <= DOUBLE


@pytest.mark.parametrize(
    "lengths",
    [
        [100, 0, 450, 5],  # two pieces inside the third, whose ends lie beside others
        [128, 256, 128],  # cut where the pieces are
        [600],
    ],
)
def test_long_segments_are_summed_by_pieces(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from atomeq.ops.segment.triton import kernels

    started: list[str] = []

    def launch(kernel, *given, **sizes) -> None:
        started.append(kernel.fn.__name__)
        triton_launch.launch(kernel, *given, **sizes)

    monkeypatch.setattr(kernels, "launch", launch)
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    index = index[torch.randperm(len(index))].to(DEVICE)
    for dtype, bar in ((torch.float64, DOUBLE), (torch.bfloat16, 2 * HALF)):
        x = torch.randn(len(index), 3, dtype=torch.float64, device=DEVICE).to(dtype)
        with use_backend("triton"):
            runs = [segment_sum(x, index, len(lengths)) for _ in range(2)]
        expected = torch.zeros_like(runs[0], dtype=torch.float64).index_add(0, index, x.double())
        assert relative(runs[0].double(), expected) <= bar
        assert torch.equal(*runs)
    assert started == ["_piece_sum", "_segment_sum"] * 4


@pytest.mark.parametrize(
    ("channels", "lmax", "dtype", "reason"),
    [
        (24, 2, torch.float32, "24 channels are no multiple of 16"),
        (16, 7, torch.float32, "lmax is 7"),
        (16, 2, torch.float16, "not torch.float16"),
    ],
)
def test_what_is_not_served_is_refused_with_the_reason(
    channels: int, lmax: int, dtype: torch.dtype, reason: str
) -> None:
    from atomeq.ops.explain import explain

    with use_backend("triton"):
        report = explain(
            "rotate_to_edge",
            lmax=lmax,
            mmax=1,
            channels=channels,
            n_edges=4,
            dtype=dtype,
            device=DEVICE,
        )
    assert report.backend is None
    assert reason in report.refusals["triton"]


def run_without_interpreter(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=kept | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_machine_without_cuda_is_told_so() -> None:
    code = """
import torch
from atomeq.ops.coupling.operations import tensor_product
tensor_product(torch.ones(3, 1, 16), torch.ones(3, 1), None, [(0, 0, 0)])
"""
    result = run_without_interpreter(code, ATOMEQ_BACKEND="triton")
    assert result.returncode != 0
    assert "'triton' was asked for" in result.stderr
    assert "need CUDA, which this machine has not" in result.stderr


def test_triton_is_not_imported_before_its_backend_is_used() -> None:
    code = """
import sys
from collections.abc import Iterator
import atomeq, atomeq.ops.edge.operations, atomeq.ops.dispatch, atomeq.ops.explain
print("triton" in sys.modules)
"""
    assert run_without_interpreter(code).stdout.strip() == "False"


def test_operations_lead_to_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """So what the script below compiles, and what a self-check covers, is all there is."""
    for module in triton_compile.kernel_modules():
        monkeypatch.setattr(module, "launch", module.launch)  # put back in the end
    reached: set[str] = set()
    triton_compile.launch_all(
        lambda kernel, *_, **__: reached.add(triton_compile.name_of(kernel)),
        1,
        1,
        16,
        torch.float32,
    )
    assert reached == triton_compile.kernel_names()
    assert len(reached) > 20


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "86", "90", "100"])  # 89 has the limits of 86
@pytest.mark.parametrize("degrees", [("2", "2"), ("4", "2")])
def test_every_kernel_fits_every_gpu_without_spilling(degrees: tuple[str, str], arch: str) -> None:
    words = ["triton-compile", *degrees, "--arch", arch, "--json"]
    scripts = str(pathlib.Path(__file__).parents[2] / "scripts")
    code = f"import sys; sys.path.insert(0, {scripts!r}); import benchmark; "
    result = run_without_interpreter(code + f"sys.exit(benchmark.main({words!r}))")
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == triton_compile.kernel_names()


@pytest.mark.gpu
def test_results_on_cuda_are_the_same_to_the_bit_every_time() -> None:
    options = {"channels": 32, "hidden": 32, "n_edges": 300, "n_atoms": 20, "chiral": True}
    layer = on_device(EdgeLayer(2, 2, dtype=torch.float32, **options))
    runs = [layer.derivatives("triton") for _ in range(3)]
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in run)
    convolutions = [coupling_derivatives("triton", torch.float32, EVERY, 300) for _ in range(3)]
    for run in convolutions:
        assert all(torch.equal(a, b) for a, b in zip(run, convolutions[0], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("lmax", "mmax"), [*SHAPES, *SLOW_SHAPES])
def test_layer_on_cuda_agrees_with_the_reference(lmax: int, mmax: int) -> None:
    check_layer(lmax, mmax)
