"""Laws of threads: one calculator shared by many, and one made by each at the same time."""

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator

from atomeq.check.laws import Evaluation, Law, Measured, Subject, describe, quiet, rattled

N_THREADS = 8
_ROUNDS = 6  # evaluations per thread, all threads starting each at the same moment
_SWITCH_INTERVAL = 1e-5  # s; Python's default of 5 ms lets short calculations hide their races
_INTERRUPTIONS = 12
_PATIENCE = 0.5  # s; how long an interruption may last at least


def shared_by_threads(subject: Subject) -> Measured:
    """Let eight threads use one calculator at once, and two one in the middle of the other's use.

    Whether eight threads collide is luck. What one leaves half done in the middle of an evaluation
    is not, so there the switch of threads is made, at places spread over the evaluation.
    """
    calculator, tally = subject.factory(), _Tally()
    _crowd(subject, lambda: calculator, tally)
    _interrupt(subject, calculator, tally)
    return tally.verdict()


def one_per_thread(subject: Subject) -> Measured:
    """Let eight threads make a calculator each, at the same time, and use it."""
    tally = _Tally()
    _crowd(subject, subject.factory, tally)
    return tally.verdict()


class _Tally:
    """What threads found: distances from the right answers, and what they raised."""

    def __init__(self) -> None:
        self.distances: list[float] = []
        self.energy_errors: list[float] = []
        self.raised: list[str] = []

    def evaluate(
        self, subject: Subject, atoms: Atoms, calculator: Calculator, reference: Evaluation
    ) -> None:
        try:
            found = subject.evaluate(atoms, calculator=calculator)
        except Exception as error:  # whatever a race leads to is what is looked for
            self.raised.append(describe(error))
        else:
            self.energy_errors.append(abs(found.energy - reference.energy))
            self.distances.append(reference.distance(found))

    def verdict(self) -> Measured:
        figure = float(np.max(self.distances)) if self.distances else math.inf
        note = f"energy wrong by up to {np.max(self.energy_errors, initial=0.0):.1e} eV"
        if self.raised:
            note += f"; {len(self.raised)} calls raised, e.g. {self.raised[0]}"
        return Measured(figure, note, broken=bool(self.raised))


def _crowd(subject: Subject, calculator_of_thread: Callable[[], Calculator], tally: _Tally) -> None:
    """Evaluate in threads what was evaluated alone before; errors are silent or raised."""
    structures = [_workload(subject, thread) for thread in range(N_THREADS)]
    serial = subject.factory()
    expected = [[subject.evaluate(a, calculator=serial) for a in work] for work in structures]
    barrier = threading.Barrier(N_THREADS)

    def work(thread: int) -> None:
        try:
            calculator = calculator_of_thread()
        except Exception as error:
            tally.raised.append(f"on construction {describe(error)}")
            barrier.abort()
            return
        for atoms, reference in zip(structures[thread], expected[thread], strict=True):
            try:
                barrier.wait(timeout=120)
            except threading.BrokenBarrierError:
                return
            tally.evaluate(subject, atoms, calculator, reference)

    with quiet(), _frequent_switches():
        _run([lambda k=k: work(k) for k in range(N_THREADS)])


def _interrupt(subject: Subject, calculator: Calculator, tally: _Tally) -> None:
    """Stop one thread in the middle of an evaluation until another has done a whole one."""
    structures = [subject.crystal(name) for name in ("interrupted", "interrupting")]
    one, other = ((a, subject.evaluate(a, calculator=subject.factory())) for a in structures)
    with quiet():
        start = time.monotonic()
        n_calls = _count_calls(lambda: subject.evaluate(one[0], calculator=subject.factory()))
        # A calculator that lets in one thread at a time is right, and cannot be interrupted.
        patience = max(_PATIENCE, 5 * (time.monotonic() - start))
        for stop in np.linspace(0, n_calls, _INTERRUPTIONS, endpoint=False, dtype=int):
            reached, done = threading.Event(), threading.Event()

            def first(stop=stop, reached=reached, done=done) -> None:
                def pause() -> None:
                    reached.set()
                    done.wait(patience)

                with _at_call(int(stop), pause):
                    tally.evaluate(subject, one[0], calculator, one[1])
                reached.set()  # a call may have been spared since they were counted

            def second(reached=reached, done=done) -> None:
                reached.wait()
                tally.evaluate(subject, other[0], calculator, other[1])
                done.set()

            _run([first, second])


def _workload(subject: Subject, thread: int) -> list[Atoms]:
    """Return the structures of one thread: crystals of one size, then a cluster, all different."""
    random = subject.random(f"thread {thread}")
    crystals = [rattled(subject.crystal(), random, width=0.1) for _ in range(_ROUNDS - 1)]
    return [*crystals, rattled(subject.cluster(), random)]


def _run(work: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=each, daemon=True) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _count_calls(work: Callable[[], object]) -> int:
    """Return how many Python functions are called in the course of some work."""
    counter = [0]

    def counted() -> None:
        with _at_call(-1, lambda: None, counter):
            work()

    _run([counted])
    return counter[0]


@contextmanager
def _at_call(
    number: int, act: Callable[[], None], counter: list[int] | None = None
) -> Iterator[None]:
    """Act, once, in the middle of what this thread does: at the call of a function, by number."""
    count = [0] if counter is None else counter

    def look(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            count[0] += 1
            if count[0] == number + 1:
                act()

    sys.settrace(look)  # of this thread alone, which ends with this
    try:
        yield
    finally:
        sys.settrace(None)


@contextmanager
def _frequent_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


THREAD_LAWS = (
    Law("shared by 8 threads", shared_by_threads, "eV, Å", 1e-10, 1e-4),
    Law("one per thread", one_per_thread, "eV, Å", 1e-10, 1e-4),
)
