"""Memory of what comes and goes with a block of edges, used again by the next block."""

import math
import sys
import threading

import numpy as np
import torch
from torch import Tensor

_LEAST = 2**17  # bytes; the C library keeps what is smaller itself
_MOST = 2**26  # bytes of a thread that may lie idle
_EXCESS = 4  # times what is wanted may be given
_PAGE, _LINE = 4096, 64  # bytes
_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


class _Buffers(threading.local):
    """The buffers of one thread, in use and idle ones.

    Rows of some hundred edges are megabytes, which the C library hands back to the system when they
    are freed: an edge layer would spend an eighth of its time on fresh pages. Here they are kept.
    """

    def __init__(self) -> None:
        self.every: list[np.ndarray] = []

    def take(self, n_bytes: int) -> np.ndarray:
        """Return the smallest idle buffer that is large enough, not much larger, or a new one."""
        references = _references(self.every)
        idle = [b for b, n in zip(self.every, references, strict=True) if n == _UNUSED]
        fitting = [buffer for buffer in idle if n_bytes <= buffer.nbytes <= _EXCESS * n_bytes]
        if fitting:
            return min(fitting, key=lambda buffer: buffer.nbytes)
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


def empty(size: tuple[int, ...], like: Tensor, *, passing: bool = False) -> Tensor:
    """Return an uninitialised CPU tensor of a dtype, whose memory is used again when it is freed.

    What is only passing, from one kernel to the next, is like any other here.
    """
    n_bytes = math.prod(size) * like.dtype.itemsize
    if n_bytes < _LEAST:
        return like.new_empty(size)
    buffer = _buffers.take(n_bytes + _LINE)
    start = -buffer.ctypes.data % _LINE
    # The tensor and its views refer to this slice: without the last the buffer is idle.
    part = buffer[start : start + n_bytes].view(_DTYPES[like.dtype])
    return torch.from_numpy(part.reshape(size))
