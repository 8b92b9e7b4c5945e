"""Radial networks with frozen weights read off tables, in single precision.

Networks of the length alone have one table, those of the elements too one for each pair that came.
A table is a polynomial of degree five for each of equal intervals; of forces it changes less than
their rounding does, and of second derivatives below 1e-4 (docs/operations.md). Double precision,
training and traces compute the networks, and so does all within :func:`exact_radial_functions`.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from atomeq.ops.coupling.irreps_conv import reads_tables
from atomeq.ops.coupling.weight_table import ROWS, WeightTable, tabulated
from atomeq.ops.dispatch import serving, size_of
from atomeq.ops.pairs.operations import pair_functions
from atomeq.typing import AtomicNumbers, EdgeIndex, EdgeVectors

_LEAST = 200  # intervals: smooth functions are then good to 1e-8 of the largest, slopes to 1e-6
_ERROR = 1e-7  # of the largest value, that tables of pairs keep
_NEAREST = 0.5  # Å; the shortest bond, of hydrogen, is 0.74 Å long
_LARGEST = 2**25  # bytes of the tables of pairs: they have to stay in a cache to be worth while
_N_ELEMENTS = 119
_SERVED = torch.float32
_PLAIN: tuple[type, ...] = (Tensor,)  # tensors that have values


class PairFunctions(Protocol):
    """Functions of an edge's length and elements, such as the networks of a model."""

    def weights(self) -> Iterable[Tensor]:
        """Yield all that the values depend on."""
        ...

    def double(self) -> "PairFunctions":
        """Return a copy in double precision."""
        ...

    def values(
        self, lengths: Tensor, numbers: AtomicNumbers, edge_index: EdgeIndex
    ) -> list[Tensor]:
        """Return the functions of each edge, tensors (n_edges, width)."""
        ...


class _Choice(threading.local):
    exact: bool = False


_choice = _Choice()


@contextmanager
def exact_radial_functions() -> Iterator[None]:
    """Compute radial networks inside the ``with`` block, in this thread, instead of reading tables.

    Example:
        >>> with exact_radial_functions():
        ...     potential(graph, ("forces",))  # doctest: +SKIP
    """
    before, _choice.exact = _choice.exact, True
    try:
        yield
    finally:
        _choice.exact = before


def tables_are_read() -> bool:
    """Whether tables serve in this thread; within :func:`exact_radial_functions` none do."""
    return not _choice.exact


class _PairTables(NamedTuple):
    """Tables of all pairs of some elements.

    Attributes:
        elements: Their atomic numbers.
        kinds: Place of each atomic number among them, (119,).
        polynomials: As of :func:`~atomeq.ops.pairs.operations.pair_functions`.
        widths: Of the functions.
    """

    elements: frozenset[int]
    kinds: Tensor
    polynomials: Tensor
    widths: list[int]


class RadialTables:
    """Tables of functions of the edge length, made at the first call and again for other weights.

    Args:
        cutoff: Where they end, Å.
        onset: A length where their curvature jumps, Å, at the bound of two intervals.
    """

    def __init__(self, cutoff: float, onset: float | None = None) -> None:
        part = 0.0 if onset is None else onset / cutoff
        choices = range(_LEAST, _LEAST + _LEAST // 2)
        self.cutoff = cutoff
        self.n_intervals = min(choices, key=lambda n: round(abs(part * n - round(part * n)), 9))
        self.step = cutoff / self.n_intervals
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        """Leave the tables out of copies and pickles."""
        return {key: value for key, value in self.__dict__.items() if key[0] != "_"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Begin without tables."""
        self.__dict__.update(state)
        # The weights are kept too: what is made from others never lies where one of these did.
        self._made: tuple[Any, list[Tensor], Sequence[Tensor]] = (None, [], ())
        self._pairs: tuple[Any, _PairTables | None, frozenset, Sequence[Tensor]]
        self._pairs = (None, None, frozenset(), ())
        self._last: tuple[Any, int, frozenset[int]] | None = None

    def serve(self, lengths: Tensor, weights: Sequence[Tensor]) -> bool:
        """Whether tables do: in single precision, for frozen weights, in kernels that read them."""
        return _allowed(lengths, weights) and reads_tables(lengths)

    def at(
        self,
        lengths: Tensor,
        weights: Sequence[Tensor],
        functions: Callable[[], Sequence[Callable[[Tensor], Tensor]]],
    ) -> list[WeightTable]:
        """Return the table of each function at the lengths of the edges.

        Args:
            lengths: (n_edges,), Å.
            weights: All that the functions depend on.
            functions: Gives them in float64; called if the tables are to be made.
        """
        state = _state(weights)
        known, tables, _ = self._made
        if known != state:
            with torch.inference_mode(False), torch.no_grad():
                made = [tabulated(one, self.step, self.n_intervals) for one in functions()]
                tables = [table.to(lengths.dtype) for table in made]
            self._made = (state, tables, weights)
        at = lengths / self.step
        return [WeightTable(at, table) for table in tables]

    def of_pairs(
        self,
        vectors: EdgeVectors,
        numbers: AtomicNumbers,
        edge_index: EdgeIndex,
        functions: PairFunctions,
    ) -> list[Tensor] | None:
        """Return functions of the edges, in the order of their values; None where they are exact.

        Args:
            vectors: (n_edges, 3), Å.
            numbers: Atomic numbers, (n_atoms,).
            edge_index: Row 0 is the source, row 1 the target.
            functions: What the tables are of, modules as they are now.
        """
        weights = list(functions.weights())
        if not _allowed(vectors, weights):
            return None
        if serving("pair_functions", size_of(vectors, 1)) == "reference":
            return None
        elements = self._elements(numbers)
        if elements is None:
            return None
        tables = self._tables_of(elements, functions, weights, like=vectors)
        if tables is None:
            return None
        kinds = tables.kinds.index_select(0, numbers)
        return pair_functions(
            *(vectors, edge_index, kinds, tables.polynomials),
            step=self.cutoff / tables.polynomials.shape[2],
            widths=tables.widths,
        )

    def _tables_of(
        self,
        elements: frozenset[int],
        functions: PairFunctions,
        weights: Sequence[Tensor],
        *,
        like: Tensor,
    ) -> _PairTables | None:
        """Return tables with all pairs of some elements; None if they are not worth while."""
        state = like.device, _state(weights)
        known, tables, refused, _ = self._pairs
        if known != state:
            tables, refused = None, frozenset()
        if tables is not None and elements <= tables.elements:
            return tables
        if elements in refused:
            return None
        together = elements if tables is None else elements | tables.elements
        made = self._tabulated(together, functions, like)
        kept, refused = (tables, refused | {elements}) if made is None else (made, refused)
        self._pairs = state, kept, refused, weights
        return made

    def _elements(self, numbers: AtomicNumbers) -> frozenset[int] | None:
        """Return which elements there are; a device is asked once for the same tensor."""
        last = self._last
        if last is not None and last[0]() is numbers and last[1] == numbers._version:
            return last[2]
        if numbers.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        found = frozenset(numbers.unique().tolist())
        self._last = weakref.ref(numbers), numbers._version, found
        return found

    def _tabulated(
        self, elements: frozenset[int], functions: PairFunctions, like: Tensor
    ) -> _PairTables | None:
        """Return tables of all pairs of elements as fine as they have to be, if these are small."""
        order = sorted(elements)
        kinds = torch.zeros(_N_ELEMENTS, dtype=torch.int64)
        kinds[torch.tensor(order)] = torch.arange(len(order))
        with torch.inference_mode(False), torch.no_grad():
            pairs = [_of_pair(functions.double(), i, j) for i in order for j in order]
            widths = [part.shape[1] for part in pairs[0](torch.ones(1, dtype=torch.float64))]
            for n_intervals in (_LEAST, 2 * _LEAST, 4 * _LEAST):
                if len(pairs) * n_intervals * ROWS * sum(widths) * like.itemsize > _LARGEST:
                    return None
                step = self.cutoff / n_intervals
                tables = [tabulated(_joined(one), step, n_intervals) for one in pairs]
                if all(_fine(*both, step) for both in zip(tables, pairs, strict=True)):
                    polynomials = torch.stack(tables).unflatten(0, (len(order), -1)).to(like)
                    return _PairTables(elements, kinds.to(like.device), polynomials, widths)
        return None


def _allowed(lengths: Tensor, weights: Sequence[Tensor]) -> bool:
    frozen = not any([weight.requires_grad for weight in weights])
    traced = torch.compiler.is_compiling() or type(lengths) not in _PLAIN
    return frozen and not traced and lengths.dtype == _SERVED and not _choice.exact


def _state(weights: Sequence[Tensor]) -> list[tuple[int, int | None]]:
    """Return what tells weights from others, and from what they were before they changed."""
    return [(one.data_ptr(), None if one.is_inference() else one._version) for one in weights]


def _of_pair(functions: PairFunctions, i: int, j: int) -> Callable[[Tensor], list[Tensor]]:
    """Return the functions of the length for a source and a target of two elements."""
    numbers = torch.tensor([i, j])

    def values(lengths: Tensor) -> list[Tensor]:
        ends = torch.tensor([[0], [1]]).expand(2, len(lengths))
        return functions.values(lengths, numbers, ends)

    return values


def _joined(values: Callable[[Tensor], list[Tensor]]) -> Callable[[Tensor], Tensor]:
    return lambda lengths: torch.cat(values(lengths), dim=1)


def _fine(table: Tensor, values: Callable[[Tensor], list[Tensor]], step: float) -> bool:
    """Whether polynomials meet the functions where they are worst, at the bounds of intervals."""
    first = 1 + int(_NEAREST / step)
    bounds = torch.arange(first, len(table), dtype=torch.float64) * step
    exact = torch.cat(values(bounds), dim=1)
    return bool((table[first:, 0] - exact).abs().max() <= _ERROR * exact.abs().max())
