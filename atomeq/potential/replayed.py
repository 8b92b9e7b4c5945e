"""Replayed: what a potential sends to torch for a small system on a CPU, recorded and sent again.

Of energy and forces of a few atoms most of the time goes to Python: modules, checks, and the tape
of autograd. All of it ends in some hundred operations, the same at every step. They are recorded
below autograd, those of the backward pass too, and repeated on other positions and edges: the same
operations in the same order, so that no bit of a result changes. What hangs on the elements alone
is computed once.

A recording belongs to one composition. Two of them, of different numbers of edges, tell which
sizes follow that number; the result serves after it has given the potential's own bits twice.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import RadiusGraph
from atomeq.nn.radial_tables import tables_are_read
from atomeq.ops.dispatch import chosen_backend
from atomeq.ops.registration import DispatchMode, below_autograd, functions
from atomeq.potential.derivatives import refuse_flat_cells
from atomeq.potential.potential import Potential
from atomeq.typing import PropertyKey

_SEEN = 3  # calls of one kind in a row before it is recorded: a batch that changes is not
_CHECKS = 2  # results that have to be the potential's own, before a recording serves
_HELD = 8  # recordings
_MOST_EDGES = 4096  # beyond, what is spared is some percent of the arithmetic
_MOVING = ("pos", "cell", "edge_index", "cell_offsets")  # what changes from step to step
_FIXED = ("atomic_numbers", "natoms", "pbc")
_KNOWN = {"atomeq", "torch"}  # whose modules are replayed

_UNKNOWN = {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape}

Results = dict[PropertyKey, Tensor]


class Replayed:
    """A potential that repeats what it has sent, where that is known to give the same.

    Arguments and results are those of the potential. A recording is dropped where weights have
    changed. While one thread replays, others ask the potential.

    Args:
        potential: In evaluation mode, its parameters frozen; else nothing is recorded.
        wanted: False never records.

    Attributes:
        n_replays: How often a recording has served.
    """

    def __init__(self, potential: Potential, *, wanted: bool = True) -> None:
        self.potential, self.wanted = potential, wanted
        self.n_replays = 0
        self._held: OrderedDict[tuple[Any, ...], _Held] = OrderedDict()
        self._recent: tuple[tuple[Any, ...], int] = ((), 0)
        self._weights: list[Tensor] = []
        self._versions: list[Any] = []
        self._lock = threading.Lock()

    def __call__(self, graph: AtomGraph, properties: Sequence[PropertyKey]) -> Results:
        """Return what :meth:`Potential.forward` returns."""
        if not self._serves(graph) or not self._lock.acquire(blocking=False):
            return self.potential(graph, properties)
        try:
            found = self._replayed(graph, tuple(properties))
        finally:
            self._lock.release()
        return self.potential(graph, properties) if found is None else found

    def _serves(self, graph: AtomGraph) -> bool:
        potential, pos = self.potential, graph.pos
        if not self.wanted or not 0 < graph.n_edges <= _MOST_EDGES:
            return False
        plain = type(pos) is Tensor and pos.device.type == "cpu" and not pos.requires_grad
        changed = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
        own = type(potential) is Potential and "forward" not in vars(potential)
        return plain and own and not changed and not potential.training

    def _replayed(self, graph: AtomGraph, properties: tuple[PropertyKey, ...]) -> Results | None:
        """Return the results of a recording or of being recorded, or None where there is none."""
        versions = [(one.data_ptr(), one._version) for one in self._weights]
        if versions != self._versions:
            self._held.clear()
        key = self._key(graph, properties)
        held = self._held.get(key)
        if held is None:
            last, n_seen = self._recent
            self._recent = key, n_seen + 1 if key == last else 1
            if self._recent[1] < _SEEN or not self._recordable():
                return None
            held = self._held[key] = _Held()
            while len(self._held) > _HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        self.potential.check_electrons(graph)  # fields that no recording reads
        if "stress" in properties:
            refuse_flat_cells(graph)
        return self._answer(held, graph, properties)

    def _answer(
        self, held: "_Held", graph: AtomGraph, properties: tuple[PropertyKey, ...]
    ) -> Results | None:
        if held.refused:
            return None
        inputs = [graph[name].detach() for name in _MOVING]
        if held.program is None or not held.program.takes(graph.n_edges):
            return self._record(held, graph, properties)
        found = held.program(inputs, graph.n_edges)
        if found is None or not held.unproved:
            self.n_replays += found is not None
            return found
        expected = self.potential(graph, properties)
        held.unproved -= not torch.equal(graph.pos, held.pos)
        held.refused = not all(torch.equal(expected[name], found[name]) for name in expected)
        return expected

    def _record(
        self, held: "_Held", graph: AtomGraph, properties: tuple[PropertyKey, ...]
    ) -> Results:
        """Evaluate, and record; results are those of the evaluation."""
        own = {name: graph[name] for name in ("batch", *_FIXED, *_MOVING)}
        bare = AtomGraph().replace(**own)
        with torch.inference_mode(False), Recorder([bare[name] for name in _MOVING]) as recorder:
            results = self.potential(bare, properties)
        try:
            held.add(recorder, results, graph)
        except CannotReplay:
            held.refused, held.program = True, None
        self._weights = [*self.potential.parameters(), *self.potential.buffers()]
        self._versions = [(one.data_ptr(), one._version) for one in self._weights]
        return results

    def _recordable(self) -> bool:
        potential = self.potential
        weights = [*potential.parameters(), *potential.buffers()]
        if any(one.requires_grad or one.is_inference() for one in weights):
            return False
        if any(one._forward_hooks or one._forward_pre_hooks for one in potential.modules()):
            return False
        # What is read through NumPy leaves no trace; ours read nothing so, others may.
        if any(type(one).__module__.partition(".")[0] not in _KNOWN for one in potential.modules()):
            return False
        known = all(part.recordable for part in (potential.model, *potential.terms))
        return known and type(potential.model.graph_builder()) is RadiusGraph

    def _key(self, graph: AtomGraph, properties: tuple[PropertyKey, ...]) -> tuple[Any, ...]:
        fixed = [graph[name].numpy().tobytes() for name in _FIXED]
        moving = [(graph[name].dtype, graph[name].is_contiguous()) for name in _MOVING]
        how = torch.are_deterministic_algorithms_enabled(), chosen_backend(), tables_are_read()
        return (properties, len(self.potential.terms), *how, *fixed, *moving)


class CannotReplay(ValueError):
    """What was recorded cannot be repeated on other numbers."""


class _Slot(int):
    """Stands for a tensor that is made anew at each replay, by its number."""


class _Times(int):
    """Stands for a size, so many times the number of edges."""


class Step(NamedTuple):
    """One operation that was sent.

    Attributes:
        function: The operation.
        args: Arguments and, as the last one, those by name; slots stand for tensors.
        out: What came of it: slots, as the operation returned them, or a number.
        tensors: What stood in these slots.
        unknown: Whether chance decides of the result, or numbers of its size.
        moves: Whether it is to be repeated: it hangs on an input, or memory is written to.
    """

    function: Any
    args: list[Any]
    out: Any
    tensors: list[Tensor]
    unknown: bool
    moves: bool = False


class Recorder(DispatchMode):
    """Records what is sent below autograd.

    Tensors are known by where they lie, not by who they are: autograd hands out others for the
    same memory. All that is made is kept until the end, so that no memory is used twice.

    Args:
        inputs: What will be other tensors at a replay; they have the first slots.

    Attributes:
        steps: What was sent.
        mutated: Memory that operations wrote into.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.mutated: set[int] = set()
        self.slots: dict[Any, _Slot] = {}
        self.n_inputs = len(inputs)
        self._kept = list(inputs)
        for tensor in inputs:
            self.slot_of(tensor, new=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and record it."""
        kwargs = kwargs or {}
        given = self._template([*args, kwargs])
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self.mutated.update(map(_memory, _tensors(value)))
            self.mutated.update(map(_memory, _tensors(kwargs.get("out"))))
        found = func(*args, **kwargs)
        made = list(_tensors(found))
        self._kept += made
        if isinstance(found, Tensor):
            out: Any = self.slot_of(found, new=True)
        elif isinstance(found, list | tuple):
            out = [self.slot_of(one, new=True) for one in found]
        else:
            out = found  # a number, which the program may have turned on
        self.steps.append(Step(func, given, out, made, _is_unknown(func, args)))
        return found

    def slot_of(self, tensor: Any, *, new: bool = False) -> Any:
        """Return the slot of a tensor that has one or is new; else what was given."""
        if not isinstance(tensor, Tensor):
            return None if new else tensor
        where = tensor.data_ptr() if tensor.numel() else 0  # what is empty is all the same
        place = where, tensor.shape, tensor.stride(), tensor.dtype
        if new:
            return self.slots.setdefault(place, _Slot(len(self.slots)))
        return self.slots.get(place, tensor)

    def settled(self) -> list[Step]:
        """Return the steps, with tensors of those alone that need not be repeated."""
        moving: set[int] = set(range(self.n_inputs))
        found = []
        for step in self.steps:
            moves = (
                step.function._schema.is_mutable
                or not moving.isdisjoint(_slots([step.args, step.out]))
                or any(_memory(one) in self.mutated for one in step.tensors)
            )
            if moves:
                moving.update(_slots(step.out))
            found.append(step._replace(moves=moves, tensors=[] if moves else step.tensors))
        return found

    def _template(self, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [self._template(one) for one in value]
        if isinstance(value, dict):
            return {name: self._template(one) for name, one in value.items()}
        return self.slot_of(value)


class _Held:
    """What is known of one composition: a first recording, and the program that came of it."""

    def __init__(self) -> None:
        self.refused = False
        self.unproved = _CHECKS
        self.program: Program | None = None
        self.pos = torch.empty(0)
        self._first: tuple[list[Step], tuple[int, int], dict[Any, Any], int] | None = None

    def add(self, recorder: Recorder, results: Results, graph: AtomGraph) -> None:
        """Take up a recording; with a second one sizes are known that follow the edges."""
        self.pos, self.unproved = graph.pos.clone(), _CHECKS
        out = {name: recorder.slot_of(value) for name, value in results.items()}
        steps, sizes = recorder.settled(), (len(recorder.slots), recorder.n_inputs)
        if self._first is None:
            self._first = steps, sizes, out, graph.n_edges
            self.program = Program(*self._first)
            return
        first, *others, n_first = self._first
        if len(first) != len(steps) or others != [sizes, out]:
            raise CannotReplay("another number of operations")
        both = [_joined(*pair, n_first, graph.n_edges) for pair in zip(first, steps, strict=True)]
        self.program, self._first = Program(both, sizes, out, None), None


class Program:
    """Operations that are repeated.

    Args:
        steps: The operations, with sizes that follow the number of edges.
        sizes: How many slots there are, and how many of them are inputs.
        out: Slots of the results by name.
        n_edges: The number that sizes belong to; None where they follow it.

    Raises:
        CannotReplay: One of them is of chance, or has results of a size that only its numbers know.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        sizes: tuple[int, int],
        out: dict[Any, Any],
        n_edges: int | None,
    ) -> None:
        self._n_edges, (self._n_slots, self._n_inputs) = n_edges, sizes
        constants: dict[int, Tensor] = {}
        moving: list[Step] = []
        of_edges: set[int] = set()
        for step in steps:
            if not step.moves and not _follows_edges(step.args, of_edges):
                constants.update(zip(_slots(step.out), step.tensors, strict=True))
                continue
            if step.unknown:
                raise CannotReplay(f"only its numbers know what {step.function} gives")
            of_edges.update(_slots(step.out))
            moving.append(step._replace(args=_filled(step.args, constants)))
        self._out: dict[Any, Any] = {k: constants.get(one, one) for k, one in out.items()}
        self._steps = list(_prepared(_alive(moving, self._out), {*_slots(self._out)}))

    def takes(self, n_edges: int) -> bool:
        """Whether it serves such a number of edges."""
        return self._n_edges is None or self._n_edges == n_edges

    def __call__(self, inputs: Sequence[Tensor], n_edges: int) -> Results | None:
        """Return the results, or None where the program would have taken another way."""
        slots: list[Any] = [*inputs, *[None] * (self._n_slots - self._n_inputs)]
        with torch.inference_mode(False), below_autograd():
            for function, args, named, fills, sizes, out, last in self._steps:
                for where, at, slot in fills:
                    where[at] = slots[slot]
                for where, at, times in sizes:
                    where[at] = times * n_edges
                found = function(*args, **named)
                for where, at, _ in fills:
                    where[at] = None
                if type(out) is _Slot:
                    slots[out] = found
                elif not _put(found, out, slots):
                    return None
                for slot in last:
                    slots[slot] = None
        return {
            name: slots[one] if type(one) is _Slot else one.clone()
            for name, one in self._out.items()
        }


def _put(found: Any, out: Any, slots: list[Any]) -> bool:
    """Put several results into their slots; say whether a number is what it was."""
    if type(out) is not list:
        return out is None or found == out
    for slot, value in zip(out, found, strict=True):
        if slot is not None:
            slots[slot] = value
    return True


def _is_unknown(function: Any, args: Sequence[Any]) -> bool:
    if function is torch.ops.aten.index.Tensor:  # only with masks
        return any(one.dtype in (torch.bool, torch.uint8) for one in _tensors(args[1]))
    return not _UNKNOWN.isdisjoint(function.tags)


def _alive(steps: Sequence[Step], out: dict[Any, Any]) -> list[Step]:
    """Return the steps that something depends on."""
    wanted, kept = set(_slots(out)), []
    for step in reversed(steps):
        made = set(_slots(step.out))
        if made and not made & wanted and not step.function._schema.is_mutable:
            continue
        wanted.update(_slots(step.args))
        kept.append(step)
    return kept[::-1]


def _prepared(steps: Sequence[Step], results: set[_Slot]) -> Iterator[tuple[Any, ...]]:
    """Yield what a replay needs of each step: places to fill in, and slots that end with it."""
    ends = {slot: n for n, step in enumerate(steps) for slot in _slots([step.args, step.out])}
    for n, step in enumerate(steps):
        *args, named = step.args
        places = list(_places([args, named]))
        fills = [place for place in places if isinstance(place[2], _Slot)]
        sizes = [(*place[:2], int(place[2])) for place in places if isinstance(place[2], _Times)]
        function = functions.get(step.function._schema.name, step.function)
        seen = {*_slots([step.args, step.out])} - results
        last = [slot for slot in seen if ends[slot] == n]
        yield function, args, named, fills, sizes, step.out, last


def _places(value: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield where slots and sizes stand: a list or dictionary, the place in it, and what it is."""
    for at, one in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(one, _Slot | _Times):
            yield value, at, one
        elif isinstance(one, list | dict):
            yield from _places(one)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _tensors(value: Any) -> Iterator[Tensor]:
    return (one for one in _leaves(value) if isinstance(one, Tensor))


def _slots(value: Any) -> Iterator[_Slot]:
    return (one for one in _leaves(value) if isinstance(one, _Slot))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _filled(value: Any, constants: dict[int, Tensor]) -> Any:
    """Return a copy of arguments, with constants for their slots."""
    if isinstance(value, list):
        return [_filled(one, constants) for one in value]
    if isinstance(value, dict):
        return {name: _filled(one, constants) for name, one in value.items()}
    return constants.get(value, value) if isinstance(value, _Slot) else value


def _follows_edges(args: Any, of_edges: set[int]) -> bool:
    return any(
        isinstance(one, _Times) or (isinstance(one, _Slot) and one in of_edges)
        for one in _leaves(args)
    )


def _joined(one: Step, other: Step, n_one: int, n_other: int) -> Step:
    """Return a step of two recordings, with what follows the number of edges as such."""
    same = one.function is other.function and type(one.out) is type(other.out)
    if not same or (isinstance(one.out, _Slot | list) and one.out != other.out):
        raise CannotReplay(f"{one.function} and {other.function}")
    return one._replace(args=_merged(one.args, other.args, n_one, n_other))


def _merged(one: Any, other: Any, n_one: int, n_other: int) -> Any:
    """Return arguments of both recordings."""
    if type(one) is not type(other):
        raise CannotReplay(f"{type(one)} and {type(other)}")
    if isinstance(one, list):
        if len(one) != len(other):
            raise CannotReplay("other arguments")
        return [_merged(a, b, n_one, n_other) for a, b in zip(one, other, strict=True)]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            raise CannotReplay("other arguments")
        return {name: _merged(a, other[name], n_one, n_other) for name, a in one.items()}
    if isinstance(one, Tensor):
        if one is not other and not (one.shape == other.shape and torch.equal(one, other)):
            raise CannotReplay("another constant")
        return one
    if one == other:
        return one
    if type(one) is int and one % n_one == 0 and one // n_one * n_other == other:
        return _Times(one // n_one)
    raise CannotReplay(f"{one!r} and {other!r}")
