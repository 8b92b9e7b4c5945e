"""Normalisations commute with rotations and forget the scale of their input."""

import math

import pytest
import torch
from scipy.spatial.transform import Rotation

from atomeq.nn.norms import equivariant_norm
from atomeq.ops.edge.wigner import block_diagonal, wigner_from_matrix

NAMES = ["layer_norm", "layer_norm_sh", "rms_norm_sh", "bare_rms_norm_sh"]
LMAX, CHANNELS = 3, 5


@pytest.fixture(params=NAMES)
def norm(request) -> torch.nn.Module:
    norm = equivariant_norm(request.param, LMAX, CHANNELS).double()
    for parameter in norm.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return norm


def features() -> torch.Tensor:
    return torch.randn(4, (LMAX + 1) ** 2, CHANNELS, dtype=torch.float64)


def test_commutes_with_rotations(norm):
    x = features()
    matrix = torch.from_numpy(Rotation.from_rotvec([0.3, -1.0, 0.6]).as_matrix())
    wigner = block_diagonal(wigner_from_matrix(matrix, LMAX))
    torch.testing.assert_close(norm(wigner @ x), wigner @ norm(x))


@pytest.mark.parametrize("name", NAMES)
def test_output_has_unit_scale(name):
    norm = equivariant_norm(name, LMAX, CHANNELS).double()
    y = norm(1e3 * features()).detach()
    torch.testing.assert_close(norm(y).detach(), y, rtol=1e-3, atol=1e-3)
    degrees = [y[:, l * l : (l + 1) ** 2].square().mean(dim=(1, 2)) for l in range(LMAX + 1)]
    assert float(torch.stack(degrees).mean()) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_scalars_alone_are_allowed(name):
    norm = equivariant_norm(name, 0, CHANNELS)
    assert math.isfinite(float(norm(torch.zeros(2, 1, CHANNELS)).detach().sum()))


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'batch_norm' is unknown.*rms_norm_sh"):
        equivariant_norm("batch_norm", 1, 1)
