"""How the kernels of this folder are started: sizes of tiles, precision, device.

No tile is tuned at run time: another tile would sum in another order, and a result would change
from one process to the next. The sizes are functions of the shapes alone and are written here.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Fixed when the kernels are decorated, which is when their modules are imported.
INTERPRETING: bool = triton.knobs.runtime.interpret

_REGISTER_TILE = 8192  # accumulators of one program: 64 per thread with 4 warps
_WIDEST = 128  # channels of one program


def launch(
    kernel: Any, grid: tuple[int, ...], *tensors: Tensor | None, like: Tensor, **constants: Any
) -> None:
    """Start a kernel on the device of ``like``; a grid without programs starts nothing."""
    if 0 in grid:
        return
    # Triton starts kernels on the current device, wherever the tensors are.
    with torch.cuda.device_of(like):
        kernel[grid](*tensors, **constants)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype of sums: double for double, else single."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def channel_tile(channels: int) -> int:
    """Return the channels of one program: a power of 2 that is not mostly padding."""
    return min(_WIDEST, triton.next_power_of_2(channels))


def edge_tile(rows: int, channels: int, share: int = 1) -> int:
    """Return the edges of one program that holds ``rows`` (a power of 2) of each.

    Args:
        rows: Rows of the largest accumulator.
        channels: Channels of the tile.
        share: How many such accumulators the program holds at a time.
    """
    return max(1, min(32, _REGISTER_TILE // (rows * channels * share)))


def slots(lmax: int, mmax: int) -> tuple[int, ...]:
    """Return for each degree the padded number of orders +-m, m <= mmax, both signs of 0 too."""
    return tuple(triton.next_power_of_2(2 * (min(l, mmax) + 1)) for l in range(lmax + 1))


def orders(lmax: int, mmax: int) -> tuple[int, ...]:
    """Return for each degree the padded number of orders m = 0 ... mmax."""
    return tuple(triton.next_power_of_2(min(l, mmax) + 1) for l in range(lmax + 1))


def degrees(lmax: int) -> tuple[int, ...]:
    """Return for each degree the padded number of its coefficients."""
    return tuple(triton.next_power_of_2(2 * l + 1) for l in range(lmax + 1))


def contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor in the order of its axes, which every kernel here assumes."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


Grid = Callable[[dict[str, Any]], tuple[int, ...]]
