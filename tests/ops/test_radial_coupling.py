"""The convolution that makes its weights itself, some edges at a time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from atomeq.ops.coupling import radial as radial_coupling
from atomeq.ops.coupling.clebsch_gordan import form_of
from atomeq.ops.coupling.operations import cg_conv
from atomeq.ops.coupling.radial import cg_radial_partials
from atomeq.ops.dispatch import use_backend
from atomeq.ops.paths import Path
from atomeq.ops.specification import Mode

EXACT = 1e-12  # float64 rounding
EDGES = torch.tensor([[0, 1, 2, 1, 0], [2, 0, 0, 2, 2]])
PATHS = [Path(0, 1, 1), Path(1, 1, 0), Path(1, 0, 1)]
AXES: dict[Mode, tuple[int, ...]] = {"uvu": (2,), "uuu": (2,), "uvw": (2, 1, 3)}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def operands(mode: Mode) -> list[Tensor]:
    """Features, harmonics or features of edges, radial values, weight and bias of the layer."""
    channels2 = {"uvu": (), "uuu": (2,), "uvw": (1,)}[mode]
    axes = (len(PATHS), *AXES[mode])
    return [
        random(4, 4, 2),
        random(5, 4, *channels2),
        random(5, 3),
        random(*axes, 3),
        random(*axes),
    ]


def convolve(mode: Mode, backend: str) -> Callable[..., Tensor]:
    def function(
        x: Tensor, y: Tensor, radial: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        with use_backend(backend):
            return cg_conv(x, y, radial, EDGES, 4, PATHS, mode=mode, radial_map=(weight, bias))

    return function


@pytest.fixture(params=["whole", "in parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take all edges at once, or two at a time: the last part is then a single edge."""
    if request.param == "in parts":
        monkeypatch.setattr(radial_coupling, "_AT_ONCE", {"cpu": 2 * 3 * 2, "cuda": 12})


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("biased", [True, False])
def test_weights_made_inside_are_those_made_before(biased: bool) -> None:
    for mode in AXES:
        inputs = operands(mode)[: 5 if biased else 4]
        results = []
        for backend in ("cpu", "reference"):
            out = convolve(mode, backend)(*inputs)
            energy = out.square().sum() + out.sin().sum()
            first = torch.autograd.grad(energy, inputs, create_graph=True)
            loss = torch.stack([g.square().sum() for g in first]).sum()
            results.append([out, *first, *torch.autograd.grad(loss, inputs)])
        for one, other in zip(*results, strict=True):
            assert (one - other).abs().max() <= EXACT * other.abs().max()


@pytest.mark.usefixtures("parts")
def test_derivatives_are_right_to_the_second_order() -> None:
    assert torch.autograd.gradcheck(convolve("uvu", "cpu"), operands("uvu"))
    assert torch.autograd.gradgradcheck(convolve("uvu", "cpu"), operands("uvu"))


def test_operation_keeps_the_rules_of_torch() -> None:
    x, y, radial, weight, bias = operands("uvu")
    edges = [EDGES[0].contiguous(), EDGES[1].contiguous()]
    code = form_of(PATHS, "uvu", "sum").code
    for given in ((radial, weight, bias), (radial, weight, None), (None, None, bias)):
        names = ["x", "y"] + [
            name
            for name, t in zip(("radial", "weight", "bias"), given, strict=True)
            if t is not None
        ]
        z = random(4, 4, 2)
        layer = [part for part in given[1:] if part is not None]
        arguments = (x, y, given[0], layer, z, edges, 4, " ".join(names), code, "cpu")
        torch.library.opcheck(cg_radial_partials, arguments)


def test_nothing_as_large_as_the_weights_is_kept() -> None:
    n_edges, channels = 300, 32
    edges = torch.randint(0, 10, (2, n_edges))
    x, y, radial = random(10, 4, channels), random(n_edges, 4), random(n_edges, 8)
    weight = random(len(PATHS), channels, 8)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), use_backend("cpu"):
        cg_conv(x, y, radial, edges, 10, PATHS, radial_map=(weight, None))
    own = sum(tensor.numel() for tensor in (x, y, radial, weight)) + 4 * n_edges
    assert 0 < sum(kept.values()) <= own < n_edges * len(PATHS) * channels


def test_no_edge_gives_zeros_and_gradients() -> None:
    x, _, _, weight, bias = operands("uvu")
    y, radial = random(0, 4), random(0, 3)
    inputs = [x, y, radial, weight, bias]
    with use_backend("cpu"):
        out = cg_conv(x, y, radial, EDGES[:, :0], 4, PATHS, radial_map=(weight, bias))
    assert out.shape == (4, 4, 2)
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert not any(tensor.any() for tensor in (out, *gradients))


def test_layer_that_does_not_fit_is_refused() -> None:
    x, y, radial, weight, bias = operands("uvu")
    with pytest.raises(ValueError, match=r"weights are \(5, 2\); radial_map reads \(5, 3\)"):
        cg_conv(x, y, radial[:, :2], EDGES, 4, PATHS, radial_map=(weight, bias))
    with pytest.raises(ValueError, match=r"the bias is \(2, 2\), the weight \(3, 2, 3\)"):
        cg_conv(x, y, radial, EDGES, 4, PATHS, radial_map=(weight, bias[:2]))
    with pytest.raises(ValueError, match="mode uvu with 3 paths needs"):
        cg_conv(x, y, radial, EDGES, 4, PATHS, radial_map=(weight[:2], None))
