"""The registered operations of an edge layer: their gradients, their registration, their laws."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from edge_layers import EdgeLayer, relative
from structures import rattled_molecule
from torch import Tensor

from atomeq.models.escn import ESCN
from atomeq.ops.dispatch import use_backend
from atomeq.ops.edge.escn_conv import (
    INPUTS,
    escn_conv,
    escn_conv_gradient,
    escn_conv_second_gradient,
)
from atomeq.ops.edge.rotation import gather_rotate, rotate_scatter, torque, turning_wigner
from atomeq.ops.edge.so2_map import (
    SO2Shape,
    row_products,
    scaled_rows,
    so2_forward,
    so2_transposed,
    so2_weight_gradient,
)
from atomeq.ops.edge.wigner import block_diagonal, build_edge_frame, wigner_matrices
from atomeq.ops.orders import m_primary_order
from atomeq.potential.potential import Potential

EXACT = 1e-12  # float64 rounding through second derivatives
LMAX, MMAX, CHANNELS, N_ATOMS, N_EDGES = 1, 1, 1, 3, 3
N_SPH, N_ROWS = (LMAX + 1) ** 2, len(m_primary_order(LMAX, MMAX))
SHAPE = SO2Shape(LMAX, MMAX, CHANNELS, 1, LMAX)

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def vectors() -> Tensor:
    return random(N_EDGES, 3)


@pytest.fixture
def moving(vectors: Tensor) -> Callable[[Tensor], Tensor]:
    """Return W as a function of the vectors, turned along with them by the shortest way.

    A single operation is not equivariant about the edge, so a roll would count; the torque is the
    derivative along turns that have none.
    """
    ends = torch.tensor([[0, 1, 2], [1, 0, 0]])
    frame = build_edge_frame(vectors.detach(), ends, n_atoms=N_ATOMS, lmax=LMAX, mmax=MMAX)
    start = torch.nn.functional.normalize(vectors.detach(), dim=1)

    def wigner(moved: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(moved.detach(), dim=1)
        cosine = (unit * start).sum(1, keepdim=True)
        back = torch.cat((1 + cosine, torch.linalg.cross(unit, start)), dim=1)
        turn = wigner_matrices(torch.nn.functional.normalize(back, dim=1), LMAX)
        return frame.wigner @ block_diagonal(turn)

    return wigner


SIDES = {
    "both": [torch.tensor([0, 1, 2]), torch.tensor([1, 0, 0])],
    "target": [torch.tensor([1, 0, 0])],
    "edges": [],
}


def assert_gradients(function: Function, *inputs: Tensor) -> None:
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("sides", list(SIDES))
@pytest.mark.parametrize("turned", [False, True])
def test_rotations_and_torque_pass_gradcheck_and_gradgradcheck(
    sides: str, turned: bool, vectors: Tensor, moving: Callable[[Tensor], Tensor]
) -> None:
    indices = SIDES[sides]
    x = random(N_ATOMS, N_SPH, CHANNELS)
    rows = random(N_EDGES, N_ROWS, max(1, len(indices)) * CHANNELS)
    factor, omega = random(N_EDGES), random(N_EDGES, 3)
    none: list[Tensor] = []

    def into(x: Tensor, v: Tensor, omega: Tensor | None = None) -> Tensor:
        return gather_rotate(x, omega, v, moving(v), indices, none, "cpu")

    def back(rows: Tensor, v: Tensor, factor: Tensor, omega: Tensor | None = None) -> Tensor:
        given = (rows, omega, factor, N_ATOMS, v, moving(v), indices, none, "cpu")
        return rotate_scatter(*given)

    def turn(x: Tensor, rows: Tensor, v: Tensor) -> Tensor:
        return torque(x, rows, v, moving(v), indices, none, "cpu")

    extra = [omega] if turned else []
    assert_gradients(into, x, vectors, *extra)
    assert_gradients(back, rows, vectors, factor, *extra)
    if not turned:
        assert_gradients(turn, x, rows, vectors)


def test_wigner_matrices_turn_with_their_edges(
    vectors: Tensor, moving: Callable[[Tensor], Tensor]
) -> None:
    assert_gradients(lambda v: turning_wigner(v, moving(v)), vectors)
    torch.library.opcheck(turning_wigner, (vectors, moving(vectors)))


def so2_weights(chiral: bool) -> list[Tensor]:
    shapes = [(LMAX + LMAX + 1, (LMAX + 1) * CHANNELS), (LMAX, LMAX * CHANNELS)]
    return [random(*shapes[0]), random(*([2] if chiral else []), *shapes[1])]


@pytest.mark.parametrize("chiral", [False, True])
def test_so2_maps_pass_gradcheck_and_gradgradcheck(chiral: bool) -> None:
    weights, sizes = so2_weights(chiral), list(SHAPE)
    rows, grad = random(2, SHAPE.n_rows * SHAPE.c_in), random(2, SHAPE.width)
    complex_ = [False, chiral]
    bias = random(SHAPE.n_biases)
    assert_gradients(
        lambda x, b, *w: so2_forward(x, list(w), b, sizes, "cpu"), rows, bias, *weights
    )
    assert_gradients(lambda g, *w: so2_transposed(g, list(w), sizes, "cpu"), grad, *weights)
    assert_gradients(
        lambda x, g: tuple(so2_weight_gradient(x, g, complex_, sizes, "cpu")), rows, grad
    )


def test_radial_factors_pass_gradcheck_and_gradgradcheck() -> None:
    sizes, width = list(SHAPE), SHAPE.n_rows * SHAPE.c_in
    rows, other, scale = random(2, width), random(2, width), random(2, SHAPE.n_scales)
    assert_gradients(lambda x, s: scaled_rows(x, s, sizes, "cpu"), rows, scale)
    assert_gradients(lambda x, y: row_products(x, y, sizes, "cpu"), rows, other)
    torch.library.opcheck(scaled_rows, (rows, scale, sizes, "cpu"))
    torch.library.opcheck(row_products, (rows, other, sizes, "cpu"))


def layer_function(layer: EdgeLayer, *, recompute: bool = False) -> tuple[Function, list[Tensor]]:
    """Return a layer as a function of its leaves, and these."""
    names = list(layer.leaves)

    def compute(*given: Tensor) -> Tensor:
        moved = dataclasses.replace(layer)
        moved.leaves = dict(zip(names, given, strict=True))
        return moved("cpu", recompute=recompute)

    return compute, list(layer.leaves.values())


@pytest.mark.parametrize(("chiral", "recompute"), [(True, False), (True, True), (False, False)])
def test_layer_passes_gradcheck_and_gradgradcheck_at_the_poles_too(
    chiral: bool, recompute: bool
) -> None:
    layer = EdgeLayer(1, 1, channels=1, hidden=1, n_atoms=2, n_edges=5, chiral=chiral)
    for name, leaf in layer.leaves.items():
        # fixed weights are what C has second gradients for; chiral ones it does not know
        leaf.requires_grad_(chiral or name in ("x", "vectors", "radial", "envelope"))
    compute, inputs = layer_function(layer, recompute=recompute)
    assert_gradients(compute, *inputs)


def layer_call(layer: EdgeLayer) -> dict[str, Any]:
    """Return what the three operations of a layer share, detached, by the names of arguments."""
    frame, leaves = layer.frame(), {name: leaf.detach() for name, leaf in layer.leaves.items()}
    names = [name for name in INPUTS if name in leaves]
    weights = [leaves[f"{name}.{m}"] for name in ("first", "second") for m in range(layer.mmax + 1)]
    edges = [frame.wigner, frame.source, frame.target]
    return {
        **{"inputs": [leaves[name] for name in names], "names": " ".join(names)},
        **{"weights": weights, "edges": edges, "kernels": "cpu"},
    }


def test_operations_are_registered_as_torch_expects(
    vectors: Tensor, moving: Callable[[Tensor], Tensor]
) -> None:
    indices, none, wigner = SIDES["both"], [], moving(vectors)
    x, rows = random(N_ATOMS, N_SPH, CHANNELS), random(N_EDGES, N_ROWS, 2 * CHANNELS)
    last = (vectors, wigner, indices, none, "cpu")
    check = torch.library.opcheck
    check(gather_rotate, (x, None, *last))
    check(rotate_scatter, (rows, None, random(N_EDGES), N_ATOMS, *last))
    check(torque, (x, rows, *last))
    weights, sizes = so2_weights(True), list(SHAPE)
    rows, grad = random(2, SHAPE.n_rows * SHAPE.c_in), random(2, SHAPE.width)
    check(so2_forward, (rows, weights, random(SHAPE.n_biases), sizes, "cpu"))
    check(so2_transposed, (grad, weights, sizes, "cpu"))
    check(so2_weight_gradient, (rows, grad, [False, True], sizes, "cpu"))
    given = layer_call(EdgeLayer(1, 1))
    for n_kept in (2, 1, 0):
        check(escn_conv, (), given | {"n_kept": n_kept})
    out, *kept = escn_conv(**given, n_kept=2)
    assert given["names"] == " ".join(INPUTS[:-2])  # no biases
    wanted = {"wanted": "x vectors first second", "kept": kept, "also": []}
    wanted["grad"] = torch.randn_like(out)
    for n_kept in (2, 0):
        for also in ([], [torch.randn_like(rows) for rows in kept]):
            check(escn_conv_gradient, (), given | wanted | {"n_kept": n_kept, "also": also})
    *_, ga, gz = escn_conv_gradient(**given, **wanted, n_kept=2)
    directions = [torch.randn_like(tensor) for tensor in given["inputs"][:2]]
    along = {"along": "x vectors", "directions": directions}
    of = {"kept": [*kept, ga, gz], "wanted": "x first grad y u", "grad": torch.randn_like(out)}
    check(escn_conv_second_gradient, (), given | along | of)


def test_layer_feels_no_torque_about_its_edges() -> None:
    given = layer_call(EdgeLayer(3, 2, channels=8, hidden=8, n_edges=20, chiral=True))
    out, *kept = escn_conv(**given, n_kept=2)
    wanted = {"kept": kept, "also": [], "wanted": "vectors", "n_kept": 0}
    turn, *_ = escn_conv_gradient(torch.randn_like(out), **given, **wanted)
    direction = torch.nn.functional.normalize(given["inputs"][1], dim=1)
    assert turn.norm(dim=1).min() > 0
    assert (turn * direction).sum(1).abs().max() <= EXACT * turn.norm(dim=1).max()


@pytest.mark.parametrize("n_kept", [2, 1, 0])
def test_layer_refuses_a_third_derivative(n_kept: int) -> None:
    given = layer_call(EdgeLayer(1, 1))
    x = given["inputs"][0] = given["inputs"][0].requires_grad_()
    out, *_ = escn_conv(**given, n_kept=n_kept)
    first = torch.autograd.grad(out.square().sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match=r"has no (third )?derivative"):
        second.sum().backward()


def test_threads_change_rounding_alone_and_their_results_are_repeatable() -> None:
    layer = EdgeLayer(2, 2, channels=16, hidden=16, n_atoms=20, n_edges=700, chiral=True)
    before = torch.get_num_threads()
    expected = layer.derivatives("cpu")
    try:
        torch.set_num_threads(3)
        found, again = layer.derivatives("cpu"), layer.derivatives("cpu")
    finally:
        torch.set_num_threads(before)
    for name, value in expected.items():
        assert relative(found[name], value) <= EXACT
        assert torch.equal(found[name], again[name]), name


def test_force_training_of_a_whole_model_does_not_depend_on_the_backend() -> None:
    torch.manual_seed(0)
    model = ESCN(4.0, lmax=2, mmax=1, num_layers=2, sphere_channels=8, hidden_channels=8)
    for parameter in model.energy.parameters():  # its output starts at zero
        torch.nn.init.normal_(parameter)
    potential = Potential(model.double()).train()
    graph = potential.build_graph([rattled_molecule()])
    found: dict[str, list[Tensor]] = {}
    for backend in ("reference", "auto"):
        with use_backend(backend):
            result = potential(graph, properties=("energy", "forces"))
            loss = result["energy"].square().sum() + result["forces"].square().sum()
            gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        members = [result["energy"], result["forces"], *gradients]
        found[backend] = [tensor for tensor in members if tensor is not None]
    assert found["auto"][1].norm() > 0
    for one, other in zip(found["auto"], found["reference"], strict=True):
        assert relative(one, other) <= EXACT
