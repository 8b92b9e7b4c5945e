"""Ranking: the best rows of a run, found without holding the others."""

import contextlib
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from ase import Atoms

from atomeq.files import write_atomically
from atomeq.screening.compute import OF_A_STRUCTURE
from atomeq.screening.dedupe import Matcher, bucket_of
from atomeq.screening.ledger import Ledger
from atomeq.screening.results import read_rows, read_run
from atomeq.screening.rows import Row, schema_of, structure_of
from atomeq.screening.steps import Dedupe, Rank, Relax, Step


def best_rows(folder: Path, steps: Sequence[Step]) -> list[Row]:
    """Return the first rows of the ranking, whole, in their order.

    Rows that are done and have the number count; equal numbers are in the order of their hashes.

    Args:
        folder: Of the run.
        steps: Of the run: how it ranks, and the tolerances of dedupe where winners must differ.
    """
    step = next((step for step in steps if isinstance(step, Rank)), Rank())
    distinct = step.distinct
    if distinct is None:
        distinct = any(isinstance(step, Relax) for step in steps)
    if not distinct:
        return _first(folder, step, 0, step.top)
    tolerances = next((step for step in steps if isinstance(step, Dedupe)), Dedupe())
    with closing(Ledger(":memory:")) as ledger:
        distinct_ones = _Distinct(Matcher(tolerances, ledger))
        best: list[Row] = []
        begin, end = 0, 2 * step.top
        while rows := _first(folder, step, begin, end):
            for row in rows:
                atoms = structure_of(row)
                assert atoms is not None  # a row that is done has a structure
                if len(best) < step.top and distinct_ones.add(row["hash"], atoms):
                    best.append(row)
            if len(best) == step.top:
                break
            begin, end = end, 4 * end
    return best


class _Distinct:
    """Structures no two of which are the same."""

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher
        self._originals: list[Atoms] = []
        self._alone: dict[str, tuple[str, Atoms] | None] = {}  # by bucket: not looked at so far

    def add(self, identifier: str, atoms: Atoms) -> bool:
        """Take a structure that is none of those that are here; return whether it was one."""
        new = True
        with contextlib.suppress(*OF_A_STRUCTURE):  # what cannot be compared is no copy
            new = self._is_new(identifier, atoms)
        if new:
            self._originals.append(atoms)
        return new

    def _is_new(self, identifier: str, atoms: Atoms) -> bool:
        # Relaxed into one minimum from starts alike, most copies are told without their symmetry,
        # which is not asked either of what nothing else is to be compared with.
        if any(self._matcher.are_close(atoms, original) for original in self._originals):
            return False
        bucket = bucket_of(atoms)
        if bucket not in self._alone:
            self._alone[bucket] = identifier, atoms
            return True
        earlier, self._alone[bucket] = self._alone[bucket], None
        if earlier is not None:
            with contextlib.suppress(*OF_A_STRUCTURE):
                self._matcher.remember(*earlier)
        return self._matcher.original_of(identifier, atoms) is None


def _first(folder: Path, step: Rank, begin: int, end: int) -> list[Row]:
    """Return the rows from one place of the ranking to another."""
    sign = -1.0 if step.descending else 1.0

    def keyed() -> Iterator[tuple[float, str]]:
        for row in read_rows(folder, ["hash", "status", step.by]):
            value = row[step.by]
            if row["status"] == "done" and value is not None and math.isfinite(value):
                yield sign * value, row["hash"]

    chosen = [identifier for _, identifier in heapq.nsmallest(end, keyed())[begin:]]
    places = {identifier: place for place, identifier in enumerate(chosen)}
    wanted = (row for row in read_rows(folder) if row["hash"] in places)
    return sorted(itertools.islice(wanted, len(places)), key=lambda row: places[row["hash"]])


def write_ranking(folder: Path, rows: list[Row]) -> Path:
    """Write ``ranking.parquet`` with the columns of results, best first."""
    path = folder / "ranking.parquet"
    with write_atomically(path) as partial:
        schema = schema_of(read_run(folder)["provenance"])
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), partial, compression="zstd")
    return path
