import threading
from collections.abc import Iterator

import pytest
import torch

from atomeq.ops import dispatch
from atomeq.ops.dispatch import OPERATIONS, chosen_backend, use_backend
from atomeq.ops.explain import explain
from atomeq.ops.segment.operations import segment_sum
from atomeq.ops.specification import OpSpec

X, INDEX = torch.ones(4, 2), torch.tensor([0, 1, 1, 0])


class PickyBackend:
    """Serves float32 only, and gives a wrong sum on purpose, to be recognised by."""

    def refusal(self, spec: OpSpec) -> str | None:
        return None if spec.dtype == torch.float32 else f"it has no {spec.dtype}"

    def by_torch(self, spec: OpSpec) -> bool:
        return spec.op != "segment_sum"

    def segment_sum(self, x: torch.Tensor, index: torch.Tensor, n_segments: int) -> torch.Tensor:
        return x.new_full((n_segments, *x.shape[1:]), 42.0)


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(dispatch.BACKENDS, "picky", f"{__name__}:PickyBackend")
    yield
    for key in [key for key in dispatch._loaded if key[0] == "picky"]:
        del dispatch._loaded[key]
    dispatch._remembered.cache_clear()


def test_reference_serves_every_operation() -> None:
    assert {"segment_sum", "escn_conv", "gaunt_product", "edge_wigner"} <= set(OPERATIONS)
    for op in OPERATIONS:
        with use_backend("reference"):
            report = explain(
                op, lmax=2, mmax=2, channels=16, n_edges=100, dtype=torch.float32, device="cpu"
            )
        assert report.backend == "reference"
        assert report.flops > 0
        assert report.bytes > 0
        assert report.floor > 0


def test_default_is_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATOMEQ_BACKEND", raising=False)
    assert chosen_backend() == "auto"


def test_context_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOMEQ_BACKEND", "reference")
    assert chosen_backend() == "reference"
    with use_backend("auto"):
        assert chosen_backend() == "auto"
        with use_backend("reference"):
            assert chosen_backend() == "reference"
        assert chosen_backend() == "auto"
    assert chosen_backend() == "reference"


def test_choice_ends_with_its_block_when_it_fails() -> None:
    with pytest.raises(RuntimeError), use_backend("reference"):
        raise RuntimeError
    assert chosen_backend() == "auto"


def test_choice_belongs_to_its_thread() -> None:
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_unknown_backend_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ValueError, match=r"'tritn'; the backends are: auto, .*triton"),
        use_backend("tritn"),
    ):
        pass
    monkeypatch.setenv("ATOMEQ_BACKEND", "tritn")
    with pytest.raises(ValueError, match="ATOMEQ_BACKEND asks for backend 'tritn'"):
        segment_sum(X, INDEX, 2)


@pytest.mark.usefixtures("picky")
def test_explicit_choice_serves() -> None:
    with use_backend("picky"):
        assert segment_sum(X, INDEX, 2).eq(42).all()
    assert segment_sum(X, INDEX, 2).eq(2).all()


@pytest.mark.usefixtures("picky")
def test_explicit_choice_that_cannot_be_met_says_why() -> None:
    with (
        use_backend("picky"),
        pytest.raises(NotImplementedError, match=r"'picky'.*segment_sum: it has no torch.float64"),
    ):
        segment_sum(X.double(), INDEX, 2)


@pytest.mark.usefixtures("picky")
def test_auto_passes_on_to_the_next_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "AUTO_ORDER", ("picky", "reference"))
    assert segment_sum(X, INDEX, 2).eq(42).all()
    assert segment_sum(X.double(), INDEX, 2).eq(2).all()


@pytest.mark.usefixtures("picky")
def test_explain_names_who_serves_and_why_not_others() -> None:
    options = {"lmax": 2, "mmax": 2, "channels": 16, "n_edges": 4500, "device": "cpu"}
    report = explain("so2_linear", dtype=torch.float64, **options)
    assert report.refusals["picky"] == "it has no torch.float64"
    assert set(report.refusals) == set(dispatch.BACKENDS) - {"cpu"}
    assert report.refusals["reference"] == "it could, but cpu comes first"
    assert "served by   cpu (asked for: auto)" in str(report)
    assert "not by      picky: it has no torch.float64" in str(report)
    with use_backend("picky"):
        assert explain("so2_linear", dtype=torch.float64, **options).backend is None
        assert explain("so2_linear", dtype=torch.float32, **options).backend == "picky"


def test_explain_counts_the_work_of_an_so2_map() -> None:
    report = explain(
        "so2_linear", lmax=2, mmax=2, channels=8, n_edges=10, dtype=torch.float64, device="cpu"
    )
    assert report.flops == 10 * 2 * (9 + 4 * 4 + 4 * 1) * 64
    assert report.bytes == 8 * (10 * 2 * 9 * 8 + (9 + 2 * 4 + 2 * 1) * 64)


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("gaunt_product", "gaunt_product"),
        ("segment_mean", "segment_sum"),
        ("so2_linear", "so2_linear_with_scalars"),
        ("build_edge_frame", "edge_wigner"),
        ("escn_conv", "escn_conv"),
    ],
)
def test_explain_takes_the_names_that_users_call(name: str, called: str) -> None:
    size = {"lmax": 2, "mmax": 2, "channels": 16, "n_edges": 9}
    report = explain(name, dtype=torch.float32, device="cpu", **size)
    assert report.spec.op == called
    assert report.backend is not None


def test_explain_says_what_sets_the_floor_and_by_which_multiplication() -> None:
    size = {"lmax": 2, "mmax": 2, "channels": 128, "n_edges": 1000}

    def report(op: str, dtype: torch.dtype = torch.float32):
        return explain(op, dtype=dtype, device="cuda", **size)

    harmonics, single = report("spherical_harmonics"), report("escn_conv")
    assert harmonics.limit == "memory"
    assert harmonics.floor == harmonics.bytes / 4.3e12
    assert single.limit == "arithmetic"
    assert 0.9 < single.matrix_flops / single.flops < 1
    assert "arithmetic sets it" in str(single)
    assert "ns per edge" in str(single)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        tf32 = report("escn_conv")
        torch.set_float32_matmul_precision("medium")
        halved = report("escn_conv")
    finally:
        torch.set_float32_matmul_precision(before)
    # the products alone were counted by hand at 8.5 and 4.1 ns per edge; rotations are on top
    assert tf32.floor / 1000 == pytest.approx(8.5e-9, rel=0.08)
    assert halved.floor / 1000 == pytest.approx(4.1e-9, rel=0.15)
    assert single.floor > 5 * tf32.floor


def test_explain_counts_channels_by_mode() -> None:
    size = {"lmax": 1, "mmax": 1, "channels": 8, "n_edges": 10, "device": "cpu"}
    uvu, uuu, uvw = (
        explain("tensor_product", dtype=torch.float32, mode=mode, **size)
        for mode in ("uvu", "uuu", "uvw")
    )
    n_paths = 4  # 000, 011, 101, 110; 112 would need degree 2
    assert uvu.bytes == 4 * 10 * (2 * 4 * 8 + 4 + n_paths * 8)
    assert uuu.bytes == uvu.bytes + 4 * 10 * 4 * 7
    assert uvw.bytes == 4 * 10 * (3 * 4 * 8 + n_paths * 8**3)
    assert uvw.matrix_flops == 10 * 2 * (1 + 3 + 3 + 1) * 8**3


def test_explain_refuses_unknown_operations() -> None:
    with pytest.raises(ValueError, match="'so3_linear' is unknown; choose from"):
        explain(
            "so3_linear", lmax=2, mmax=2, channels=8, n_edges=1, dtype=torch.float32, device="cpu"
        )


def test_explain_says_what_auto_would_take_and_what_this_machine_has() -> None:
    options = {"lmax": 2, "mmax": 2, "channels": 8, "n_edges": 9}
    with use_backend("e3nn"):
        report = explain("cg_conv", dtype=torch.float64, device="cpu", mode="uvw", **options)
    assert report.backend == "e3nn"
    assert report.auto in dispatch.AUTO_ORDER
    assert report.refusals["reference"] == "it could, but e3nn was asked for"
    assert f"auto takes  {report.auto}" in str(report)
    assert "C compiler" in str(report)
    assert ("no CUDA device" in str(report)) is not torch.cuda.is_available()


def test_explain_tells_backends_that_wait_to_be_asked() -> None:
    report = explain(
        "cg_conv", lmax=2, mmax=2, channels=8, n_edges=9, dtype=torch.float64, device="cpu"
    )
    assert report.refusals["e3nn"] == "it could, but serves only when asked for by name"
