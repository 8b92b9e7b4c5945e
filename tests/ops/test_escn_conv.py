import pytest
import torch
from edge_layers import EdgeLayer, kept_bytes_of_an_edge, relative

from atomeq.ops.c_compiler import unavailable
from atomeq.ops.edge.cpu import kernels
from atomeq.ops.edge.escn_conv import differentiated_once
from atomeq.ops.edge.operations import rotate_from_edge, rotate_to_edge
from atomeq.ops.edge.wigner import build_edge_frame, edge_quaternion, rotation_matrix

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no C kernels: {unavailable()}")

EXACT = 1e-12  # float64 rounding through second derivatives


@pytest.mark.parametrize(
    ("lmax", "mmax", "chiral", "radial", "recompute"),
    [
        (2, 2, False, "map", False),
        (2, 2, True, "map", True),
        (3, 1, True, "factors", False),
        (4, 2, False, "none", True),
        (2, 0, False, "factors", True),
        (0, 0, False, "map", False),
    ],
)
def test_layer_agrees_with_the_reference_in_value_and_both_derivatives(
    lmax: int, mmax: int, chiral: bool, radial: str, recompute: bool
) -> None:
    biased = chiral or lmax == 0  # layer.c has neither, and none of these goes there
    layer = EdgeLayer(lmax, mmax, chiral=chiral, biased=biased, radial=radial)
    found = layer.derivatives("cpu", recompute=recompute)
    expected = layer.derivatives("reference")
    errors = {name: relative(found[name], expected[name]) for name in expected}
    assert max(errors.values()) <= EXACT, errors


SINGLE = 2e-6  # float32
# Bytes of an edge, the outputs of both maps, without the frame that layers share; plain torch keeps
# four times as much. With recomputation it is nothing but a few numbers.
KEPT, RECOMPUTED = {2: 11_000, 4: 23_000, 6: 35_000}, 500
ONCE = 0.6  # of it, where one gradient alone is expected: what the first map gives, with the gates


@pytest.mark.parametrize("chiral", [False, True])  # the whole layer in C, and by blocks
def test_layer_that_keeps_less_has_the_same_derivatives(chiral: bool) -> None:
    layer = EdgeLayer(2, 2, chiral=chiral, biased=chiral)
    expected = layer.derivatives("cpu")
    with differentiated_once():
        found = layer.derivatives("cpu")
    errors = {name: relative(found[name], expected[name]) for name in expected}
    assert max(errors.values()) <= EXACT, errors


def test_single_precision_is_as_good_as_its_rounding() -> None:
    layer = EdgeLayer(4, 2, channels=16, hidden=16, n_edges=40)
    exact = layer("cpu")
    single = EdgeLayer(4, 2, channels=16, hidden=16, n_edges=40, dtype=torch.float32)
    assert relative(single("cpu").double(), exact) <= SINGLE


@pytest.mark.parametrize("lmax", list(KEPT))
def test_layer_keeps_little_of_an_edge_for_the_backward_pass(lmax: int) -> None:
    layer = EdgeLayer(lmax, 2, channels=128, hidden=128, n_edges=50, dtype=torch.float32)
    layer.leaves["radial"] = torch.randn(50, 64, requires_grad=True)
    n_scales = len(layer.leaves["radial_bias"])
    layer.leaves["radial_weight"] = torch.randn(n_scales, 64, requires_grad=True)
    assert kept_bytes_of_an_edge(layer) <= KEPT[lmax]
    with differentiated_once():
        assert kept_bytes_of_an_edge(layer) <= ONCE * KEPT[lmax]
    assert kept_bytes_of_an_edge(layer, recompute=True) <= RECOMPUTED


def test_graph_without_edges_gives_zeros_and_gradients() -> None:
    layer = EdgeLayer(2, 1, n_edges=0)
    out = layer("cpu")
    assert out.shape == layer.leaves["x"].shape
    assert out.eq(0).all()
    assert all(g.eq(0).all() for g in torch.autograd.grad(out.sum(), list(layer.leaves.values())))


def test_inference_mode_serves() -> None:
    layer = EdgeLayer(2, 2)
    with torch.inference_mode():
        inferred = layer("cpu")
    assert torch.equal(inferred.clone(), layer("cpu").detach())


def test_roll_of_the_frame_changes_nothing() -> None:
    layer = EdgeLayer(4, 2, chiral=True)
    vectors = layer.leaves["vectors"].detach()
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    angles = torch.rand(len(unit), dtype=torch.float64) * 3
    zero = torch.zeros_like(angles)
    roll = rotation_matrix(torch.stack([angles.cos(), zero, angles.sin(), zero], dim=1))
    rolled = layer.frame(rotation=roll @ rotation_matrix(edge_quaternion(unit)))
    assert relative(layer("cpu", frame=rolled), layer("cpu")) <= EXACT


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize(
    ("lmax", "mmax", "channels", "radial", "recompute"),
    [
        (2, 2, 8, "map", False),
        (2, 2, 5, "map", True),
        (3, 3, 11, "factors", False),
        (4, 2, 6, "map", False),
        (3, 1, 9, "none", True),
        (1, 1, 4, "none", False),
        (0, 0, 3, "map", False),
    ],
)
def test_gradient_at_fixed_weights_agrees_with_the_reference(
    lmax: int, mmax: int, channels: int, radial: str, recompute: bool, n_threads: int
) -> None:
    # so many edges that each thread has several blocks, the last one smaller
    layer = EdgeLayer(lmax, mmax, channels, channels + 2, n_atoms=30, n_edges=1600, radial=radial)
    inputs = [layer.leaves[k] for k in ("x", "vectors", "radial", "envelope") if k in layer.leaves]
    for name, leaf in layer.leaves.items():
        leaf.requires_grad_(name in ("x", "vectors", "radial", "envelope"))
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        found, again, expected = (
            torch.autograd.grad(layer(name, recompute=recompute).sin().sum(), inputs)
            for name in ("cpu", "cpu", "reference")
        )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) <= EXACT


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the whole layer was called for in C."""
    made, call = [], kernels._call_layer

    def counted(layer, name: str, *given) -> None:
        made.append(name)
        call(layer, name, *given)

    monkeypatch.setattr(kernels, "_call_layer", counted)
    return made


IN_C = ["layer_value", "layer_gradient", "layer_second", "layer_gradient"]
MOVING = ("x", "vectors", "radial", "envelope")


def training(layer: EdgeLayer, backend: str, **options: bool) -> dict[str, torch.Tensor]:
    """Return forces and the gradients of a loss on the value and on them: a step of training."""
    leaves = {name: leaf for name, leaf in layer.leaves.items() if leaf.requires_grad}
    moving = {name: leaf for name, leaf in leaves.items() if name in MOVING}
    out = layer(backend, **options)
    wave = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    energy = (out * wave).sum() + out.square().sum()
    forces = torch.autograd.grad(energy, list(moving.values()), create_graph=True)
    loss = sum((force.sin() + force.square()).sum() for force in forces) + energy.sin()
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    found = {f"force on {name}": force.detach() for name, force in zip(moving, forces, strict=True)}
    return found | dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize(
    ("lmax", "mmax", "channels", "radial", "n_edges", "n_threads"),
    [
        (2, 2, 8, "map", 1100, 2),
        (2, 2, 5, "factors", 70, 1),
        (3, 1, 9, "map", 70, 1),
        (4, 2, 6, "none", 70, 1),
        (2, 0, 3, "map", 5, 1),
        (1, 1, 16, "map", 1, 1),
        (0, 0, 3, "factors", 7, 1),
        (2, 2, 4, "map", 0, 1),
    ],
)
def test_training_on_forces_in_c_agrees_with_the_reference(
    calls: list[str], lmax, mmax, channels, radial, n_edges, n_threads
) -> None:
    # blocks are of 64 edges; the first four lie along the axis or all but do
    shape = (channels, channels + 1, 12, n_edges)
    layer = EdgeLayer(lmax, mmax, *shape, radial=radial)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        found, again = training(layer, "cpu"), training(layer, "cpu")
    finally:
        torch.set_num_threads(before)
    expected = training(layer, "reference")
    assert calls == 2 * IN_C
    assert all(torch.equal(found[name], again[name]) for name in found)
    errors = {name: relative(found[name], expected[name]) for name in expected}
    assert max(errors.values()) <= EXACT, errors


@pytest.mark.parametrize(
    "fixed",
    ["first.0 first.1 first.2", "second.1", "x radial", "envelope vectors", "radial_weight"],
)
def test_training_in_c_leaves_out_what_is_fixed(calls: list[str], fixed: str) -> None:
    layer = EdgeLayer(2, 2, channels=4, hidden=3)
    for name in fixed.split():
        layer.leaves[name].requires_grad_(False)
    found, expected = training(layer, "cpu"), training(layer, "reference")
    assert calls == IN_C
    assert max(relative(found[name], expected[name]) for name in expected) <= EXACT


def test_training_in_c_takes_strided_inputs_and_single_precision(calls: list[str]) -> None:
    layer = EdgeLayer(2, 2, channels=8, hidden=8, n_edges=80)
    exact = training(layer, "reference")
    for name, leaf in layer.leaves.items():
        apart = torch.stack((leaf.detach().float(), leaf.detach().float()), dim=-1)
        layer.leaves[name] = apart[..., 0].requires_grad_()
    assert not layer.leaves["x"].is_contiguous()
    found = training(layer, "cpu")
    assert calls == IN_C
    errors = {name: relative(found[name].double(), exact[name]) for name in exact}
    assert max(errors.values()) <= 10 * SINGLE, errors  # a second derivative has more terms


def test_sigmoids_of_extreme_gates_are_those_of_torch() -> None:
    layer = EdgeLayer(1, 1, 1, 1, n_atoms=2, n_edges=1, radial="none")
    with torch.no_grad():
        for scale in (1e-3, 1.0, 30.0, 1e4, float("nan")):
            layer.leaves["first.0"].mul_(scale)
            out, expected = layer("cpu"), layer("reference")
            torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("in_order", [True, False])
def test_rotations_have_the_same_bits_on_any_number_of_threads(in_order: bool) -> None:
    """Atoms with many edges, so that a part would begin within those of one."""
    generator = torch.Generator().manual_seed(0)
    n_edges, n_atoms = 7001, 40
    vectors, x, rows = (
        torch.randn(*shape, generator=generator, requires_grad=True)
        for shape in ((n_edges, 3), (n_atoms, 4, 9), (n_edges, 4, 9))
    )
    edges = torch.randint(n_atoms, (2, n_edges), generator=generator)
    edges[1] = edges[1].sort().values if in_order else edges[1]

    def derivatives(n_threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(n_threads)
        frame = build_edge_frame(vectors, edges, n_atoms=n_atoms, lmax=1, mmax=1)
        into, back = rotate_to_edge(x, frame, side="both"), rotate_from_edge(rows, frame)
        of_edges = rotate_from_edge(rows, frame, reduce="none")
        found = [into, back, of_edges]
        energy = sum(one.sin().sum() for one in found)
        return [frame.wigner, *found, *torch.autograd.grad(energy, [vectors, x, rows])]

    before = torch.get_num_threads()
    try:
        one, three = derivatives(1), derivatives(3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
