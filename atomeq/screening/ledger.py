"""The ledger: which structures are done, failed or running, in SQLite beside the results.

The Parquet parts are the truth; the ledger says in which part a row lies, so that a run can go on
without reading them. Both survive SIGKILL; results.py brings them together again at the start.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from atomeq.screening.rows import Row

_SCHEMA = """
CREATE TABLE IF NOT EXISTS parts (
    name TEXT PRIMARY KEY, size INTEGER NOT NULL, modified INTEGER NOT NULL, sha256 TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS structures (
    hash TEXT PRIMARY KEY, locator TEXT NOT NULL, status TEXT NOT NULL, kind TEXT, part TEXT
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS structures_part ON structures (part);
CREATE INDEX IF NOT EXISTS structures_status ON structures (status, kind);
CREATE TABLE IF NOT EXISTS representatives (
    hash TEXT PRIMARY KEY, bucket TEXT NOT NULL, size REAL NOT NULL, structure BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS representatives_bucket ON representatives (bucket, size);
"""

RUNNING = "running"


class Part(NamedTuple):
    """A file of results as it was recorded: bytes, nanoseconds of the clock, digest."""

    name: str
    size: int
    modified: int
    sha256: str


class DamagedLedger(ValueError):
    """A file that is no ledger, or no longer a whole one; the message says what SQLite found."""


class Entry(NamedTuple):
    """What the ledger knows of a row; ``status`` is that of the row, or ``running``."""

    locator: str
    status: str


class Ledger:
    """One SQLite file in WAL mode, written by one process.

    Args:
        path: The file, created if missing; ``:memory:`` for none.

    Raises:
        DamagedLedger: The file is not whole.
    """

    def __init__(self, path: Path | str) -> None:
        self._database = sqlite3.connect(path, isolation_level=None)
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise DamagedLedger(str(error)) from error

    def _open(self) -> None:
        self._database.execute("PRAGMA journal_mode=WAL")
        (found,) = self._database.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(" ".join(found.split()))
        # A crash of the machine may undo the last commits; the parts are there to tell.
        self._database.execute("PRAGMA synchronous=NORMAL")
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of what the block writes, or nothing; joins a transaction that is open."""
        if self._database.in_transaction:
            yield
            return
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def entry(self, identifier: str) -> Entry | None:
        """Return what is known of a row."""
        found = self._database.execute(
            "SELECT locator, status FROM structures WHERE hash = ?", (identifier,)
        ).fetchone()
        return None if found is None else Entry(*found)

    def start(self, identifier: str, locator: str) -> None:
        """Note that work on a structure begins."""
        self._database.execute(
            "INSERT OR REPLACE INTO structures VALUES (?, ?, ?, NULL, NULL)",
            (identifier, locator, RUNNING),
        )

    def stop_all(self) -> None:
        """Forget what was running when an earlier process ended."""
        self._database.execute("DELETE FROM structures WHERE status = ?", (RUNNING,))

    def record(self, part: Part, rows: Iterable[Row]) -> None:
        """Note a part and the rows in it, in place of what was known of either."""
        with self.transaction():
            self._database.execute("DELETE FROM structures WHERE part = ?", (part.name,))
            self._database.execute("INSERT OR REPLACE INTO parts VALUES (?, ?, ?, ?)", part)
            self._database.executemany(
                "INSERT OR REPLACE INTO structures VALUES (?, ?, ?, ?, ?)",
                (
                    (row["hash"], row["locator"], row["status"], row.get("kind"), part.name)
                    for row in rows
                ),
            )

    def forget(self, name: str) -> None:
        """Forget a part and its rows."""
        with self.transaction():
            self._database.execute("DELETE FROM structures WHERE part = ?", (name,))
            self._database.execute("DELETE FROM parts WHERE name = ?", (name,))

    def parts(self) -> list[Part]:
        """Return the parts that are known, by name."""
        found = self._database.execute("SELECT * FROM parts ORDER BY name")
        return [Part(*row) for row in found]

    def elsewhere(self, identifier: str, name: str) -> bool:
        """Tell whether a row is recorded in another part than ``name``."""
        return bool(
            self._database.execute(
                "SELECT 1 FROM structures WHERE hash = ? AND part IS NOT NULL AND part != ?",
                (identifier, name),
            ).fetchone()
        )

    def parts_of(self, kinds: Iterable[str] | None) -> dict[str, set[str]]:
        """Return the failed rows of some kinds, or all that failed, as hashes by part."""
        wanted = None if kinds is None else set(kinds)
        found: dict[str, set[str]] = {}
        for identifier, kind, part in self._database.execute(
            "SELECT hash, kind, part FROM structures WHERE status = 'failed' AND part IS NOT NULL"
        ):
            if wanted is None or kind in wanted:
                found.setdefault(part, set()).add(identifier)
        return found

    def running(self) -> list[str]:
        """Return the locators of structures without a row yet."""
        found = self._database.execute(
            "SELECT locator FROM structures WHERE status = ? ORDER BY locator", (RUNNING,)
        )
        return [locator for (locator,) in found]

    def counts_of_parts(self) -> dict[str, int]:
        """Return the number of rows in each part."""
        return dict(
            self._database.execute(
                "SELECT part, COUNT(*) FROM structures WHERE part IS NOT NULL GROUP BY part"
            )
        )

    def counts(self) -> dict[str, int]:
        """Return the number of rows of each status; ``running`` are those without a row yet."""
        return dict(
            self._database.execute(
                "SELECT status, COUNT(*) FROM structures GROUP BY status ORDER BY status"
            )
        )

    def kinds(self) -> dict[str, int]:
        """Return the number of failures of each kind, the most frequent first."""
        return dict(
            self._database.execute(
                "SELECT kind, COUNT(*) FROM structures WHERE status = 'failed' GROUP BY kind "
                "ORDER BY COUNT(*) DESC, kind"
            )
        )

    def represent(self, identifier: str, bucket: str, size: float, structure: bytes) -> None:
        """Keep a structure that later ones are compared with."""
        self._database.execute(
            "INSERT OR IGNORE INTO representatives VALUES (?, ?, ?, ?)",
            (identifier, bucket, size, structure),
        )

    def representatives(
        self, bucket: str, smallest: float, largest: float
    ) -> list[tuple[str, bytes]]:
        """Return hashes and structures of a bucket with a size between two, in order of size."""
        found = self._database.execute(
            "SELECT hash, structure FROM representatives WHERE bucket = ? AND size BETWEEN ? AND ? "
            "ORDER BY size, hash",
            (bucket, smallest, largest),
        )
        return found.fetchall()

    def has_representative(self, identifier: str) -> bool:
        """Tell whether a structure is kept for comparison."""
        return bool(
            self._database.execute(
                "SELECT 1 FROM representatives WHERE hash = ?", (identifier,)
            ).fetchone()
        )
