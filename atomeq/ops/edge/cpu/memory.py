"""Memory of a block's rows that the next block uses again.

Rows of some hundred edges are megabytes, which the C library hands back to the system when they are
freed: an edge layer would spend an eighth of its time on fresh pages. Here they are kept.
"""

import math
import sys
import threading

import numpy as np
import torch
from torch import Tensor

_LEAST = 2**17  # bytes; the C library keeps what is smaller itself
_MOST = 2**26  # bytes of a thread that may lie idle
_PAGE, _LINE = 4096, 64  # bytes
_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


class _Buffers(threading.local):
    """The buffers of one thread, in use and idle ones."""

    def __init__(self) -> None:
        self.every: list[np.ndarray] = []

    def take(self, n_bytes: int) -> np.ndarray:
        """Return an idle buffer that is large enough and not twice too large, else a new one."""
        references = _references(self.every)
        idle = [b for b, n in zip(self.every, references, strict=True) if n == _UNUSED]
        for buffer in idle:
            if n_bytes <= buffer.nbytes <= 2 * n_bytes:
                return buffer
        excess = sum(buffer.nbytes for buffer in idle) + n_bytes - _MOST
        while idle and excess > 0:
            dropped = idle.pop(0)
            excess -= dropped.nbytes
            self.every = [buffer for buffer in self.every if buffer is not dropped]
        self.every.append(np.empty(math.ceil(n_bytes / _PAGE) * _PAGE, np.uint8))
        return self.every[-1]


def _references(buffers: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(buffer) for buffer in buffers]


_UNUSED = _references([np.empty(0)])[0]  # what the count is of one that only its list refers to
_buffers = _Buffers()


def empty(size: tuple[int, ...], like: Tensor) -> Tensor:
    """Return an uninitialised tensor on the CPU, whose memory is used again when it is freed.

    Args:
        size: Its shape.
        like: A tensor of the same dtype.
    """
    n_bytes = math.prod(size) * like.dtype.itemsize
    if n_bytes < _LEAST:
        return like.new_empty(size)
    buffer = _buffers.take(n_bytes + _LINE)
    start = -buffer.ctypes.data % _LINE
    # The tensor refers to this slice, and so does every view of the tensor: the buffer is idle
    # when the last of them is gone.
    part = buffer[start : start + n_bytes].view(_DTYPES[like.dtype])
    return torch.from_numpy(part.reshape(size))
