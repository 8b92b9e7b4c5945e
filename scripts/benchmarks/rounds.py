"""How implementations of one operation are timed side by side, with their errors and memory.

The implementations of a case take turns, one call each a round, so that whatever slows the machine
slows them all; a ratio is the median over rounds of the paired times. operation_cases.py makes the
cases.
"""

import dataclasses
import functools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from atomeq.ops.dispatch import use_backend

PHASES = ("forward", "forward_backward", "double_backward")


@dataclasses.dataclass
class Implementation:
    """One way to compute a case, with the layout it would choose for itself.

    ``prepare`` and ``restore`` change from and to our layout; they are outside the timing.
    """

    name: str
    compute: Callable[..., Tensor]
    prepare: Callable[..., list[Tensor]] = lambda *inputs: list(inputs)
    restore: Callable[[Tensor], Tensor] = lambda out: out
    phases: tuple[str, ...] = PHASES

    def whole(self, *inputs: Tensor) -> Tensor:
        """Compute in our layout, for the errors."""
        return self.restore(self.compute(*self.prepare(*inputs)))


@dataclasses.dataclass
class Case:
    """The same numbers for every implementation; the first one is compared with the others."""

    op: str
    lmax: int
    channels: int
    n_edges: int
    dtype: torch.dtype
    inputs: list[Tensor]
    implementations: list[Implementation]
    truth: Callable[..., Tensor] | None = None
    error: Callable[[Tensor], float] | None = None


def measure(case: Case, small: Case, seconds: float) -> Iterator[dict]:
    """Yield one row per implementation; errors are those of a small case, as float64 is big."""
    expected = None
    if small.truth is not None:
        with use_backend("reference"):
            expected = derivatives(small.truth, [tensor.double() for tensor in small.inputs])
    rows = {}
    for implementation, checked in zip(case.implementations, small.implementations, strict=True):
        row = {
            "op": case.op,
            "lmax": case.lmax,
            "channels": case.channels,
            "n_edges": case.n_edges,
            "dtype": str(case.dtype).removeprefix("torch."),
            "implementation": implementation.name,
        }
        rows[implementation.name] = row
        try:
            row["errors"] = errors(small, checked, expected)
            row["saved_bytes_per_edge"] = saved_bytes(case, implementation) / case.n_edges
            row["differing_runs"] = differing_runs(case, implementation)
        except (RuntimeError, NotImplementedError, ValueError) as problem:  # memory included
            row["failed"] = str(problem).splitlines()[0]
    for phase in PHASES:
        running = [
            implementation
            for implementation in case.implementations
            if phase in implementation.phases and "failed" not in rows[implementation.name]
        ]
        for name, times in rounds(case, running, phase, seconds).items():
            rows[name].setdefault("seconds", {})[phase] = statistics.median(times)
            rows[name].setdefault("rounds", {})[phase] = len(times)
            rows[name].setdefault("_times", {})[phase] = times
    first = rows[case.implementations[0].name]
    for row in rows.values():
        row["ratio"] = {
            phase: statistics.median(
                theirs / ours for theirs, ours in zip(times, first["_times"][phase], strict=True)
            )
            for phase, times in row.get("_times", {}).items()
            if phase in first.get("_times", {})
        }
    for row in rows.values():
        row.pop("_times", None)
        yield row


def rounds(
    case: Case, implementations: list[Implementation], phase: str, seconds: float
) -> dict[str, list[float]]:
    """Let the implementations take turns until the time is up, at least three rounds."""
    calls = {}
    for implementation in implementations:
        inputs = [t.detach() for t in implementation.prepare(*case.inputs)]
        calls[implementation.name] = phase_of(implementation.compute, inputs, phase)
    timer = cuda_seconds if case.inputs[0].is_cuda else cpu_seconds
    for name, call in list(calls.items()):
        try:
            call()  # tables, buffers, compilation
            timer(call)
        except RuntimeError as problem:  # out of memory, or no second gradient of a compiled graph
            print(f"{case.op} L={case.lmax} {name} {phase}: {str(problem).splitlines()[0][:100]}")
            del calls[name]
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)  # nobody always runs in the cache that the same other has left
    begin = time.process_time()
    while calls and (len(next(iter(times.values()))) < 3 or time.process_time() - begin < seconds):
        for name in order.sample(list(calls), len(calls)):
            times[name].append(timer(calls[name]))
        if len(next(iter(times.values()))) >= 200:
            break
    return times


def phase_of(
    compute: Callable[..., Tensor], inputs: Sequence[Tensor], phase: str
) -> Callable[[], object]:
    """Return the call to be timed; its leaves are new each time, as in training."""

    def forward() -> object:
        with torch.no_grad():
            return compute(*inputs)

    def backward() -> object:
        leaves = [tensor.requires_grad_() for tensor in map(Tensor.detach, inputs)]
        return torch.autograd.grad(compute(*leaves).sum(), leaves)

    return {
        "forward": forward,
        "forward_backward": backward,
        "double_backward": lambda: derivatives(compute, inputs),
    }[phase]


def derivatives(
    compute: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the value, the gradient and the gradient of a sum over the gradient, each flat.

    This is a step of force training: the gradient is made with a graph, a loss of it is
    differentiated with respect to everything.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = compute(*leaves)
    energy = (value * probe(value.numel(), value.dtype, value.device).view_as(value)).sum()
    first = torch.autograd.grad(energy, leaves, create_graph=True)
    loss = torch.stack([gradient.square().sum() for gradient in first]).sum()
    second = torch.autograd.grad(loss, leaves)
    flat = [torch.cat([tensor.detach().flatten() for tensor in level]) for level in (first, second)]
    return value.detach().flatten(), flat[0], flat[1]


@functools.cache
def probe(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return fixed weights of a sum: a plain sum of squares of harmonics would be constant."""
    return torch.linspace(-1, 1, n, dtype=dtype, device=device)


def errors(
    case: Case, implementation: Implementation, expected: tuple[Tensor, ...] | None
) -> list[float]:
    """Return the relative errors of the value and, where there are derivatives, of both."""
    if case.error is not None:
        with torch.no_grad():
            return [case.error(implementation.whole(*case.inputs))]
    assert expected is not None, "a case has a truth or an error of its own"
    found = derivatives(implementation.whole, case.inputs)
    return [
        ((ours.double() - true).abs().max() / true.abs().max()).item()
        for ours, true in zip(found, expected, strict=True)
    ]


def saved_bytes(case: Case, implementation: Implementation) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, inputs not counted."""
    if "forward_backward" not in implementation.phases:
        return 0
    leaves = [t.detach().requires_grad_() for t in implementation.prepare(*case.inputs)]
    own = {tensor.untyped_storage().data_ptr() for tensor in leaves}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = implementation.compute(*leaves)
    del out
    return sum(size for pointer, size in kept.items() if pointer not in own)


def differing_runs(case: Case, implementation: Implementation) -> int:
    """Return how many of three further runs differ from the first in any bit."""
    inputs = [tensor.detach() for tensor in implementation.prepare(*case.inputs)]
    with torch.no_grad():
        first = implementation.compute(*inputs)
        return sum(not torch.equal(first, implementation.compute(*inputs)) for _ in range(3))


def cpu_seconds(call: Callable[[], object]) -> float:
    """Return the CPU time of a call."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def cuda_seconds(call: Callable[[], object]) -> float:
    """Return the time between two events around a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000
