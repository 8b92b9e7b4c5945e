"""Intake: the way of a structure from its source to the engine, unless something ends it earlier.

What is done already is passed over; what cannot be read or used, or is a copy, gets its row here.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ase import Atoms

from atomeq.screening.compute import OF_A_STRUCTURE, Candidate, refuse
from atomeq.screening.dedupe import Matcher, bucket_of
from atomeq.screening.identity import content_hash, place_hash, printable, shard_of, text_hash
from atomeq.screening.labels import Labels
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
        labels: Columns of what sources say.
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
        labels: Labels,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self._found, self._results, self._take = found, results, take
        self._elements, self._shard, self._seen = elements, shard, seen
        self._labels = labels
        self._validate = next((step for step in steps if isinstance(step, Validate)), None)
        self._dedupe = next((step for step in steps if isinstance(step, Dedupe)), None)
        self._matcher = None
        if self._dedupe is not None and self._dedupe.match == "structure":
            self._matcher = Matcher(self._dedupe, results.ledger)

    def candidates(self) -> Iterator[Candidate]:
        """Yield what the engine is to compute."""
        for given in self._found:
            found, content = _identified(given._replace(locator=printable(given.locator)))
            if not self._is_ours(content, found.atoms):
                continue
            self._seen.structures += 1
            identifier, is_copy = self._identify(content, found.locator)
            if identifier is None:
                self._seen.earlier += 1
                self._remember(content, found)
                continue
            self._results.ledger.start(identifier, found.locator)
            labels, complaint = self._labels(found.about)
            candidate = Candidate(identifier, found.locator, found.atoms or Atoms(), labels)
            if found.atoms is None or complaint:
                reason = complaint if found.atoms is not None else found.error or "no reason given"
                row = candidate.failed("read", "unreadable", reason)
            elif self._dedupe is not None and is_copy:
                row = _duplicate(candidate, content)
            else:
                row = self._judge(candidate)
            if row is None:
                yield candidate
            else:
                self._take(row)
        self._labels.warn()

    def _is_ours(self, content: str, atoms: Atoms | None) -> bool:
        k, n = self._shard
        if n == 1:
            return True
        if self._matcher is not None and atoms is not None:
            content = text_hash(bucket_of(atoms))
        return shard_of(content, n) == k

    def _identify(self, content: str, locator: str) -> tuple[str | None, bool]:
        """Return the hash of a row to come, None if it is there, and whether it is a copy."""
        copy = place_hash(content, locator)
        first = self._results.ledger.entry(content)
        if self._results.ledger.entry(copy) is not None:
            return None, True
        if first is None:
            return content, False
        if first.locator == locator:
            return None, False
        return copy, True

    def _judge(self, candidate: Candidate) -> Row | None:
        """Return the row of what ends here."""
        stage = "validate"
        try:
            if self._validate is not None:
                refusal = refuse(candidate.atoms, self._validate, self._elements)
                if refusal is not None:
                    return candidate.failed(stage, *refusal)
            if self._matcher is None:
                return None
            stage = "dedupe"
            original = self._matcher.original_of(candidate.hash, candidate.atoms)
        except OF_A_STRUCTURE as error:
            return candidate.failed(stage, "error", f"{type(error).__name__}: {error}")
        return None if original is None else _duplicate(candidate, original)

    def _remember(self, content: str, found: Found) -> None:
        """Keep what was computed earlier for comparison, where a ledger that was lost kept it."""
        entry = self._results.ledger.entry(content)
        if self._matcher is None or found.atoms is None or entry is None:
            return
        if entry.locator != found.locator or entry.status not in ("done", "filtered", "failed"):
            return
        with contextlib.suppress(*OF_A_STRUCTURE):  # then it was refused, as its row says
            validate = self._validate or Validate()
            if entry.status != "failed" or not refuse(found.atoms, validate, self._elements):
                self._matcher.remember(content, found.atoms)


def _identified(found: Found) -> tuple[Found, str]:
    """Return what was found with its hash; what has none cannot be read."""
    if found.atoms is not None:
        try:
            return found, content_hash(found.atoms)
        except (*OF_A_STRUCTURE, AttributeError) as error:  # no Atoms, or arrays that do not fit
            found = found._replace(atoms=None, error=f"{type(error).__name__}: {error}")
    return found, place_hash("unreadable", found.locator)


def _duplicate(candidate: Candidate, original: str) -> Row:
    return candidate.row(
        status="duplicate",
        stage="dedupe",
        kind="duplicate",
        reason=f"same structure as {original}",
        duplicate_of=original,
    )
