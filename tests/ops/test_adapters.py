"""The adapters equal the reference, and refuse what their libraries do not serve."""

import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from atomeq.ops import dispatch
from atomeq.ops.coupling import cuequivariance, openequivariance
from atomeq.ops.coupling.irreps import from_mul_ir, to_mul_ir
from atomeq.ops.coupling.operations import cg_conv, tensor_product
from atomeq.ops.dispatch import OPERATIONS, load_backend, refusal, use_backend
from atomeq.ops.harmonics.operations import spherical_harmonics
from atomeq.ops.paths import tensor_product_paths
from atomeq.ops.specification import Mode, OpSpec

EXACT = 1e-11  # float64 rounding, through two derivatives of sums over some hundred terms
GPU_SINGLE = 5e-6  # float32, relative to the largest number
CHANNELS = {"uvu": (4, 1, 4), "uuu": (4, 4, 4), "uvw": (3, 2, 4)}
PATHS = tensor_product_paths(2, 2, 2, pseudotensors=True)
MODES_AND_WEIGHTS = [
    *(("uvu", weights) for weights in ("per edge", "shared", "none")),
    *(("uuu", weights) for weights in ("per edge", "none")),
    *(("uvw", weights) for weights in ("per edge", "shared")),
]
ADAPTERS = ["e3nn", "cuequivariance", "openequivariance"]

installed = {
    "e3nn": pytest.param("e3nn"),
    "cuequivariance": pytest.param(
        "cuequivariance",
        marks=pytest.mark.skipif(
            find_spec("cuequivariance_torch") is None, reason="cuequivariance-torch not installed"
        ),
    ),
}
on_any_device = pytest.mark.parametrize("name", list(installed.values()))


def spec(op: str = "cg_conv", **changes: object) -> OpSpec:
    basis = OpSpec(op, 2, 2, 8, 100, torch.float32, torch.device("cpu"))
    return basis._replace(**changes)


def operands(
    mode: Mode, *, weights: str, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> list[Tensor]:
    """Features of 5 atoms, harmonics-like features of 7 edges, and weights if there are any."""
    u, v, w = CHANNELS[mode]
    per_path = (u, v, w) if mode == "uvw" else (u,)
    x = torch.randn(5, 9, u)
    y = torch.randn(7, 9) if mode == "uvu" else torch.randn(7, 9, v)
    tensors = [x, y]
    if weights != "none":
        edges = (7,) if weights == "per edge" else ()
        tensors.append(torch.randn(*edges, len(PATHS), *per_path))
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


def value_and_derivatives(
    function: Callable[..., Tensor], inputs: list[Tensor]
) -> tuple[Tensor, ...]:
    """Return the value, the gradient and the gradient of a projection of the gradient."""

    def projected(tensor: Tensor) -> Tensor:
        numbers = torch.arange(tensor.numel(), device=tensor.device, dtype=tensor.dtype)
        return (tensor * (0.7 * numbers + 0.3).cos().view_as(tensor)).sum()

    value = function(*inputs)
    first = torch.autograd.grad(projected(value), inputs, create_graph=True)
    second = torch.autograd.grad(
        torch.stack([projected(gradient) for gradient in first]).sum(), inputs
    )
    return (value, *first, *second)


def assert_equal_to_reference(
    name: str, function: Callable[..., Tensor], inputs: list[Tensor], tolerance: float
) -> None:
    with use_backend("reference"):
        expected = value_and_derivatives(function, inputs)
    with use_backend(name):
        found = value_and_derivatives(function, inputs)
    for ours, theirs in zip(expected, found, strict=True):
        assert theirs.shape == ours.shape
        assert (theirs - ours).abs().max() <= tolerance * ours.abs().max()


def convolve(mode: Mode, output: str, *, n_atoms: int = 6) -> Callable[..., Tensor]:
    edge_index = torch.tensor([[0, 1, 4, 2, 0, 3, 3], [5, 0, 0, 2, 1, 1, 4]])

    def function(x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
        edges = edge_index.to(x.device)
        return cg_conv(x, y, weights, edges, n_atoms, PATHS, mode=mode, output=output)

    return function


@on_any_device
@pytest.mark.parametrize("output", ["sum", "paths"])
@pytest.mark.parametrize("mode_weights", MODES_AND_WEIGHTS, ids=" ".join)
def test_convolution_equals_the_reference(
    name: str, mode_weights: tuple[Mode, str], output: str
) -> None:
    mode, weights = mode_weights
    inputs = operands(mode, weights=weights)
    assert_equal_to_reference(name, convolve(mode, output), inputs, EXACT)


@on_any_device
@pytest.mark.parametrize("mode", list(CHANNELS))
def test_product_of_a_batch_equals_the_reference(name: str, mode: Mode) -> None:
    x, y, weights = operands(mode, weights="per edge")
    batch = [t.detach()[:4].unflatten(0, (2, 2)).requires_grad_() for t in (x, y, weights)]

    def multiply(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        return tensor_product(x, y, weights, PATHS, mode=mode)

    assert_equal_to_reference(name, multiply, batch, EXACT)


@on_any_device
@pytest.mark.parametrize("normalization", ["component", "integral", "norm"])
def test_harmonics_equal_the_reference(name: str, normalization: str) -> None:
    vectors = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)

    def evaluate(vectors: Tensor) -> Tensor:
        return spherical_harmonics(vectors, 3, normalize=False, normalization=normalization)

    assert_equal_to_reference(name, evaluate, [vectors], EXACT)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuequivariance", "openequivariance"])
@pytest.mark.parametrize("weights", ["per edge", "shared"])
@pytest.mark.parametrize("output", ["sum", "paths"])
def test_kernels_equal_the_reference_on_cuda(name: str, weights: str, output: str) -> None:
    inputs = operands("uvu", weights=weights, dtype=torch.float32, device="cuda")
    reason = refusal(name, spec(device=torch.device("cuda")))
    if reason is not None:
        pytest.skip(reason)
    assert_equal_to_reference(name, convolve("uvu", output), inputs, GPU_SINGLE)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_operation_is_served_or_refused(name: str, op: str, pretend_installed: None) -> None:
    """No method is half there: what the adapter has not, it refuses in every form."""
    backend = load_backend(name, OPERATIONS[op].family)
    device = torch.device("cuda" if name == "openequivariance" else "cpu")
    assert hasattr(backend, op) == (refusal(name, spec(op, device=device)) is None)


@pytest.fixture
def pretend_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the adapters believe that their libraries are there, so that they look further."""
    for module in (cuequivariance, openequivariance):
        monkeypatch.setattr(module, "find_spec", lambda name: object())
    package = types.ModuleType("openequivariance")
    package.BUILT_EXTENSION = True
    package.TPProblem, package.TensorProductConv = StandInProblem, StandInConvolution
    monkeypatch.setitem(sys.modules, "openequivariance", package)
    yield
    openequivariance._convolution.cache_clear()


@pytest.mark.parametrize("name", ["cuequivariance", "openequivariance"])
def test_library_that_is_absent_is_named_with_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[f"atomeq.ops.coupling.{name}"]
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    dispatch._remembered.cache_clear()  # it would know the machine as it was
    x, y, weights = operands("uvu", weights="per edge")
    with (
        use_backend(name),
        pytest.raises(NotImplementedError, match=rf"pip install atomeq\[{name}\]"),
    ):
        convolve("uvu", "sum")(x, y, weights)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("e3nn", {"lmax": 12}, "ends at degree 11"),
        ("cuequivariance", {"dtype": torch.bfloat16}, "float32 and float64"),
        ("cuequivariance", {"op": "spherical_harmonics", "lmax": 6}, "from degree 6 on"),
        ("cuequivariance", {"device": torch.device("mps")}, "on mps"),
        ("cuequivariance", {"device": torch.device("cuda"), "mode": "uvw"}, "mode uvw"),
        ("cuequivariance", {"n_edges": 0}, "nothing"),
        ("openequivariance", {}, "runs on cuda, the call is on cpu"),
        ("openequivariance", {"device": torch.device("cuda"), "mode": "uvw"}, "has uvw"),
        ("openequivariance", {"device": torch.device("cuda"), "weighted": False}, "have weights"),
        ("openequivariance", {"device": torch.device("cuda"), "dtype": torch.bfloat16}, "bfloat16"),
        ("openequivariance", {"device": torch.device("cuda"), "n_edges": 0}, "nothing"),
    ],
)
def test_refusal_says_why(name: str, changes: dict, reason: str, pretend_installed: None) -> None:
    assert reason in (refusal(name, spec(**changes)) or "")


@pytest.mark.parametrize("name", ["cuequivariance", "openequivariance"])
def test_repeatable_sums_are_refused_where_nobody_promises_them(
    name: str, pretend_installed: None
) -> None:
    on_cuda = spec(device=torch.device("cuda"))
    assert refusal(name, on_cuda) is None
    torch.use_deterministic_algorithms(True)
    try:
        assert "repeatable" in (refusal(name, on_cuda) or "")
    finally:
        torch.use_deterministic_algorithms(False)


def test_extension_that_was_not_built_is_reported(
    pretend_installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["openequivariance"], "BUILT_EXTENSION", False)
    monkeypatch.setattr(
        sys.modules["openequivariance"], "BUILT_EXTENSION_ERROR", "no g++", raising=False
    )
    reason = refusal("openequivariance", spec(device=torch.device("cuda")))
    assert reason == "its extension was not built: no g++"


class StandInProblem:
    """What OpenEquivariance documents of its problems: the arguments of e3nn's product."""

    def __init__(self, irreps1, irreps2, irreps_out, instructions, **options) -> None:
        from e3nn import o3

        assert options.pop("layout") == "ir_mul"
        self.dtype = torch.from_numpy(options.pop("irrep_dtype")([0])).dtype
        del options["weight_dtype"]
        self.product = o3.TensorProduct(irreps1, irreps2, irreps_out, instructions, **options)


class StandInConvolution:
    """What OpenEquivariance documents of its convolution, by e3nn, for tests without a GPU."""

    def __init__(self, problem: StandInProblem, *, deterministic: bool) -> None:
        self.product = problem.product.to(problem.dtype)

    def __call__(self, x: Tensor, y: Tensor, w: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        assert all(tensor.is_contiguous() and tensor.ndim == 2 for tensor in (x, y, w))
        channels = self.product.irreps_in1[0].mul
        rows1 = x.unflatten(1, (-1, channels))
        messages = self.product(to_mul_ir(rows1)[cols], y, w)
        degrees = [block.ir.l for block in self.product.irreps_out]
        out = from_mul_ir(messages, degrees, channels).flatten(1)
        return out.new_zeros(len(x), out.shape[1]).index_add(0, rows, out)


@pytest.mark.parametrize("weights", ["per edge", "shared"])
@pytest.mark.parametrize("output", ["sum", "paths"])
@pytest.mark.parametrize("n_atoms", [4, 5, 6])
def test_arguments_for_openequivariance_say_the_same_product(
    n_atoms: int, output: str, weights: str, pretend_installed: None
) -> None:
    """Its kernels need a GPU; what is handed to them, and what comes back, can be tested here."""
    x, y, w = (tensor.detach() for tensor in operands("uvu", weights=weights))
    edge_index = torch.tensor([[0, 1, 4, 2, 0, 3, 3], [3, 0, 0, 2, 1, 1, n_atoms - 1]])
    expected = cg_conv(x, y, w, edge_index, n_atoms, PATHS, output=output)
    form = {"mode": "uvu", "output": output, "radial_map": None}
    found = openequivariance.cg_conv(x, y, w, edge_index, n_atoms, PATHS, **form)
    single = 1e-6  # e3nn's 3j symbols are made in float32 here
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= single * expected.abs().max()


def test_adapters_import_no_library_before_it_is_asked_for() -> None:
    command = (
        "import sys; from atomeq.ops.dispatch import BACKENDS, load_backend\n"
        "for name in set(BACKENDS) - {'reference', 'triton'}: load_backend(name, 'coupling')\n"
        "heavy = {'e3nn', 'cuequivariance', 'cuequivariance_torch', 'openequivariance'}\n"
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", command], check=False, capture_output=True)
    assert result.returncode == 0, result.stderr


def test_no_adapter_serves_unasked() -> None:
    assert not set(ADAPTERS) & set(dispatch.AUTO_ORDER)
