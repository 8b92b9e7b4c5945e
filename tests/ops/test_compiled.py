"""Second gradients are the same in eager mode, under torch.compile and with recomputation."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from edge_layers import relative
from operations import OPERATIONS, C, derivatives, leaves_of, step
from structures import rattled_molecule
from torch import Tensor

from atomeq.models.escn import ESCN
from atomeq.ops.dispatch import use_backend
from atomeq.ops.segment.operations import segment_sum

EXACT = 1e-12  # float64 rounding

config = torch._dynamo.config
needs_trace_of_gradients = pytest.mark.skipif(
    not hasattr(config, "trace_autograd_ops"),
    reason="this torch does not trace autograd.grad inside a compiled function",
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def traced(function: Callable[..., object]) -> Callable[..., object]:
    """Compile as far as a graph for autograd goes: what comes after changes no mathematics."""
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def compiled_step(name: str, backend: str) -> list[Tensor]:
    """Run the step of force training, the choice of the backend included, as one graph."""
    operation = OPERATIONS[name]
    leaves = leaves_of(operation, torch.float64)

    def whole() -> list[Tensor]:
        with use_backend(backend):
            return step(operation.compute, leaves)

    with config.patch(trace_autograd_ops=True):
        return traced(whole)()


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert any(tensor.norm() > 0 for tensor in expected[1:])
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) <= EXACT


QUICK = {  # one of each kind; a trace takes seconds, and the others differ little from these
    *(("auto", name) for name in ("rotate_to_edge", "so2_linear", "escn_conv", "cg_conv")),
    *(("auto", name) for name in ("spherical_harmonics", "segment_softmax", "sphere_silu")),
    ("reference", "rotate_from_edge per edge"),
}
CHOICES = [
    pytest.param(backend, name, marks=() if (backend, name) in QUICK else pytest.mark.slow)
    for name in OPERATIONS
    for backend in ("auto", "reference")
]


@needs_trace_of_gradients
@pytest.mark.parametrize(("backend", "name"), CHOICES)
def test_compiled_step_gives_the_second_gradients_of_eager_mode(backend: str, name: str) -> None:
    assert_same(compiled_step(name, backend), derivatives(backend, OPERATIONS[name], torch.float64))


@needs_trace_of_gradients
@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.parametrize("name", ["escn_conv", "cg_conv"])
def test_compiled_step_of_triton_is_that_of_eager_mode(name: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install atomeq[cuda]")
    expected = derivatives("reference", OPERATIONS[name], torch.float64)
    assert_same(compiled_step(name, "triton"), expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_recomputation_gives_the_same_second_gradients(name: str, backend: str) -> None:
    operation = OPERATIONS[name]

    def again(*leaves: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(operation.compute, *leaves, use_reentrant=False)

    with use_backend(backend):
        found = step(again, leaves_of(operation, torch.float64))
    assert_same(found, derivatives(backend, operation, torch.float64))


def kernels_in(graphs: list[torch.fx.GraphModule]) -> set[str]:
    """Return which kernel sets the registered operations of the last graph name."""
    return {
        node.kwargs.get("kernels") or node.args[-1]
        for node in graphs[-1].graph.nodes
        if node.op == "call_function" and "atomeq" in str(node.target)
    }


def test_graph_belongs_to_the_choice_it_was_traced_under() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def note(graph: torch.fx.GraphModule, example: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    x, index = torch.ones(4, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    add = torch.compile(lambda x: segment_sum(x, index, 2), backend=note, fullgraph=True)

    def add_by(name: str, expected: set[str]) -> None:
        with use_backend(name):
            assert add(x).eq(2).all()
        assert kernels_in(graphs) == expected

    add_by("cpu", {"cpu"})
    add_by("reference", set())
    assert len(graphs) == 2
    add_by("cpu", set())  # neither of them is made again, the last one is still that of before
    assert len(graphs) == 2
    thread = threading.Thread(target=add_by, args=("auto", {"cpu"}))  # a choice is a thread's own
    with use_backend("reference"):
        thread.start()
        thread.join()
    assert len(graphs) == 3


def test_choice_that_cannot_be_met_is_refused_in_a_trace_too() -> None:
    def ask(x: Tensor) -> Tensor:
        with use_backend("openequivariance"):
            return segment_sum(x, torch.zeros(len(x), dtype=torch.long), 1)

    with pytest.raises(NotImplementedError, match="'openequivariance' was asked for"):
        torch.compile(ask, backend="aot_eager")(torch.ones(3, C))


def test_number_of_edges_may_change_without_another_graph() -> None:
    counts: list[int] = []

    def note(graph: torch.fx.GraphModule, example: object) -> torch.fx.GraphModule:
        counts.append(1)
        return graph

    add = torch.compile(
        lambda x, index: segment_sum(x, index, 2), backend=note, fullgraph=True, dynamic=True
    )
    for n_edges in (5, 7, 11):
        assert add(torch.ones(n_edges, 2), torch.ones(n_edges, dtype=torch.long))[1, 0] == n_edges
    assert len(counts) == 1


@pytest.mark.slow
def test_whole_model_is_one_graph() -> None:
    model = ESCN(4.0, lmax=2, mmax=1, num_layers=1, sphere_channels=8, hidden_channels=8).double()
    for parameter in model.energy.parameters():  # its output starts at zero
        torch.nn.init.normal_(parameter)
    graph = model.graph_builder()([rattled_molecule()])
    expected = model(graph)["energies"]
    assert relative(traced(lambda graph: model(graph)["energies"])(graph), expected) <= EXACT
