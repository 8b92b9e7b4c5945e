"""Kernels serve unasked on a GPU once they have proved themselves; an interpreter stands in."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from atomeq.ops import dispatch
from atomeq.ops.dispatch import OPERATIONS, load_backend, refusal, use_backend
from atomeq.ops.explain import explain
from atomeq.ops.pairs.operations import pair_functions
from atomeq.ops.segment.operations import segment_sum
from atomeq.ops.self_check import deviation
from atomeq.ops.specification import OpSpec, Size

triton_kernels = pytest.importorskip(
    "atomeq.ops.segment.triton.kernels", reason="Triton is not installed"
)
pytestmark = pytest.mark.triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
X, INDEX = torch.ones(4, 16, device=DEVICE), torch.tensor([0, 1, 1, 0], device=DEVICE)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let auto take Triton's kernels wherever the tensors are, and forget what was proved."""
    for module in ("dispatch", "explain"):
        order = ("triton", "reference")
        monkeypatch.setattr(f"atomeq.ops.{module}.AUTO_ORDER", order)
    monkeypatch.setitem(dispatch.PROVED, "triton", frozenset({"cpu", "cuda"}))
    dispatch._proof.cache_clear()
    dispatch._remembered.cache_clear()
    yield
    dispatch._proof.cache_clear()
    dispatch._remembered.cache_clear()


def wrong_sum(call: SimpleNamespace) -> Tensor:
    total = call.x.new_zeros(call.n_segments, *call.x.shape[1:])
    total = total.index_add(0, call.index, call.x)
    total[0] *= 1.001
    return total


def failing_sum(call: SimpleNamespace) -> Tensor:
    raise RuntimeError("no kernel image is available")


def nan_sum(call: SimpleNamespace) -> Tensor:
    return call.x.new_full((call.n_segments, *call.x.shape[1:]), torch.nan)


def who_serves(x: Tensor = X) -> str:
    size = OPERATIONS["segment_sum"], Size(0, 0, x.shape[1], 1, x.dtype, x.device)
    return dispatch.serving(size[0].name, size[1])


def test_kernels_that_are_right_serve_unasked() -> None:
    assert who_serves() == "triton"
    assert segment_sum(X, INDEX, 2).eq(2).all()


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (wrong_sum, "its value is off by"),
        (nan_sum, "its value is off by nan"),
        (failing_sum, "no kernel image is available"),
    ],
)
def test_a_wrong_kernel_is_said_once_and_plain_torch_serves(
    kernel, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton_kernels, "segment_total", kernel)
    with caplog.at_level(logging.WARNING, logger="atomeq.ops.dispatch"):
        for _ in range(2):
            assert segment_sum(X, INDEX, 2).eq(2).all()
    assert who_serves() == "reference"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "the triton kernels of segment_sum failed their self-check" in said[0]
    assert reason in said[0]
    report = explain(
        "segment_sum", lmax=0, mmax=0, channels=16, n_edges=4, dtype=X.dtype, device=DEVICE
    )
    assert report.backend == "reference"
    assert reason in report.refusals["triton"]


def test_who_asks_by_name_gets_the_kernel_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "segment_total", wrong_sum)
    with use_backend("triton"):
        assert not segment_sum(X, INDEX, 2).eq(2).all()


def test_a_gradient_alone_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton_kernels.segment_weights
    calls = []

    def wrong_the_second_time(call: SimpleNamespace) -> Tensor:
        calls.append(call)
        return right(call) * (1 if len(calls) == 1 else 1.01)

    monkeypatch.setattr(triton_kernels, "segment_weights", wrong_the_second_time)
    spec = OpSpec("segment_softmax", 0, 0, 16, 1, X.dtype, DEVICE)
    assert "its gradient number 1 is off" in (dispatch.distrust("triton", spec) or "")


def test_no_mode_of_the_caller_reaches_the_proof() -> None:
    with torch.inference_mode():
        assert who_serves() == "triton"
    dispatch._proof.cache_clear()
    dispatch._remembered.cache_clear()
    with torch.no_grad(), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert who_serves() == "triton"
    before = torch.get_rng_state()
    dispatch._proof.cache_clear()
    dispatch._remembered.cache_clear()
    assert who_serves() == "triton"
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("op", sorted(OPERATIONS))
def test_every_operation_with_kernels_proves_itself(
    op: str, backend: str, dtype: torch.dtype
) -> None:
    known = OPERATIONS[op]
    spec = OpSpec(op, 2, 1, 16, 1, dtype, DEVICE)
    if refusal(backend, spec) is not None or dispatch.by_torch(backend, spec):
        assert op in ("spherical_harmonics", "sphere_pointwise", "gaunt_product",
                      "sphere_silu", "geometric_product")  # fmt: skip
        return
    if known.example is None:
        assert backend == "cpu"  # which needs no proof: its compiler is the one of the tests
        return
    assert load_backend(backend, known.family) is not None
    by_kernels = known.served_by(backend)
    assert deviation(known.example, known.reference, by_kernels, Size(*spec[1:]), "highest") is None


def test_tables_of_pairs_are_read_in_bfloat16() -> None:
    known = OPERATIONS[pair_functions.__name__]
    size = Size(0, 0, 6, 1, torch.bfloat16, DEVICE)
    kernels = known.served_by("triton:highest")
    assert deviation(known.example, known.reference, kernels, size, "highest") is None


def test_an_interpreter_serves_only_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    dispatch._remembered.cache_clear()
    x = torch.ones(4, 16)
    assert dispatch.serving("gaunt_product", Size(1, 1, 16, 1, x.dtype, x.device)) == "reference"
    with use_backend("triton"):
        assert dispatch.serving("gaunt_product", Size(1, 1, 16, 1, x.dtype, x.device)) == "triton"
