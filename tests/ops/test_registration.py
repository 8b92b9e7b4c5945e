"""Registered operations: whoever watches sees them, and torch's private help may be missing."""

import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from operations import OPERATIONS, leaves_of, step
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from atomeq.ops import registration
from atomeq.ops.dispatch import serving, size_of, use_backend
from atomeq.ops.edge.wigner import wigner_rows
from atomeq.ops.harmonics.operations import harmonics as any_harmonics
from atomeq.ops.tables import constant_in_traces

harmonics = partial(any_harmonics, normalization="component", normalize=True, kernels="cpu")


class Marked(Tensor):
    """A tensor of another class, which changes nothing."""


class Watch(TorchDispatchMode):
    """Keeps the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def vectors() -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_are_the_same_whether_or_not_a_gradient_is_wanted(name: str) -> None:
    operation = OPERATIONS[name]
    leaves = leaves_of(operation, torch.float64)
    through = operation.compute(*leaves)
    with torch.no_grad():
        assert torch.equal(operation.compute(*leaves), through)
    with torch.inference_mode():
        assert torch.equal(operation.compute(*leaves), through)


def test_whoever_watches_sees_the_operation(vectors: Tensor) -> None:
    with Watch() as watch:
        harmonics(vectors, 2)
    assert "atomeq.harmonics.default" in watch.seen
    traced = make_fx(lambda v: harmonics(v, 2))(vectors)
    assert torch.ops.atomeq.harmonics.default in {node.target for node in traced.graph.nodes}
    with profile() as seen:
        harmonics(vectors, 2)
    assert "atomeq::harmonics" in {event.key for event in seen.key_averages()}


def test_tensors_that_are_no_plain_numbers_reach_no_kernel(vectors: Tensor) -> None:
    assert harmonics(vectors.to("meta"), 2).is_meta
    shown = torch._neg_view(vectors)  # what it shows is not what lies in its memory
    assert torch.equal(harmonics(shown, 2), harmonics(-vectors, 2))
    assert torch.equal(harmonics(vectors.as_subclass(Marked), 2), harmonics(vectors, 2))


# torch says that it loops over the batch, as it does for every operation without a rule of its own
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms_meet_the_operation(vectors: Tensor) -> None:
    batched = torch.func.vmap(lambda v: harmonics(v, 2))(vectors[:, None])
    assert torch.equal(batched[:, 0], harmonics(vectors, 2))
    with pytest.raises(RuntimeError, match="functorch"):  # and not a gradient of zero
        torch.func.grad(lambda v: harmonics(v, 2).square().sum())(vectors)


def test_an_operation_without_a_derivative_refuses_one(vectors: Tensor) -> None:
    rows = wigner_rows(vectors.requires_grad_(), 1, 1, "cpu")
    with pytest.raises(NotImplementedError, match="atomeq::wigner_rows has no derivative"):
        rows.sum().backward()


@pytest.mark.parametrize("name", ["escn_conv", "cg_conv", "so2_linear"])
def test_gradients_do_not_need_to_know_which_of_them_are_wanted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = OPERATIONS[name]
    leaves = leaves_of(operation, torch.float64)
    known = step(operation.compute, leaves)
    monkeypatch.delattr(torch._C, "_will_engine_execute_node")
    for found, expected in zip(step(operation.compute, leaves), known, strict=True):
        torch.testing.assert_close(found, expected)


def test_gradients_are_the_same_by_torchs_own_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has no name for what lies below autograd, its slower tape takes over."""
    weights = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    found = []
    for name in ("weighted_fast", "weighted_plain"):
        if name == "weighted_plain":
            monkeypatch.setattr(registration, "_BELOW_AUTOGRAD", None)
        first, second = _weighted(name)(x, weights, [1], "cpu")
        gradients = torch.autograd.grad((first * second).sum(), [*weights, x], create_graph=True)
        again = torch.autograd.grad(sum(one.square().sum() for one in gradients), [*weights, x])
        found.append([first, second, *gradients, *again])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert all(bool(one.any()) for one in found[0])


def _weighted(name: str) -> Callable[..., list[Tensor]]:
    """Register x w² for each of some weights, with a gradient in plain torch."""

    def formula(saved, wanted, grads):
        assert {"x", "weights", "weights.1"} <= wanted
        pairs = list(zip(saved.weights, grads, strict=True))
        return {
            "x": sum(w**2 * grad for w, grad in pairs),
            "weights": [2 * w * saved.x * grad for w, grad in pairs],
        }

    def weighted(x: Tensor, weights: list[Tensor], orders: list[int], kernels: str) -> list[Tensor]:
        assert orders == [1]
        return [x * w**2 for w in weights]

    weighted.__name__ = name
    outputs = lambda call: [torch.empty_like(call.x) for _ in call.weights]  # noqa: E731
    return registration.registered(outputs=outputs, gradient=formula)(weighted)


def test_the_mark_of_a_constant_is_the_one_torch_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = vars(torch.compiler.assume_constant_result(lambda: 1))
    assert expected
    assert vars(constant_in_traces(lambda: 1)) == expected
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    assert vars(constant_in_traces(lambda: 1)) == expected


def chosen(op: str, like: Tensor, n_edges: int = 3) -> str:
    return serving(op, size_of(like, n_edges, lmax=2, mmax=2, channels=4))


@pytest.mark.parametrize("ask", [lambda: chosen("segment_sum", torch.ones(3))])
def test_a_remembered_choice_follows_what_is_asked_for(
    ask: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = ask()
    for _ in range(2):
        with use_backend("reference"):
            assert ask() == "reference"
        assert ask() == auto
        monkeypatch.setenv("ATOMEQ_BACKEND", "reference")
        assert ask() == "reference"
        monkeypatch.delenv("ATOMEQ_BACKEND")
    with use_backend("openequivariance"):
        for _ in range(2):  # an error is not remembered, nor the choice before it
            with pytest.raises(NotImplementedError, match="does not serve segment_sum"):
                ask()
    assert chosen("segment_sum", torch.ones(3, dtype=torch.float16)) == "reference"
