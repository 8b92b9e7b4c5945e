"""Captured: the launches of energy, forces and stress, recorded once and replayed for each step.

A small system on a GPU waits for its host, which starts some hundred kernels a step. A CUDA graph
starts them all at once, on tensors that lie where they lay and keep their sizes. So structures are
padded: behind them stand ghosts, structures of their own, whose edges join each ghost to its own
image. No model lets one structure of a batch see another, so ghosts change nothing; and sizes come
in steps of about an eighth, so that a graph serves until its system has outgrown it.
"""

import logging
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.builders import RadiusGraph
from atomeq.nn.radial_tables import exact_radial_functions
from atomeq.ops.dispatch import chosen_backend
from atomeq.ops.precision import matmul_precision
from atomeq.potential.compiled import CompiledPotential, graph_fields
from atomeq.potential.potential import Potential
from atomeq.potential.predictor import full_precision
from atomeq.potential.replayed import Replayed
from atomeq.typing import OF_STRUCTURES, PropertyKey

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "ATOMEQ_CAPTURE"
_SEEN = 3  # calls of one kind in a row before it is recorded: a batch that changes is not
_HELD = 4  # recordings; the number of edges may swing between two sizes
_MOST_EDGES = 2**17  # beyond, kernels take longer than their launches; not measured yet
_LEAST = 64  # step of the number of edges in small systems
_PER_GHOST = 64  # edges of one ghost atom, for sums over an atom's edges are one program each
_LENGTH = 0.9  # of ghost edges, in cutoffs: what is beyond them need not be defined

Results = dict[PropertyKey, Tensor]


class Recording(Protocol):
    """A computation on tensors that stay where they are, and can be repeated on other numbers."""

    def __init__(self, compute: Callable[[], Results]) -> None:
        """Record what a function launches."""
        ...

    def replay(self) -> Results:
        """Repeat it; the results are written into the same tensors each time."""
        ...


class CudaGraph:
    """A CUDA graph of what a function launches, on the current device."""

    def __init__(self, compute: Callable[[], Results]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()  # workspaces belong to a stream
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may go on with its own work meanwhile.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._results = compute()

    def replay(self) -> Results:
        """Launch it all."""
        self._graph.replay()
        return self._results


class Sizes(NamedTuple):
    """How many atoms, structures and edges a padded graph has."""

    atoms: int
    graphs: int
    edges: int

    @classmethod
    def around(cls, graph: AtomGraph) -> "Sizes":
        """Return the sizes of the padded graph that a graph fits into."""
        edges = _rounded(graph.n_edges, _LEAST)
        graphs = _rounded(graph.n_graphs + 1, 1)
        ghosts = max(_n_ghosts(edges), _step(graphs, 1))  # an atom in each ghost structure
        return cls(_rounded(graph.n_atoms + ghosts, 1), graphs, edges)


class Padded:
    """A graph of fixed sizes that structures are written into, ghosts behind them.

    Args:
        like: A graph whose tensors are taken for a pattern.
        fields: Those of its fields that are read.
        cutoff: Of the edges, Å.

    Attributes:
        graph: The padded graph; its tensors stay where they are.
    """

    def __init__(self, like: AtomGraph, fields: Sequence[str], *, cutoff: float) -> None:
        self.sizes = sizes = Sizes.around(like)
        self._fields = tuple(fields)
        device = like.pos.device
        with torch.inference_mode(False):
            behind = torch.arange(sizes.edges - 1, -1, -1, device=device) // _PER_GHOST
            ghost = sizes.atoms - 1 - behind.clamp(max=_n_ghosts(sizes.edges) - 1)
            cell = torch.eye(3, dtype=like.cell.dtype, device=device) * cutoff * _LENGTH
            self._ghosts = {
                "pos": like.pos.new_zeros(sizes.atoms, 3),
                "atomic_numbers": like.atomic_numbers[:1].repeat(sizes.atoms),  # one that is known
                "cell": (cell / math.sqrt(3)).repeat(sizes.graphs, 1, 1),
                "pbc": torch.ones(sizes.graphs, 3, dtype=torch.bool, device=device),
                "edge_index": ghost.repeat(2, 1),  # the image of itself along the diagonal
                "cell_offsets": like.cell_offsets.new_ones(sizes.edges, 3),
            }
            self._number_ghosts(like)
            self.graph = AtomGraph()
            for name in fields:
                self.graph[name] = self._ghosts[name].clone()
        self._written: dict[str, tuple[Tensor, int | None]] = {}
        self._real = (like.n_atoms, like.n_graphs)

    def write(self, graph: AtomGraph) -> None:
        """Put structures of the same sizes in; what has not changed since is left alone."""
        if (real := (graph.n_atoms, graph.n_graphs)) != self._real:
            with torch.inference_mode(False):
                self._number_ghosts(graph)
            self._written.clear()
            self._real = real
        for name in self._fields:
            value = graph[name]
            version = None if value.is_inference() else value._version
            last, of_last = self._written.get(name, (None, None))
            if last is value and version is not None and version == of_last:
                continue
            axis = 1 if name == "edge_index" else 0
            here, n = self.graph[name], value.shape[axis]
            here.narrow(axis, 0, n).copy_(value.detach())
            rest = here.shape[axis] - n
            here.narrow(axis, n, rest).copy_(self._ghosts[name].narrow(axis, n, rest))
            self._written[name] = (value, version)

    def _number_ghosts(self, graph: AtomGraph) -> None:
        """Give each ghost structure an atom, and the last one those that are left."""
        ghosts = self.sizes.graphs - graph.n_graphs
        numbers = torch.arange(self.sizes.atoms, device=graph.pos.device) - graph.n_atoms
        batch = graph.n_graphs + numbers.clamp(max=ghosts - 1)
        natoms = torch.ones_like(self._ghosts["pbc"][:, 0], dtype=graph.natoms.dtype)
        natoms[-1] += self.sizes.atoms - graph.n_atoms - ghosts
        self._ghosts |= {"batch": batch.to(graph.batch.dtype), "natoms": natoms}


class _Held(NamedTuple):
    padded: Padded
    recording: Recording
    weights: list[Tensor]  # kept: a recording reads where they lie
    versions: list[Any]


def _switched_off() -> bool:
    return os.environ.get(ENVIRONMENT_VARIABLE) == "0"


class Captured:
    """A potential whose launches are replayed where that is known to help, else the potential.

    Arguments and results are those of the potential. A recording is made of what comes a third time
    in a row at the same sizes, and dropped where weights have changed. Threads take turns. On a
    CPU :class:`~atomeq.potential.replayed.Replayed` serves.

    Args:
        potential: In evaluation mode, its parameters frozen.
        wanted: False never records; nor does ``ATOMEQ_CAPTURE=0`` in the environment.
        record: What makes a recording; of CUDA where the potential is there.

    Attributes:
        n_recordings: How many were made.
    """

    def __init__(
        self,
        potential: Potential,
        *,
        wanted: bool = True,
        record: Callable[[Callable[[], Results]], Recording] | None = None,
    ) -> None:
        self.potential = potential
        self._wanted, self._record = wanted, record
        self.n_recordings = 0
        self._held: OrderedDict[tuple[Any, ...], _Held] = OrderedDict()
        self._recent: tuple[tuple[Any, ...], int] = ((), 0)
        self._lock = threading.Lock()
        self._on_cpu = Replayed(potential, wanted=wanted and not _switched_off())

    def __call__(self, graph: AtomGraph, properties: Sequence[PropertyKey]) -> Results:
        """Return what :meth:`Potential.forward` returns."""
        if self.refusal is not None or graph.n_edges > _MOST_EDGES:
            return self._on_cpu(graph, properties)
        self.potential.check_electrons(graph)  # fields that no recording reads
        with self._lock, torch.inference_mode(False):
            found = self._replayed(graph, tuple(properties))
        return self.potential(graph, properties) if found is None else found

    def __reduce__(self) -> tuple[Callable[..., "Captured"], tuple[Any, ...]]:
        return partial(Captured, wanted=self._wanted, record=self._record), (self.potential,)

    @cached_property
    def refusal(self) -> str | None:
        """Why nothing is recorded, or None; found at the first call: weights may move before."""
        if not self._wanted or _switched_off():
            return "it is not wanted"
        if self._record is None and self.potential.device.type != "cuda":
            return "it serves on CUDA alone"
        return refusal(self.potential)

    def _replayed(self, graph: AtomGraph, properties: tuple[PropertyKey, ...]) -> Results | None:
        """Return the results of a recording, or None where there is none yet, and will be."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        precision = self.potential.precision or matmul_precision()
        size, dtypes = Sizes.around(graph), (graph.pos.dtype, graph.cell.dtype)
        key = (*size, *dtypes, properties, chosen_backend(), precision, deterministic)
        last, n_seen = self._recent
        self._recent = key, n_seen + 1 if key == last else 1
        held = self._held.get(key)
        if held is not None and held.versions != _versions(held.weights):
            held = None
            self._held.clear()
        if held is None and self._recent[1] < _SEEN:
            return None
        if held is None and (held := self._recorded(graph, properties)) is None:
            return None
        self._held[key] = held
        self._held.move_to_end(key)
        while len(self._held) > _HELD:
            self._held.popitem(last=False)
        self.potential.warn_of_distances(graph)
        held.padded.write(graph)
        return _of_the_real(held.recording.replay(), graph)

    def _recorded(self, graph: AtomGraph, properties: tuple[PropertyKey, ...]) -> _Held | None:
        """Record; where that fails the potential is asked from now on, for want of memory once."""
        potential = self.potential
        with torch.cuda.device_of(graph.pos):
            padded = Padded(graph, graph_fields(potential.model), cutoff=potential.cutoff)
            padded.write(graph)

            def compute() -> Results:
                # Tables are those of the elements at hand, and others may be written here.
                with full_precision(graph.pos.device), exact_radial_functions():
                    return potential.derive(padded.graph, properties)

            try:
                recording = (self._record or CudaGraph)(compute)
            except torch.OutOfMemoryError:
                self._held.clear()
                return None
            except RuntimeError as error:
                self.refusal = f"recording failed: {str(error).strip().splitlines()[0]}"
                logger.warning(
                    "the launches of potential %r are not recorded on %s, so small systems wait "
                    "for their host (%s); capture=False says so beforehand",
                    *(potential.name, potential.device, self.refusal),
                )
                return None
        self.n_recordings += 1
        weights = [*potential.parameters(), *potential.buffers()]
        return _Held(padded, recording, weights, _versions(weights))


def refusal(potential: Potential) -> str | None:
    """Return why the launches of a potential cannot be recorded, whatever the device, or None."""
    if isinstance(potential, CompiledPotential):
        return "it is compiled"
    if potential.training or any(weight.requires_grad for weight in potential.parameters()):
        return "it may be trained"
    builder = potential.model.graph_builder()
    if type(builder) is not RadiusGraph:
        return f"its graphs are those of a {type(builder).__name__}"
    for part in (potential.model, *potential.terms):
        if not part.recordable:
            return f"{type(part).__name__} waits for a device or couples structures"
    return None


def _versions(weights: Sequence[Tensor]) -> list[Any]:
    """Return what tells whether weights, or what was made of them, are still the same."""
    return [(one.data_ptr(), None if one.is_inference() else one._version) for one in weights]


def _of_the_real(results: Results, graph: AtomGraph) -> Results:
    """Return copies of what belongs to the structures: the next replay writes over the results."""
    return {
        key: value[: graph.n_graphs if key in OF_STRUCTURES else graph.n_atoms].clone()
        for key, value in results.items()
    }


def _step(n: int, least: int) -> int:
    """Return the step of sizes around n, a power of 2 between an eighth and a 16th of it."""
    return max(least, 1 << max(0, n.bit_length() - 4))


def _rounded(n: int, least: int) -> int:
    step = _step(n, least)
    return max(1, -(-n // step)) * step


def _n_ghosts(edges: int) -> int:
    """Return how many ghost atoms share the edges that may be left of so many."""
    return -(-_step(edges, _LEAST) // _PER_GHOST)
