"""Dry run: reads the sources, relaxes a few structures, and says what the whole would take."""

import itertools
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from atomeq.potential.potential import Potential
from atomeq.screening.compute import Candidate, Computation, refuse
from atomeq.screening.identity import content_hash
from atomeq.screening.sources import Found
from atomeq.screening.steps import Committee, Properties, Step, Validate

_LOOKED_AT = 2000  # structures read
_SAMPLE = 12  # structures computed, evenly among them
_ROW_BYTES = 24  # of an atom in a row before compression: position and number


@dataclass(frozen=True)
class Estimate:
    """What a screening would take.

    Attributes:
        n_structures: In the sources; of those looked at, where the sources do not tell.
        n_looked_at: Structures that were read.
        n_bad: Of them, unreadable or refused.
        mean_atoms: Atoms per structure.
        n_sampled: Structures that were computed.
        seconds: For all, with the workers that were asked for.
        memory: Bytes of a worker after the sample.
        disk: Bytes of results, before compression.
        complete: Whether ``n_structures`` is that of the whole sources.
    """

    n_structures: int
    n_looked_at: int
    n_bad: int
    mean_atoms: float
    n_sampled: int
    seconds: float
    memory: int
    disk: int
    complete: bool

    def table(self) -> list[list[str]]:
        """Return what a user sees."""
        whole = "" if self.complete else " or more"
        return [
            ["structures", f"{self.n_structures}{whole}"],
            ["looked at", str(self.n_looked_at)],
            ["bad among them", str(self.n_bad)],
            ["atoms per structure", f"{self.mean_atoms:.1f}"],
            ["computed as a sample", str(self.n_sampled)],
            ["time for all / min", f"{self.seconds / 60:.1f}"],
            ["memory per worker / MB", f"{self.memory / 1e6:.0f}"],
            ["results / MB, at most", f"{self.disk / 1e6:.1f}"],
        ]


def estimate(
    found: Iterable[Found],
    potential: Potential,
    steps: Sequence[Step],
    *,
    total: int | None,
    workers: int = 1,
) -> Estimate:
    """Compute a sample and extrapolate; nothing is written.

    Args:
        found: What the sources hold; the first 2000 are looked at.
        potential: Computes.
        steps: Of the screening. The committee and references are left out of the sample.
        total: Number of structures, if known.
        workers: Over which the time is divided.
    """
    stream = iter(found)
    looked_at = list(itertools.islice(stream, _LOOKED_AT))
    complete = total is not None or next(stream, None) is None
    validate = next((step for step in steps if isinstance(step, Validate)), Validate())
    good = [
        item.atoms
        for item in looked_at
        if item.atoms is not None and refuse(item.atoms, validate, potential.elements) is None
    ]
    sample = good[:: max(1, len(good) // _SAMPLE)][:_SAMPLE]
    timed = [step for step in steps if not isinstance(step, Committee | Properties)]
    started = time.perf_counter()
    candidates = [Candidate(content_hash(atoms), "", atoms) for atoms in sample]
    n_rows = sum(1 for _ in Computation(timed, potential).run(candidates))
    seconds = time.perf_counter() - started
    n_structures = len(looked_at) if total is None else total
    share = len(good) / max(1, len(looked_at))
    mean_atoms = sum(map(len, good)) / max(1, len(good))
    row_bytes = 400 + _ROW_BYTES * mean_atoms
    return Estimate(
        n_structures=n_structures,
        n_looked_at=len(looked_at),
        n_bad=len(looked_at) - len(good),
        mean_atoms=mean_atoms,
        n_sampled=n_rows,
        seconds=seconds / max(1, n_rows) * n_structures * share / workers,
        memory=_resident(),
        disk=int(row_bytes * n_structures),
        complete=complete,
    )


def _resident() -> int:
    """Return the most memory this process has had, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
