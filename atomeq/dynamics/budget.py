"""How many edges may be computed at once: memory is spent on edges, whatever the model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# On a core a larger batch is no faster, for what it spares of overhead is a percent; half of it is
# slower by a tenth, for small networks.
_CPU_EDGES = 16_000
_FIRST_CUDA_EDGES = 20_000  # small enough for any model, large enough to measure bytes per edge
_HEADROOM = 0.8
_SMOOTHING = 0.3


class EdgeBudget:
    """A limit on the edges of a batch.

    What the user sets is never exceeded. Otherwise the limit is a default on the CPU, and on CUDA
    follows from the bytes per edge that evaluations needed, averaged exponentially, and the memory
    that is free. Either is halved when memory ran out.

    Args:
        device: Where the potential computes.
        max_edges: Set by the user; None for the default of the device.

    Raises:
        ValueError: The limit is not positive.
    """

    def __init__(self, device: torch.device, max_edges: int | None = None) -> None:
        if max_edges is not None and max_edges < 1:
            raise ValueError(f"max_edges must be at least 1, not {max_edges!r}")
        self.device = device
        self.is_strict = max_edges is not None
        default = _FIRST_CUDA_EDGES if device.type == "cuda" else _CPU_EDGES
        self.limit = max_edges if max_edges is not None else default
        self._ceiling: int | None = None
        self._bytes_per_edge: float | None = None
        self._before = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure what a step needs; :meth:`learn` takes it up."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        yield

    def learn(self, n_edges: int) -> None:
        """Take up what the last step over so many edges needed."""
        if self.device.type != "cuda" or self.is_strict or n_edges == 0:
            return
        used = torch.cuda.max_memory_allocated(self.device) - self._before
        new, old = used / n_edges, self._bytes_per_edge
        average = new if old is None else old + _SMOOTHING * (new - old)
        self._bytes_per_edge = average
        reserved = torch.cuda.memory_reserved(self.device)
        idle = reserved - torch.cuda.memory_allocated(self.device)
        available = _HEADROOM * (torch.cuda.mem_get_info(self.device)[0] + idle)
        limit = int(available / max(average, 1.0))
        self.limit = min(limit, self._ceiling or limit)

    def halve(self, n_edges: int) -> None:
        """Note that memory ran out with so many edges."""
        self.limit = self._ceiling = max(1, n_edges // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on CUDA or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
