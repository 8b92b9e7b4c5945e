"""Results: Parquet parts that appear whole, and a ledger that agrees with them; each row once.

A row lives in memory, then in a part that was renamed into place, then in the ledger. A kill
between any two of these leaves a state from which :class:`Results` finds back when it is opened.
"""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from atomeq.files import write_atomically
from atomeq.screening.ledger import RUNNING, DamagedLedger, Ledger, Part
from atomeq.screening.rows import METADATA_KEY, Row, as_table

logger = logging.getLogger(__name__)

_ROWS_PER_PART = 1000
_SECONDS_PER_PART = 30.0  # what a kill costs at most, beside the structures in flight
_FORMAT = 2  # of run.json, ledger and parts; in the first the column id held the hash
_RECORDED = ["hash", "locator", "status", "kind"]


class Results:
    """Rows of a screening in a folder: ``results/*.parquet``, ``ledger.sqlite``, ``run.json``.

    One process at a time has the folder. Structures that were interrupted are simply not there,
    and are computed again.

    Args:
        folder: Created if missing.
        provenance: Of the run, as :func:`~atomeq.screening.rows.as_table` takes it.
        shard: ``(k, n)``: this process is one of n that share the folder, each with a ledger and
            parts of its own.
        request: Plain values to keep in ``run.json``: what the run was asked for.
        rebuild: Make a ledger that is damaged anew from the parts.
        rows_per_part: Rows after which a part is written.
        seconds_per_part: Seconds after which it is written anyhow.

    Raises:
        ValueError: The folder holds results of other settings, or of another number of shards, or
            its ledger is damaged.
        BlockingIOError: Another process is at work in it.
    """

    def __init__(
        self,
        folder: Path,
        provenance: dict[str, Any],
        *,
        shard: tuple[int, int] = (0, 1),
        request: dict[str, Any] | None = None,
        rebuild: bool = False,
        rows_per_part: int = _ROWS_PER_PART,
        seconds_per_part: float = _SECONDS_PER_PART,
    ) -> None:
        self.folder, self.provenance, self._request = folder, provenance, request
        self._rows_per_part, self._seconds = rows_per_part, seconds_per_part
        suffix = "" if shard[1] == 1 else f"-{shard[0]}-of-{shard[1]}"
        self._prefix = "part" if shard[1] == 1 else f"shard{suffix}-part"
        self.parts_folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder / f"lock{suffix}")
        self._rows: list[Row] = []
        self._pending: set[str] = set()
        self._since = time.monotonic()
        try:
            self._take_up_run(shard[1])
            self.ledger = self._open_ledger(folder / f"ledger{suffix}.sqlite", rebuild)
            self.ledger.stop_all()
            self._reconcile()
        except BaseException:
            os.close(self._lock)
            raise
        names = [path.stem.rpartition("-")[2] for path in self._own_parts()]
        self._next = 1 + max((int(name) for name in names), default=-1)

    @property
    def parts_folder(self) -> Path:
        """Where the parts are."""
        return self.folder / "results"

    def add(self, row: Row) -> None:
        """Take a row; it is on disk after :meth:`flush`, or when enough have come together."""
        self._rows.append(row)
        self._pending.add(row["hash"])
        self.flush_if_due()

    def flush_if_due(self) -> None:
        """Write what waits if there is enough of it or it has waited long."""
        late = time.monotonic() - self._since > self._seconds
        if len(self._rows) >= self._rows_per_part or (late and self._rows):
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait as a part."""
        self._since = time.monotonic()
        if not self._rows:
            return
        path = self.parts_folder / f"{self._prefix}-{self._next:06d}.parquet"
        self._write(path, as_table(self._rows, self.provenance))
        self.ledger.record(_part(path), self._rows)
        self._next += 1
        self._rows, self._pending = [], set()

    def has(self, identifier: str) -> bool:
        """Tell whether a row is there, on disk or waiting."""
        if identifier in self._pending:
            return True
        entry = self.ledger.entry(identifier)
        return entry is not None and entry.status != RUNNING

    def retry(self, kinds: Iterable[str] | None = None) -> int:
        """Take failures out of the results, so that the run computes them again.

        Args:
            kinds: Which, by the column ``kind``; all by default.

        Returns:
            How many.
        """
        self.flush()
        found = self.ledger.parts_of(kinds)
        for name, identifiers in found.items():
            self._remove(self.parts_folder / name, identifiers)
        return sum(map(len, found.values()))

    def filter_again(self, judge: Callable[[Row], Row]) -> None:
        """Judge the rows of parts that were written under other filters.

        Each part says in its metadata under which it was written, so that a kill on the way leaves
        parts of either kind, and the next run goes on with this.

        Args:
            judge: Gives a row as it is under the filters of this run.
        """
        now = self.provenance["settings"]["steps"]
        for path in self._own_parts():
            provenance = part_provenance(path)
            if _filters(provenance["settings"]["steps"]) == _filters(now):
                continue
            rows = [judge(row) for row in read_part(path).to_pylist()]
            settings = {**provenance["settings"], "steps": now}
            self._write(path, as_table(rows, {**provenance, "settings": settings}))
            self.ledger.record(_part(path), rows)

    def settle(self, n_seen: int, n_ended: int) -> None:
        """Compare what came out of the sources with the rows that are written.

        Args:
            n_seen: Structures that came.
            n_ended: Of them, those with a row of this or an earlier run.

        Raises:
            RuntimeError: They disagree: rows are missing or written twice.
        """
        self.flush()
        running, recorded = self.ledger.running(), sum(self.ledger.counts().values())
        written = sum(pq.read_metadata(path).num_rows for path in self._own_parts())
        if n_seen != n_ended or running or written != recorded:
            some = f", such as {', '.join(running[:3])}" if running else ""
            raise RuntimeError(
                f"of {n_seen} structures {n_ended} have ended and {len(running)} have no row"
                f"{some}; {self.parts_folder} has {written} rows, the ledger {recorded}: an engine "
                "lost or repeated some. Give the same command again to compute what is missing"
            )

    def close(self) -> None:
        """Write what waits and give the folder back."""
        try:
            self.flush()
        finally:
            self.ledger.close()
            os.close(self._lock)

    def _open_ledger(self, path: Path, rebuild: bool) -> Ledger:
        try:
            return Ledger(path)
        except DamagedLedger as error:
            if not rebuild:
                raise ValueError(
                    f"{path} is damaged ({error}); the rows themselves are in {self.parts_folder}, "
                    f"and atomeq screen --out {self.folder} --resume, or screen(..., rebuild=True) "
                    "in Python, makes the ledger anew from them"
                ) from error
            logger.warning("%s is damaged (%s); it is made anew from the parts", path, error)
        for file in (path, *path.parent.glob(f"{path.name}-*")):  # -wal and -shm belong to it
            os.replace(file, file.with_name(f"{file.name}.damaged"))
        return Ledger(path)

    def _reconcile(self) -> None:
        """Make the ledger say what the parts say."""
        for leftover in self.folder.glob(f".{self._prefix}-*"):
            leftover.unlink()  # of a writer that was killed
        known = {part.name: part for part in self.ledger.parts()}
        counts = self.ledger.counts_of_parts()
        there = {path.name: path for path in self._own_parts()}
        for name in sorted(known.keys() - there.keys()):
            logger.warning("%s is gone; its structures are computed again", name)
            self.ledger.forget(name)
        for name, path in sorted(there.items()):
            now, before = _part(path), known.get(name)
            if before is not None and now[:3] == before[:3] and now.sha256 != before.sha256:
                self._set_aside(path, "its digest is not the one in the ledger")
            elif now != before or counts.get(name) != pq.read_metadata(path).num_rows:
                self._take_up(path)

    def _take_up(self, path: Path) -> None:
        """Record a part that the ledger does not know, or knows as it was before."""
        try:
            rows = read_part(path).select(_RECORDED).to_pylist()  # all, so that all is verified
        except (ValueError, KeyError) as error:
            self._set_aside(path, str(error))
            return
        repeated = {row["hash"] for row in rows if self.ledger.elsewhere(row["hash"], path.name)}
        if repeated:
            self._remove(path, repeated)
            return
        self.ledger.record(_part(path), rows)

    def _set_aside(self, path: Path, why: str) -> None:
        aside = path.with_suffix(".damaged")
        logger.warning(
            "%s is damaged (%s); it is now %s, and its structures are computed again",
            path,
            why,
            aside.name,
        )
        os.replace(path, aside)
        self.ledger.forget(path.name)

    def _remove(self, path: Path, identifiers: set[str]) -> None:
        """Write a part anew without some rows, the file first: the ledger follows the files."""
        table = read_part(path)
        kept = table.filter(~pc.field("hash").isin(sorted(identifiers)))
        if kept.num_rows == 0:
            path.unlink()
            self.ledger.forget(path.name)
            return
        self._write(path, kept)
        self.ledger.record(_part(path), kept.select(_RECORDED).to_pylist())

    def _write(self, path: Path, table: pa.Table) -> None:
        growing = self.folder / f".{path.name}"  # in results/ only whole files ever stand
        with write_atomically(growing) as partial:
            pq.write_table(table, partial, compression="zstd", write_page_checksum=True)
        os.replace(growing, path)
        _sync(path.parent)

    def _own_parts(self) -> list[Path]:
        return sorted(self.parts_folder.glob(f"{self._prefix}-*.parquet"))

    def _take_up_run(self, n_shards: int) -> None:
        path = self.folder / "run.json"
        document = {
            "format": _FORMAT,
            "n_shards": n_shards,
            "provenance": self.provenance,
            "request": self._request,
        }
        if path.exists():
            earlier = read_run(self.folder)
            self._refuse_changes(earlier, n_shards)
            if earlier["provenance"]["settings"] == self.provenance["settings"]:
                return
            document["request"] = self._request or earlier.get("request")
        with write_atomically(path) as partial:
            partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    def _refuse_changes(self, earlier: dict[str, Any], n_shards: int) -> None:
        if earlier["provenance"]["settings_hash"] != self.provenance["settings_hash"]:
            changed = _differences(earlier["provenance"]["settings"], self.provenance["settings"])
            raise ValueError(
                f"{self.folder} holds results of other settings ({changed}); write to another "
                "folder, or give the same settings"
            )
        if earlier["n_shards"] != n_shards:
            raise ValueError(
                f"{self.folder} was begun in {earlier['n_shards']} shards, not {n_shards}; go on "
                "with as many"
            )


def read_run(folder: Path) -> dict[str, Any]:
    """Return what ``run.json`` says of the run in a folder.

    Raises:
        FileNotFoundError: There is no run.
        ValueError: The file is damaged, or an older atomeq wrote it.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no screening: it has no run.json")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not {"n_shards", "provenance"} <= document.keys():
            raise ValueError("keys are missing")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if document.get("format") != _FORMAT:
        raise ValueError(
            f"{folder} holds results in format {document.get('format', 1)} of another atomeq, and "
            f"this one has format {_FORMAT} (since 2 the column id is that of the source, and hash "
            "names a row); screen into another folder, or go on with the atomeq that began it"
        )
    return document


def result_files(folder: Path) -> list[Path]:
    """Return all parts of a run, whichever shard wrote them."""
    return sorted((folder / "results").glob("*.parquet"))


def read_rows(folder: Path, columns: list[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a run, a batch in memory at a time.

    Args:
        folder: Of the run.
        columns: Which; all by default.
    """
    for path in result_files(folder):
        with _reading(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(columns=columns):
                yield from batch.to_pylist()


def read_part(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Return a part as a table, its pages compared with their checksums.

    Args:
        path: Of the part.
        columns: Which; all by default.

    Raises:
        ValueError: It is damaged.
    """
    # A ParquetFile: read_table would also compare the schema with what it guesses from the path.
    with _reading(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read(columns=columns)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); atomeq screen --out {path.parent.parent} --resume sets "
            "it aside and computes its structures again"
        ) from error


def part_provenance(path: Path) -> dict[str, Any]:
    """Return the provenance in the metadata of a part.

    Raises:
        ValueError: It has none: it is not a part of a screening.
    """
    with _reading(path):
        metadata = pq.read_schema(path).metadata or {}
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path} is not of a screening: its metadata has no provenance")
    return json.loads(metadata[METADATA_KEY])


def _filters(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [step for step in steps if "filter" in step]


def _part(path: Path) -> Part:
    status = path.stat()
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Part(path.name, status.st_size, status.st_mtime_ns, digest)


def _sync(folder: Path) -> None:
    """Bring a rename to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise BlockingIOError(
            f"another process is screening into {path.parent}; wait for it, or take another folder"
        ) from error
    return descriptor


def _differences(earlier: Any, now: Any, name: str = "") -> str:
    if isinstance(earlier, dict) and isinstance(now, dict):
        found = (
            _differences(earlier.get(key), now.get(key), f"{name}.{key}".strip("."))
            for key in sorted(earlier.keys() | now.keys())
        )
        return ", ".join(filter(None, found))
    if isinstance(earlier, list) and isinstance(now, list) and len(earlier) == len(now):
        found = (_differences(*pair, name) for pair in zip(earlier, now, strict=True))
        return ", ".join(filter(None, found))
    return "" if earlier == now else f"{name} was {earlier!r} and is {now!r}"
