"""A figure beside what was asked of it, and the table of such figures."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Judged:
    """One line of a table.

    Attributes:
        what: Was measured.
        measured: The figure, with its unit.
        asked: What it is to be; empty where nothing is asked.
        met: Whether it is; None where nothing is asked or nothing could be measured.
    """

    what: str
    measured: str
    asked: str = ""
    met: bool | None = None

    @classmethod
    def at_least(cls, what: str, figure: float, limit: float, unit: str = "") -> "Judged":
        """Judge a figure that is to be large."""
        shown, asked = (f"{number:.3g} {unit}".strip() for number in (figure, limit))
        return cls(what, shown, f">= {asked}", figure >= limit)

    @classmethod
    def at_most(cls, what: str, figure: float, limit: float, unit: str = "") -> "Judged":
        """Judge a figure that is to be small."""
        shown, asked = (f"{number:.3g} {unit}".strip() for number in (figure, limit))
        return cls(what, shown, f"<= {asked}", figure <= limit)


def table_of(title: str, lines: Iterable[Judged]) -> "Table":
    """Return the table of all lines."""
    from rich.table import Table  # the GPU check judges on machines without it

    table = Table("what", "measured", "asked", "", title=title)
    marks = {True: "met", False: "[red]MISSED", None: ""}
    for line in lines:
        table.add_row(line.what, line.measured, line.asked, marks[line.met])
    return table


def summary(lines: Iterable[Judged]) -> str:
    """Return how many bars are met and missed, and which are missed or were not measured."""
    asked = [line for line in lines if line.asked]
    missed = [f"{line.what} {line.asked}: {line.measured}" for line in asked if line.met is False]
    unknown = [f"{line.what} {line.asked}" for line in asked if line.met is None]
    text = f"bars: {sum(line.met is True for line in asked)} met, {len(missed)} missed"
    text += f" ({'; '.join(missed)})" if missed else ""
    return text + (f", {len(unknown)} not measured ({'; '.join(unknown)})" if unknown else "")
