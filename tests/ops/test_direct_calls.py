"""A registered operation is its bare function where that is all, and the operation elsewhere."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from operations import OPERATIONS, leaves_of
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from atomeq.ops.dispatch import select, use_backend
from atomeq.ops.registered import registration
from atomeq.ops.registered.harmonics import harmonics as any_harmonics

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


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that gets an entry for every call: whether it went past the dispatcher."""
    taken: list[bool] = []
    decide = registration.may_call

    def recorded(values):
        taken.append(decide(values))
        return taken[-1]

    monkeypatch.setattr(registration, "may_call", recorded)
    return taken


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_are_the_same_past_the_dispatcher_and_through_it(name: str) -> None:
    operation = OPERATIONS[name]
    leaves = leaves_of(operation, torch.float64)
    through = operation.compute(*leaves)
    with torch.no_grad():
        assert torch.equal(operation.compute(*leaves), through)
    with torch.inference_mode():
        assert torch.equal(operation.compute(*leaves), through)


def test_calls_without_a_gradient_go_past_the_dispatcher(vectors: Tensor, direct: list) -> None:
    leaf = torch.nn.Parameter(vectors)
    harmonics(vectors, 2)
    with torch.no_grad():
        harmonics(leaf, 2)
    with torch.inference_mode():
        harmonics(vectors.clone(), 2)
    assert direct == [True, True, True]
    (slope,) = torch.autograd.grad(harmonics(leaf, 2).sum(), leaf)
    assert direct[3:] == [False, True]  # of a gradient without a graph nothing is differentiated
    assert not slope.requires_grad


def test_whoever_watches_sees_the_operation(vectors: Tensor, direct: list) -> None:
    with Watch() as watch:
        harmonics(vectors, 2)
    assert "atomeq.harmonics.default" in watch.seen
    traced = make_fx(lambda v: harmonics(v, 2))(vectors)
    assert torch.ops.atomeq.harmonics.default in {node.target for node in traced.graph.nodes}
    with profile() as seen:
        harmonics(vectors, 2)
    assert "atomeq::harmonics" in {event.key for event in seen.key_averages()}
    harmonics(vectors.as_subclass(Marked), 2)
    with torch.device("cpu"):  # a mode of torch functions
        harmonics(vectors, 2)
    assert not any(direct)


def test_tensors_that_are_no_plain_numbers_reach_no_kernel(vectors: Tensor, direct: list) -> None:
    assert harmonics(vectors.to("meta"), 2).is_meta
    shown = torch._neg_view(vectors)  # what it shows is not what lies in its memory
    assert torch.equal(harmonics(shown, 2), harmonics(-vectors, 2))
    with forward_ad.dual_level():
        harmonics(vectors, 2)
    assert direct == [False, False, True, False]


# torch says that it loops over the batch, as it does for every operation without a rule of its own
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms_meet_the_operation(vectors: Tensor, direct: list) -> None:
    batched = torch.func.vmap(lambda v: harmonics(v, 2))(vectors[:, None])
    assert direct[0] is False
    assert torch.equal(batched[:, 0], harmonics(vectors, 2))
    with pytest.raises(RuntimeError, match="functorch"):  # and not a gradient of zero
        torch.func.grad(lambda v: harmonics(v, 2).square().sum())(vectors)


def chosen(op: str, like: Tensor, n_edges: int = 3) -> str:
    size = {"lmax": 2, "mmax": 2, "channels": 4}
    return select(op, n_edges=n_edges, like=like, **size).name


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
