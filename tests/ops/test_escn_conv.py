import pytest
from edge_layers import EdgeLayer, relative

from atomeq.ops.backends.cpu import native_edge

EXACT = 1e-12  # float64 rounding through second derivatives


@pytest.fixture(params=["C", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with the C kernels, and as on a machine without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(native_edge, "available", lambda: False)


@pytest.mark.usefixtures("kernels")
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
    layer = EdgeLayer(lmax, mmax, chiral=chiral, radial=radial)
    found = layer.derivatives("cpu", recompute=recompute)
    expected = layer.derivatives("reference")
    errors = {name: relative(found[name], expected[name]) for name in expected}
    assert max(errors.values()) <= EXACT, errors
