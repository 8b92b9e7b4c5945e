"""Processes: one worker per GPU or group of cores, each with a batch in flight of its own.

Workers are spawned, talk through a pipe each, and share nothing: one that dies takes no other with
it. What it was working on is tried again one by one, and what kills a worker alone is quarantined.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from atomeq.screening.compute import Candidate, Feed
from atomeq.screening.engines import Job, default_workers
from atomeq.screening.rows import Row

_HANDFUL = 16  # candidates sent at a time
_PATIENCE = 10.0  # seconds for a worker to leave when told to


class ProcessEngine:
    """Computes in processes on this machine.

    Args:
        job: What to compute.
        sha256: Of the potential.
        workers: How many processes.
    """

    def __init__(self, job: Job, sha256: str, *, workers: int | None = None) -> None:
        self._job, self._sha256 = job, sha256
        self._n_workers = default_workers(job.device) if workers is None else workers

    def run(self, candidates: Iterable[Candidate]) -> Iterator[Row]:
        """Yield the row of every candidate, in the order in which they end.

        Raises:
            RuntimeError: Workers die before they have taken any work.
        """
        feed = Feed(candidates)
        pool = _Pool(self._job, self._sha256, self._n_workers, feed)
        try:
            yield from pool.rows()
        finally:
            pool.end()
        feed.end()


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    pipe: Connection
    alone: bool = False  # it has a suspect, and gets nothing else until that has ended
    ready: bool = False  # it waits for its first candidates
    aboard: dict[str, Candidate] = field(default_factory=dict)


class _Pool:
    def __init__(
        self, job: Job, sha256: str, n_workers: int, candidates: Iterator[Candidate]
    ) -> None:
        self._job, self._sha256, self._candidates = job, sha256, candidates
        self._suspects: deque[Candidate] = deque()
        self._exhausted = False
        self._early_deaths = 0
        self._workers = [self._spawn(number) for number in range(n_workers)]

    def rows(self) -> Iterator[Row]:
        while True:
            for worker in self._workers:
                if worker.ready:
                    self._begin(worker)
            busy = any(worker.aboard for worker in self._workers)
            if self._exhausted and not self._suspects and not busy:
                return
            for pipe in wait([worker.pipe for worker in self._workers]):
                worker = next(worker for worker in self._workers if worker.pipe is pipe)
                yield from self._listen(worker)

    def end(self) -> None:
        for worker in self._workers:
            worker.pipe.close()  # it reads the end of the file and leaves
        for worker in self._workers:
            worker.process.join(_PATIENCE if not worker.aboard else 0)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def _listen(self, worker: _Worker) -> Iterator[Row]:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            yield from self._bury(worker)
            return
        if message == "idle":
            worker.ready = True
        elif message == "more":
            self._send(worker, [] if worker.alone else self._handful())
        elif worker.aboard.pop(message["hash"], None) is not None:
            self._early_deaths = 0
            yield message

    def _begin(self, worker: _Worker) -> None:
        """Give a waiting worker a suspect alone, or else what comes."""
        worker.alone = bool(self._suspects)
        handful = [self._suspects.popleft()] if worker.alone else self._handful()
        if handful:
            worker.ready = False
            self._send(worker, handful)

    def _handful(self) -> list[Candidate]:
        taken: list[Candidate] = []
        while not self._exhausted and len(taken) < _HANDFUL:
            candidate = next(self._candidates, None)
            if candidate is None:
                self._exhausted = True
            else:
                taken.append(candidate)
        return taken

    def _send(self, worker: _Worker, handful: list[Candidate]) -> None:
        worker.aboard.update((candidate.hash, candidate) for candidate in handful)
        try:
            worker.pipe.send(handful)
        except OSError:
            return  # it is dead, and will be found so

    def _bury(self, worker: _Worker) -> Iterator[Row]:
        worker.process.join()
        code = worker.process.exitcode
        lost = list(worker.aboard.values())
        if worker.alone and len(lost) == 1:
            reason = f"the process that computed it alone died with exit code {code}"
            yield lost[0].failed("engine", "crashed", reason)
        else:
            self._suspects.extend(lost)
        self._early_deaths += not lost
        if self._early_deaths > 2 * len(self._workers):
            raise RuntimeError(
                f"workers end with exit code {code} before they begin; engine local shows why"
            )
        worker.pipe.close()
        self._workers[self._workers.index(worker)] = self._spawn(worker.number)

    def _spawn(self, number: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_work,
            args=(theirs, self._job, self._sha256, number, torch.get_num_threads()),
            daemon=True,  # it never outlives this process
        )
        process.start()
        theirs.close()  # so that the end of the worker is the end of the file here
        return _Worker(number, process, ours)


def _work(pipe: Connection, job: Job, sha256: str, number: int, n_threads: int) -> None:
    """Compute what comes through a pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that writes
    torch.set_num_threads(n_threads)
    computation = job.build(sha256, number)
    try:
        while True:
            pipe.send("idle")
            first = pipe.recv()
            for row in computation.run(_incoming(pipe, first)):
                pipe.send(row)
    except (EOFError, OSError):
        return


def _incoming(pipe: Connection, handful: list[Candidate]) -> Iterator[Candidate]:
    while handful:
        yield from handful
        pipe.send("more")
        handful = pipe.recv()
