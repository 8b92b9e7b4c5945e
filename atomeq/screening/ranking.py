"""Ranking: the best rows of a run, found without holding the others."""

import heapq
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from atomeq.files import write_atomically
from atomeq.screening.results import read_rows
from atomeq.screening.rows import SCHEMA, Row
from atomeq.screening.steps import Rank


def best_rows(folder: Path, step: Rank) -> list[Row]:
    """Return the first rows of the ranking, whole, in their order.

    Rows that are done and have the number count; equal numbers are in the order of their ids.
    """
    sign = -1.0 if step.descending else 1.0

    def keyed() -> Iterator[tuple[float, str]]:
        for row in read_rows(folder, ["id", "status", step.by]):
            value = row[step.by]
            if row["status"] == "done" and value is not None and math.isfinite(value):
                yield sign * value, row["id"]

    chosen = [identifier for _, identifier in heapq.nsmallest(step.top, keyed())]
    places = {identifier: place for place, identifier in enumerate(chosen)}
    wanted = (row for row in read_rows(folder) if row["id"] in places)
    return sorted(itertools.islice(wanted, len(places)), key=lambda row: places[row["id"]])


def write_ranking(folder: Path, rows: list[Row]) -> Path:
    """Write ``ranking.parquet`` with the columns of results, best first."""
    path = folder / "ranking.parquet"
    with write_atomically(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), partial, compression="zstd")
    return path
