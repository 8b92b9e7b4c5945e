"""Work on many alike in blocks that fit into a processor core's own cache.

What is larger than the cache is written to memory and read again between two operations, which on a
CPU takes longer than the arithmetic. A GPU wants everything at once, within its memory.
"""

from collections.abc import Iterator

import torch

_CPU_BLOCK = 2**18  # numbers: 1 MB in float32
_GPU_BLOCK = 2**28


def blocks(n: int, numbers_each: int, device: torch.device) -> Iterator[slice]:
    """Cut ``n`` things of so many numbers each into blocks.

    Args:
        n: How many.
        numbers_each: Size of what is made for each on the way.
        device: Where.

    Yields:
        Slices that cover 0..n in order.
    """
    if isinstance(n, torch.SymInt):  # a trace for every size can not tell how many blocks it takes
        yield slice(0, n)
        return
    size = _CPU_BLOCK if device.type == "cpu" else _GPU_BLOCK
    step = max(1, size // max(1, numbers_each))
    for start in range(0, n, step):
        yield slice(start, start + step)
