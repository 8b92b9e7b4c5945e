"""In-flight batching: finished structures leave the running batch and waiting ones enter.

:class:`Flight` is the engine of relax() and simulate(); it knows steps and memory, not physics.
"""

import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from atomeq.dynamics.budget import EdgeBudget, is_out_of_memory
from atomeq.dynamics.evaluator import Evaluator, Failure
from atomeq.dynamics.state import State
from atomeq.dynamics.trajectory import End, Passenger, Recorder, Status
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.convert import StructureError, StructureLike
from atomeq.graph.to_structures import to_ase

S = TypeVar("S", bound=State)

# New structures enter together: evaluated one by one they would gain nothing from the batch.
_REFILL_BELOW = 0.75


class Stepper(Protocol[S]):
    """Settings of an optimizer or integrator, with what it does to a batch."""

    def check(self, graph: AtomGraph) -> None:
        """Raise StructureError for a structure it cannot take."""
        ...

    def init(self, graph: AtomGraph, evaluate: Evaluator) -> S:
        """Return the state of structures that begin."""
        ...

    def step(self, state: S, evaluate: Evaluator) -> S:
        """Return the state one step later."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What became of one structure.

    Attributes:
        index: Its place among the structures that were given, from 0.
        id: As given, by default the index.
        status: ``"converged"`` or ``"completed"`` where all went well; ``"not_converged"`` after
            the last allowed step; ``"failed"`` where it broke on the way; ``"refused"`` where it
            could not begin; ``"too_large"`` for the memory.
        reason: Why, for the user; empty where all went well.
        n_steps: Steps it took.
        graph: Where it ended, with ``energy``, ``forces``, ``stress`` where the cell moved and
            ``velocities``; a failed structure as it was before it broke. None where it never began.
    """

    index: int
    id: Hashable
    status: Status
    reason: str
    n_steps: int
    graph: AtomGraph | None

    @property
    def converged(self) -> bool:
        """Whether all went well."""
        return self.status in ("converged", "completed")

    @property
    def energy(self) -> float | None:
        """Potential energy, eV."""
        return None if self.graph is None else float(self.graph.energy)

    @property
    def atoms(self) -> Any:
        """The structure as ase.Atoms, with its results; None where it never began."""
        return None if self.graph is None else to_ase(self.graph)[0]


class Flight(Generic[S]):
    """Steps a stream of structures.

    Args:
        stepper: Optimizer or integrator.
        evaluate: The potential.
        budget: How many edges at once.
        ended: Tells of a state which structures have ended and how: the status of each, or None.
        begin: Adds to a prepared graph what belongs to a structure's index, such as its seed.
        recorder: Writes frames and checkpoints.
        observe: Called with the state and the indices of its structures after every step.

    Attributes:
        n_taken: Structures taken from the stream.
    """

    def __init__(
        self,
        stepper: Stepper[S],
        evaluate: Evaluator,
        *,
        budget: EdgeBudget,
        ended: Callable[[S], list[Status | None]],
        begin: Callable[[AtomGraph, int], AtomGraph] = lambda graph, index: graph,
        recorder: Recorder | None = None,
        observe: Callable[[S, list[int]], None] | None = None,
    ) -> None:
        self.stepper, self.evaluate, self.budget = stepper, evaluate, budget
        self.ended, self.begin = ended, begin
        self.recorder, self.observe = recorder, observe
        self.n_taken = 0
        self._state: S | None = None
        self._running: list[Passenger] = []
        self._aside: deque[tuple[Passenger, S]] = deque()
        self._next: tuple[Passenger, AtomGraph] | None = None
        self._exhausted = False
        self._too_large: list[Outcome] = []
        self._ends: Iterable[End[S]] = ()

    def resume(self, kind: type[S]) -> None:
        """Go on from the recorder's checkpoint, if there is one.

        Args:
            kind: The class of state.
        """
        assert self.recorder is not None
        device = self.evaluate.potential.device
        saved = self.recorder.restore(kind, device)
        if saved is None:
            return
        states, passengers, self.n_taken = saved
        on_the_way = {passenger.index for passenger in passengers}
        others = [index for index in range(self.n_taken) if index not in on_the_way]
        self._ends = self.recorder.ends(kind, device, others)
        if not states:
            return
        n_running = states[0].graph.n_graphs
        self._state, self._running = states[0], list(passengers[:n_running])
        for passenger, state in zip(passengers[n_running:], states[1:], strict=True):
            self._aside.append((passenger, state))

    def run(
        self, structures: Iterable[StructureLike], ids: Iterable[Hashable] | None = None
    ) -> Iterator[Outcome]:
        """Yield every structure's outcome as it ends.

        Args:
            structures: Taken one by one, when there is room.
            ids: Of the structures, in parallel; their index by default.
        """
        names: Iterable[Hashable] = itertools.count() if ids is None else ids
        stream = itertools.islice(zip(structures, names, strict=False), self.n_taken, None)
        yield from self._ended_before()
        while True:
            yield from self._admit(stream)
            if self._state is None:
                break
            landed = self._land()
            yield from landed
            if not landed:
                yield from self._advance()
        if self.recorder is not None:
            self.recorder.finish(self.n_taken)

    def _ended_before(self) -> Iterator[Outcome]:
        """Yield what ended before a restart; what now has longer to go is set aside for it."""
        for end in self._ends:
            assert self.recorder is not None
            passenger, state = end.passenger, end.state
            unfinished = end.status in ("completed", "not_converged")
            if state is not None and unfinished and self.ended(state)[0] is None:
                self.recorder.cut(passenger.index, end.sizes[0])
                self._aside.append((passenger, state))
                continue
            self.recorder.cut(passenger.index, end.sizes[1])
            graph = None if state is None else _bare(state.graph)
            name = passenger.index, passenger.id
            yield Outcome(*name, end.status, end.reason, end.n_steps, graph)

    def _fits(self, n_edges: int, n_running: int) -> bool:
        return n_running == 0 or n_running + n_edges <= self.budget.limit

    def _n_edges(self) -> int:
        return sum(passenger.n_edges for passenger in self._running)

    def _admit(self, stream: Iterator[tuple[StructureLike, Hashable]]) -> Iterator[Outcome]:
        n_edges = self._n_edges()
        if n_edges and n_edges >= _REFILL_BELOW * self.budget.limit:
            return
        states: list[S] = []
        while self._aside and self._fits(self._aside[0][0].n_edges, n_edges):
            passenger, state = self._aside.popleft()
            self._running.append(passenger)
            states.append(state)
            n_edges += passenger.n_edges
        entering: list[tuple[Passenger, AtomGraph]] = []
        while not self._aside:
            outcome = self._look_ahead(stream)
            if outcome is not None:
                yield outcome
                continue
            if self._next is None or not self._fits(self._next[0].n_edges, n_edges):
                break
            entering.append(self._next)
            n_edges += self._next[0].n_edges
            self._next = None
        begun = self._begin(entering)
        too_large, self._too_large = self._too_large, []
        yield from too_large
        if begun and self.recorder is not None:
            n_begun = sum(state.graph.n_graphs for state in begun)
            self.recorder.frames(
                type(begun[0]).concatenate(begun), self._indices()[-n_begun:], entered=True
            )
        states = [*([] if self._state is None else [self._state]), *states, *begun]
        if states:
            self._state = type(states[0]).concatenate(states)

    def _look_ahead(self, stream: Iterator[tuple[StructureLike, Hashable]]) -> Outcome | None:
        """Take the next usable structure from the stream; return the outcome of a useless one."""
        if self._next is not None or self._exhausted:
            return None
        item = next(stream, None)
        if item is None:
            self._exhausted = True
            return None
        structure, name = item
        index, self.n_taken = self.n_taken, self.n_taken + 1
        name = index if name is None else name
        try:
            graph = self.evaluate.prepare(structure)
            if graph.n_graphs != 1:
                raise StructureError("it is a batch of structures; give them one by one")
            self.evaluate.potential.check_elements(graph)
            self.stepper.check(graph)
            n_edges = self.evaluate.count_edges(graph)
        except (ValueError, TypeError, OSError) as error:
            return self._end(Passenger(index, name, 0), "refused", str(error))
        if self.budget.is_strict and n_edges > self.budget.limit:
            return self._oversized(
                Passenger(index, name, n_edges), f"max_edges={self.budget.limit}"
            )
        n_edges = max(n_edges, graph.n_atoms)  # atoms without neighbours need memory as well
        self._next = Passenger(index, name, n_edges), self.begin(graph, index)
        return None

    def _begin(self, entering: list[tuple[Passenger, AtomGraph]]) -> list[S]:
        """Evaluate those that enter, together; one by one where memory does not suffice."""
        if not entering:
            return []
        graph = AtomGraph.concatenate([graph for _, graph in entering])
        passengers = [passenger for passenger, _ in entering]
        state = self._within_memory(lambda: self.stepper.init(graph, self.evaluate))
        if state is not None:
            self._running += passengers
            return [state]
        if len(entering) > 1:
            return [state for item in entering for state in self._begin([item])]
        self._too_large.append(self._oversized(passengers[0], "memory"))
        return []

    def _advance(self) -> Iterator[Outcome]:
        state = self._state
        assert state is not None
        with self.budget.watching():
            after = self._within_memory(lambda: self.stepper.step(state, self.evaluate))
        if after is None:
            yield from self._halve(state)
            return
        self._state = after
        n_edges = torch.maximum(self.evaluate.n_edges, after.graph.natoms).tolist()
        for passenger, now in zip(self._running, n_edges, strict=True):
            passenger.n_edges = now
        self.budget.learn(sum(n_edges))
        if self.observe is not None:
            self.observe(after, self._indices())
        if self.recorder is not None:
            self.recorder.frames(after, self._indices())
            self.recorder.checkpoint(
                [after, *(state for _, state in self._aside)],
                [*self._running, *(passenger for passenger, _ in self._aside)],
                self.n_taken - (self._next is not None),
            )

    def _within_memory(self, compute: Callable[[], S]) -> S | None:
        try:
            return compute()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None  # outside of the handler, whose traceback would keep the tensors alive

    def _halve(self, state: S) -> Iterator[Outcome]:
        """Set the second half of the batch aside; a structure that is alone is too large."""
        self.budget.halve(self._n_edges())
        if len(self._running) == 1:
            yield self._oversized(self._running[0], "memory", state)
            self._state, self._running = None, []
            return
        half = (len(self._running) + 1) // 2
        for k in reversed(range(half, len(self._running))):
            self._aside.appendleft((self._running[k], state.take(_index([k], state))))
        self._keep(list(range(half)))

    def _land(self) -> list[Outcome]:
        state = self._state
        assert state is not None
        codes = state.graph["failure"].tolist()
        statuses = self.ended(state)
        staying = [k for k, status in enumerate(statuses) if status is None and not codes[k]]
        if len(staying) == len(codes):
            return []
        leaving = [k for k in range(len(codes)) if k not in set(staying)]
        steps = state.n_steps.tolist()
        gone = state.take(_index(leaving, state))
        graphs = gone.graph.to_list()
        outcomes = []
        for place, k in enumerate(leaving):
            status, reason = statuses[k], ""
            if codes[k]:
                status, reason = "failed", f"{Failure(codes[k]).reason} (step {steps[k] + 1})"
            elif status == "not_converged":
                reason = f"not converged after {steps[k]} steps"
            assert status is not None
            own = None if self.recorder is None else gone.take(_index([place], gone))
            ended = self._end(self._running[k], status, reason, graphs[place], steps[k], own)
            outcomes.append(ended)
        self._keep(staying)
        return outcomes

    def _keep(self, systems: list[int]) -> None:
        assert self._state is not None
        self._running = [self._running[k] for k in systems]
        self._state = self._state.take(_index(systems, self._state)) if systems else None

    def _oversized(self, passenger: Passenger, limit: str, state: S | None = None) -> Outcome:
        reason = f"{passenger.n_edges} edges of one structure are more than {limit} allows"
        if state is None:
            return self._end(passenger, "too_large", reason)
        return self._end(passenger, "too_large", reason, state.graph, int(state.n_steps), state)

    def _end(
        self,
        passenger: Passenger,
        status: Status,
        reason: str,
        graph: AtomGraph | None = None,
        n_steps: int = 0,
        state: S | None = None,
    ) -> Outcome:
        if self.recorder is not None:
            self.recorder.land(passenger, status, reason, n_steps, state)
        bare = None if graph is None else _bare(graph)
        return Outcome(passenger.index, passenger.id, status, reason, n_steps, bare)

    def _indices(self) -> list[int]:
        return [passenger.index for passenger in self._running]


def _index(systems: list[int], state: State) -> Tensor:
    return torch.tensor(systems, dtype=torch.int64, device=state.graph.pos.device)


def _bare(graph: AtomGraph) -> AtomGraph:
    """Return a graph in memory of its own, without the fields that only dynamics reads."""
    fields = graph.replace(failure=None, key=None, seed=None).to_dict()
    return AtomGraph().replace(**{name: value.clone() for name, value in fields.items()})
