"""The C kernels of spherical harmonics write their results and not a number more."""

from types import SimpleNamespace

import pytest
import torch

from atomeq.ops.c_compiler import unavailable
from atomeq.ops.harmonics.cpu import kernels

_GUARD = -12345.0


@pytest.mark.skipif(unavailable() is not None, reason=f"no C kernels: {unavailable()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lmax", [0, 1, 2, 3, 4, 6])
def test_nothing_behind_the_results_is_written(dtype, lmax, monkeypatch):
    # Memory is asked for through these two: what the kernels get is the front of a larger block.
    blocks = []

    def guarded(*size, like):
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        n = torch.Size(shape).numel()
        block = torch.full((n + 64,), _GUARD, dtype=like.dtype)
        blocks.append((block, n))
        return block[:n].view(shape)

    monkeypatch.setattr(torch, "empty_like", lambda t, **_: guarded(*t.shape, like=t))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *size, **_: guarded(*size, like=t))
    for n in (7, 8, 15, 16, 32, 208):
        vectors, g, h = (torch.randn(n, size, dtype=dtype) for size in (3, (lmax + 1) ** 2, 3))
        call = SimpleNamespace(vectors=vectors, g=g, h=h, lmax=lmax, normalize=True)
        call.normalization = "component"
        kernels.harmonics(call)
        kernels.harmonics_slope(call)
        kernels.harmonics_second(call)
    assert len(blocks) >= 4 * 6
    assert all(bool((block[n:] == _GUARD).all()) for block, n in blocks)
