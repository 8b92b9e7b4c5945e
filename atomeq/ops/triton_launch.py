"""How the kernels of this folder are started: sizes of tiles, precision, device.

No tile is tuned at run time: another tile would sum in another order, and a result would change
from one process to the next. The sizes are functions of the shapes and of the generation of the
device, and are written here.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

from atomeq.ops.precision import matmul_precision
from atomeq.ops.specification import OpSpec

# Fixed when the kernels are decorated, which is when their modules are imported.
INTERPRETING: bool = knobs.runtime.interpret

_REGISTER_TILE = 8192  # accumulators of one program: 64 per thread with 4 warps
_WIDEST = 128  # channels of one program
_CHANNEL_STEP = 16  # whole lines of memory, and the smallest side of a tensor-core product
HIGHEST_DEGREE = 6
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


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


def power_of_2(size: int) -> int:
    """Return the least power of 2 that is not below ``size``: the sides of every tile."""
    return 1 << (size - 1).bit_length()


def ceil_div(size: int, step: int) -> int:
    """Return how many tiles of ``step`` cover ``size``."""
    return -(-size // step)


def channel_tile(channels: int) -> int:
    """Return the channels of one program: a power of 2 that is not mostly padding."""
    return min(_WIDEST, power_of_2(channels))


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
    return tuple(power_of_2(2 * (min(l, mmax) + 1)) for l in range(lmax + 1))


def degrees(lmax: int) -> tuple[int, ...]:
    """Return for each degree the padded number of its coefficients."""
    return tuple(power_of_2(2 * l + 1) for l in range(lmax + 1))


def architecture(like: Tensor) -> int:
    """Return the generation of the device of a tensor, 80 for sm_80; an interpreter is of 90."""
    if not like.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(like.device)
    return 10 * major + minor


def contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor in the order of its axes, which every kernel here assumes."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def product_precision(dtype: torch.dtype) -> str:
    """Return how the tensor cores multiply at the precision that holds here.

    Three TF32 products make one as accurate as single precision, which tensor cores do not have.
    """
    if dtype != torch.float32 or INTERPRETING:
        return "ieee"
    return "tf32x3" if matmul_precision() == "highest" else "tf32"


def refusal(spec: OpSpec, *, any_channels: bool = False) -> str | None:
    """Return why these kernels do not serve a call, or None.

    Args:
        spec: The call.
        any_channels: Whether the number of channels need be no multiple of anything.
    """
    if spec.device.type != "cuda" and not INTERPRETING:
        return (
            f"Triton's kernels need CUDA, but the tensors are on {spec.device} "
            f"(CUDA is {'' if torch.cuda.is_available() else 'not '}available here); "
            f"TRITON_INTERPRET=1 runs them on a CPU, for tests"
        )
    if spec.dtype not in DTYPES:
        return f"it has {', '.join(map(str, DTYPES))}, not {spec.dtype}"
    if spec.lmax > HIGHEST_DEGREE:
        return f"lmax is {spec.lmax}; its kernels were made and tested up to {HIGHEST_DEGREE}"
    if spec.channels % _CHANNEL_STEP and not any_channels:
        return f"{spec.channels} channels are no multiple of {_CHANNEL_STEP}"
    return None
