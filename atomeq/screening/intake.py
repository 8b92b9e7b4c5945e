"""Intake: the way of a structure from its source to the engine, unless something ends it earlier.

What is done already is passed over; what cannot be read or used, or is a copy, gets its row here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ase import Atoms

from atomeq.screening.compute import Candidate, refuse
from atomeq.screening.dedupe import Matcher, bucket_of
from atomeq.screening.identity import content_hash, place_hash, shard_of, text_hash
from atomeq.screening.results import Results
from atomeq.screening.rows import Row
from atomeq.screening.sources import Found
from atomeq.screening.steps import Dedupe, Step, Validate


@dataclass
class Seen:
    """What came out of the sources, and what of it has ended.

    Attributes:
        structures: Everything, readable or not, of this shard.
        earlier: Of them, those whose rows were there before.
        rows: Of them, those that got their row in this run.
        failed: Of these rows, the failures.
    """

    structures: int = 0
    earlier: int = 0
    rows: int = 0
    failed: int = 0


class Intake:
    """Turns a stream of what sources hold into candidates for the engine.

    Args:
        found: The stream.
        results: Knows what is done.
        take: Takes the rows of what ends here.
        steps: All steps.
        elements: Atomic numbers that the potential knows.
        seen: Is kept up to date.
        shard: ``(k, n)``: only every n-th, by hash; where copies are looked for, by the hash of the
            formula, so that a copy is in the shard of its original.
    """

    def __init__(
        self,
        found: Iterable[Found],
        results: Results,
        take: Callable[[Row], None],
        *,
        steps: Sequence[Step],
        elements: Sequence[int],
        seen: Seen,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self._found, self._results, self._take = found, results, take
        self._elements, self._shard, self._seen = elements, shard, seen
        self._validate = next((step for step in steps if isinstance(step, Validate)), None)
        self._dedupe = next((step for step in steps if isinstance(step, Dedupe)), None)
        self._matcher = None
        if self._dedupe is not None and self._dedupe.match == "structure":
            self._matcher = Matcher(self._dedupe, results.ledger)

    def candidates(self) -> Iterator[Candidate]:
        """Yield what the engine is to compute."""
        for found in self._found:
            unreadable = found.atoms is None
            content = (
                place_hash("unreadable", found.locator)
                if found.atoms is None
                else content_hash(found.atoms)
            )
            if not self._is_ours(content, found.atoms):
                continue
            self._seen.structures += 1
            identifier, is_copy = self._identify(content, found.locator)
            if identifier is None:
                self._seen.earlier += 1
                continue
            self._results.ledger.start(identifier, found.locator)
            candidate = Candidate(identifier, content, found.locator, found.atoms or Atoms())
            row = (
                candidate.failed("read", "unreadable", found.error)
                if unreadable
                else self._judge(candidate, is_copy)
            )
            if row is None:
                yield candidate
            else:
                self._take(row)

    def _is_ours(self, content: str, atoms: Atoms | None) -> bool:
        k, n = self._shard
        if n == 1:
            return True
        if self._matcher is not None and atoms is not None:
            content = text_hash(bucket_of(atoms))
        return shard_of(content, n) == k

    def _identify(self, content: str, locator: str) -> tuple[str | None, bool]:
        """Return the id of a row to come, None if it is there, and whether it is a further copy."""
        copy = place_hash(content, locator)
        first = self._results.ledger.entry(content)
        if self._results.ledger.entry(copy) is not None:
            return None, True
        if first is None:
            return content, False
        if first.locator == locator:
            return None, False
        return copy, True

    def _judge(self, candidate: Candidate, is_copy: bool) -> Row | None:
        """Return the row of what ends here."""
        if self._dedupe is not None and is_copy:
            return self._duplicate(candidate, candidate.hash)
        if self._validate is not None:
            refusal = refuse(candidate.atoms, self._validate, self._elements)
            if refusal is not None:
                return candidate.failed("validate", *refusal)
        if self._matcher is None:
            return None
        try:
            original = self._matcher.original_of(candidate.id, candidate.atoms)
        except (ValueError, ArithmeticError, RuntimeError, TypeError) as error:
            reason = f"comparison: {type(error).__name__}: {error}"
            return candidate.failed("dedupe", "error", reason)
        return None if original is None else self._duplicate(candidate, original)

    @staticmethod
    def _duplicate(candidate: Candidate, original: str) -> Row:
        return candidate.row(
            status="duplicate",
            stage="dedupe",
            kind="duplicate",
            reason=f"same structure as {original}",
            duplicate_of=original,
        )
