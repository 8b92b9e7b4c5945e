"""Engines: who computes the candidates. All take a stream and give a stream, with the same rows.

Only the process that reads the sources writes results; workers hold the potential and nothing else.
"""

import copy
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from atomeq.ops.precision import checked_precision
from atomeq.potential.checkpoint import load_potential, resolve_device
from atomeq.potential.potential import Potential
from atomeq.screening.compute import Candidate, Computation
from atomeq.screening.references import HullReferences
from atomeq.screening.rows import Row
from atomeq.screening.steps import Committee, Properties, parse_steps
from atomeq.typing import Precision

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Job:
    """What a worker needs to build its computation; it can be sent to another process.

    Attributes:
        potential: Name, folder, or the potential itself.
        steps: As plain values.
        device: Where to compute; ``cuda`` is spread over the GPUs there are.
        dtype: ``float32``, ``float64`` or None for the potential's own.
        max_edges: Edges computed at once.
        precision: Of tensor products on a GPU, or None for the potential's own.
        ignore: ``charge``, ``spin``: left out where the potential knows neither.
    """

    potential: str | Potential
    steps: list[dict[str, Any]]
    device: str = "cpu"
    dtype: str | None = None
    max_edges: int | None = None
    precision: Precision | None = None
    ignore: tuple[str, ...] = ()

    def load(self, potential: str | Potential, device: str | None = None) -> Potential:
        """Return a potential where and as this job computes; one that was given stays as it is."""
        device = self.device if device is None else device
        dtype = _DTYPES[self.dtype] if self.dtype else None
        if not isinstance(potential, Potential):
            loaded = load_potential(potential, device=device, dtype=dtype, precision=self.precision)
            loaded.ignore(self.ignore)
            return loaded
        ignored = frozenset(self.ignore) or potential.ignored
        precision = checked_precision(self.precision) or potential.precision
        wanted = resolve_device(device), dtype or potential.dtype, precision, ignored
        frozen = not (potential.training or any(p.requires_grad for p in potential.parameters()))
        own = potential.device, potential.dtype, potential.precision, potential.ignored
        if frozen and wanted == own:
            return potential
        other = copy.deepcopy(potential).to(wanted[0])
        other.precision = precision
        other.ignore(ignored)
        return other.to(wanted[1])

    def device_of(self, worker: int) -> str:
        """Return the device of a worker."""
        if self.device != "cuda" or torch.cuda.device_count() == 0:
            return self.device
        return f"cuda:{worker % torch.cuda.device_count()}"

    def build(self, sha256: str, worker: int = 0) -> Computation:
        """Load the potentials and return the computation.

        Args:
            sha256: Of the potential, which references must be of as well.
            worker: Number of the worker.
        """
        device = self.device_of(worker)
        steps = parse_steps(self.steps)
        committee = next((step for step in steps if isinstance(step, Committee)), None)
        properties = next((step for step in steps if isinstance(step, Properties)), None)
        hull = None
        if properties is not None and properties.hull is not None:
            hull = HullReferences.read(properties.hull, sha256)
        return Computation(
            steps,
            self.load(self.potential, device),
            members=[self.load(name, device) for name in committee.potentials] if committee else [],
            hull=hull,
            max_edges=self.max_edges,
        )


def default_workers(device: str) -> int:
    """Return one worker per GPU, and on the CPU one per two cores."""
    if device == "cuda" and torch.cuda.device_count():
        return torch.cuda.device_count()
    return max(1, (os.cpu_count() or 1) // 2)


class Engine(Protocol):
    """Computes candidates."""

    def run(self, candidates: Iterable[Candidate]) -> Iterator[Row]:
        """Yield the row of every candidate, in the order in which they end.

        Where the stream of candidates raises, what was taken from it is computed first.
        """
        ...


class LocalEngine:
    """Computes in this process.

    Args:
        job: What to compute.
        sha256: Of the potential.
    """

    def __init__(self, job: Job, sha256: str) -> None:
        self._computation = job.build(sha256)

    def run(self, candidates: Iterable[Candidate]) -> Iterator[Row]:
        """Yield the row of every candidate, in the order in which they end."""
        return self._computation.run(candidates)
