"""Ray: actors on one machine or many hold the potential and compute handfuls of structures.

A handful whose actor or node died is tried again, in halves and in the end one by one; what kills
an actor alone is quarantined. Ray is imported when it is asked for.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from atomeq.screening.compute import Candidate, Feed
from atomeq.screening.engines import Job, default_workers
from atomeq.screening.rows import Row

_HANDFUL = 64  # an actor has a whole batch in flight of them
_AHEAD = 2  # handfuls an actor has, so that it never waits for the next
_STARTS = 3  # of a cluster, whose node has 30 seconds to begin; a loaded machine takes longer
_TRIES = 3  # of a structure alone: actors also die for reasons that are not its fault


@dataclass(frozen=True)
class _Work:
    candidates: tuple[Candidate, ...]
    tries: int = 0

    def again(self) -> list["_Work"]:
        """Return what is to be done after an actor died over this."""
        if len(self.candidates) == 1:
            return [_Work(self.candidates, self.tries + 1)]
        half = (len(self.candidates) + 1) // 2
        return [_Work(self.candidates[:half]), _Work(self.candidates[half:])]


class RayEngine:
    """Computes in actors of a Ray cluster.

    Args:
        job: What to compute.
        sha256: Of the potential.
        workers: How many actors.
        address: Of the cluster, such as ``auto``; by default one is started here, and ended after.

    Raises:
        ImportError: Ray is not installed.
    """

    def __init__(
        self, job: Job, sha256: str, *, workers: int | None = None, address: str | None = None
    ) -> None:
        self._ray = _import_ray()
        self._job, self._sha256, self._address = job, sha256, address
        self._n_workers = default_workers(job.device) if workers is None else workers

    def run(self, candidates: Iterable[Candidate]) -> Iterator[Row]:
        """Yield the row of every candidate, a handful at a time as they end.

        Raises:
            RuntimeError: An actor cannot be built, for example because a node has no atomeq.
        """
        own = not self._ray.is_initialized()
        if own:
            self._start()
        try:
            feed = Feed(candidates)
            yield from _Actors(self._ray, self._job, self._sha256, self._n_workers).rows(feed)
            feed.end()
        finally:
            if own:
                self._ray.shutdown()

    def _start(self) -> None:
        options: dict[str, Any] = {"address": self._address}
        if self._address is None:
            options = {"num_cpus": self._n_workers, "include_dashboard": False}
        for attempt in range(1, _STARTS + 1):
            try:
                self._ray.init(**options, log_to_driver=False, logging_level="ERROR")
                return
            except Exception as error:  # Ray raises no narrower class
                if attempt == _STARTS or "timed out during startup" not in str(error):
                    raise
                self._ray.shutdown()


class _Actors:
    def __init__(self, ray: Any, job: Job, sha256: str, n_workers: int) -> None:
        self._ray, self._sha256 = ray, sha256
        self._job = ray.put(job)
        gpus = 1 if job.device == "cuda" else 0
        self._class = ray.remote(num_cpus=1, num_gpus=gpus)(_Actor)
        self._actors = [self._build() for _ in range(n_workers)]
        try:
            ray.get([actor.alive.remote() for actor in self._actors])
        except ray.exceptions.RayActorError as error:
            raise RuntimeError(f"an actor cannot begin: {error}") from error

    def rows(self, candidates: Iterator[Candidate]) -> Iterator[Row]:
        waiting: deque[_Work] = deque()
        running: dict[Any, tuple[_Work, int]] = {}
        while True:
            self._hand_out(candidates, waiting, running)
            if not running:
                return
            (done,), _ = self._ray.wait(list(running), num_returns=1)
            work, k = running.pop(done)
            try:
                yield from self._ray.get(done)
            except self._ray.exceptions.RayActorError as error:
                self._replace(k)
                if work.tries + 1 >= _TRIES:
                    reason = f"every actor that computed it alone died: {error}"
                    yield work.candidates[0].failed("engine", "crashed", reason)
                else:
                    waiting.extend(work.again())

    def _hand_out(
        self,
        candidates: Iterator[Candidate],
        waiting: deque[_Work],
        running: dict[Any, tuple[_Work, int]],
    ) -> None:
        loads = [0] * len(self._actors)
        for _, k in running.values():
            loads[k] += 1
        while min(loads) < _AHEAD:
            work = waiting.popleft() if waiting else _next_work(candidates)
            if work is None:
                return
            k = loads.index(min(loads))
            running[self._actors[k].compute.remote(work.candidates)] = (work, k)
            loads[k] += 1

    def _build(self) -> Any:
        return self._class.remote(self._job, self._sha256, torch.get_num_threads())

    def _replace(self, k: int) -> None:
        """Put a new actor in place of a dead one, once: each of its handfuls comes here."""
        try:
            self._ray.get(self._actors[k].alive.remote())
        except self._ray.exceptions.RayActorError:
            self._actors[k] = self._build()


class _Actor:
    """Holds the potential in a process of the cluster."""

    def __init__(self, job: Job, sha256: str, n_threads: int) -> None:
        torch.set_num_threads(n_threads)
        self._computation = job.build(sha256)

    def compute(self, candidates: tuple[Candidate, ...]) -> list[Row]:
        """Return the rows of a handful."""
        return list(self._computation.run(candidates))

    def alive(self) -> bool:
        """Tell that it is."""
        return True


def _next_work(candidates: Iterator[Candidate]) -> _Work | None:
    handful = tuple(itertools.islice(candidates, _HANDFUL))
    return _Work(handful) if handful else None


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError("engine ray needs Ray: pip install atomeq[ray]") from error
    return ray
