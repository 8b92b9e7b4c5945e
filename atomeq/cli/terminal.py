"""What all verbs share in talking to a terminal: the parser, the progress bar, tables."""

import argparse
import importlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from atomeq.cli.plain_text import printable

_QUIET_SECONDS = 5.0  # between two lines of plain progress


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep line breaks of descriptions, and name defaults but not Python types."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = action.default is None or action.default is False
        if silent or action.default == argparse.SUPPRESS or not action.option_strings:
            return text
        return f"{text} (default: %(default)s)"


class Parser(ArgumentParser):
    """A jsonargparse parser whose errors are one line, exit code 2.

    It needs no torch: what is wrong with the words is said before the module that does the work,
    and with it torch, is imported.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, formatter_class=HelpFormatter)
        self._doors: dict[str, Callable[[Any], object]] = {}
        self._outputs: Callable[[Namespace], None] | None = None

    def door(self, **checks: Callable[[Any], object]) -> None:
        """Check the values of options once they are parsed; a check raises what is wrong."""
        self._doors.update(checks)

    def serve(self, words: Sequence[str], work: str) -> int:
        """Parse words, refuse what is wrong with them, then import what does the work and call it.

        Args:
            words: Without the verb.
            work: ``module:function``; the function takes the options and returns the exit code.
        """
        options = self.parse_args(list(words))
        for name, check in self._doors.items():
            value = options.get(name)
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    check(one)
        if self._outputs is not None:
            self._outputs(options)
        module, _, function = work.partition(":")
        return getattr(importlib.import_module(module), function)(options)

    def add_overwrite(self, check: Callable[[Namespace], None] | None = None) -> None:
        """Add the option without which no output is replaced, and the check that none is."""
        self.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
        self._outputs = check

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Write the message with the way to the help, and exit."""
        text = printable(" ".join(message.split()))
        sys.stderr.write(f"{self.prog}: error: {text}; see {self.prog} --help\n")
        sys.exit(2)


class Meter:
    """Progress of a known number of steps: a bar on a terminal, a line now and then elsewhere.

    Args:
        label: What is being done.
        total: Number of steps.
        unit: Name of a step, in plural.
        done: Steps that an earlier run has done.
        console: Where to report; standard error by default, so that output can be piped.
    """

    def __init__(
        self, label: str, total: int, *, unit: str, done: int = 0, console: Console | None = None
    ) -> None:
        self.label, self.total, self.unit = printable(label), total, unit
        self.console = console if console is not None else Console(stderr=True)
        self.done = self._done_before = done
        self._told: tuple[int, str] | None = None  # what the last line said
        self.started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._interrupted = False

    @contextmanager
    def running(self) -> Iterator["Meter"]:
        """Show the progress while the block runs; Ctrl-C ends it at the next step at the latest."""
        with self._heeding_interrupts():
            yield from self._showing()

    @contextmanager
    def _heeding_interrupts(self) -> Iterator[None]:
        """Remember Ctrl-C: Python drops a KeyboardInterrupt that is raised in a finalizer."""

        def interrupt(number: int, frame: FrameType | None) -> NoReturn:
            self._interrupted = True
            raise KeyboardInterrupt

        before = signal.getsignal(signal.SIGINT)
        main = threading.current_thread() is threading.main_thread()  # signals are this thread's
        if not main or before is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _showing(self) -> Iterator["Meter"]:
        if not self.console.is_terminal:
            yield self
            return
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        with bar:
            self._task = bar.add_task(self.label, total=self.total, completed=self.done, rate="")
            self._bar = bar
            yield self

    def advance(self, steps: int = 1, *, note: str = "") -> None:
        """Count steps done and tell something about them."""
        note = printable(note)
        if self._interrupted:
            raise KeyboardInterrupt
        self.done += steps
        if self._bar is not None:
            rate = f"{self.rate:.1f} {self.unit}/s {note}"
            self._bar.update(self._task, completed=self.done, total=self.total, rate=rate)
            return
        now = time.monotonic()
        early = self.done < self.total and now - self._last_line < _QUIET_SECONDS
        if early or self._told == (self.done, note):
            return
        self._last_line, self._told = now, (self.done, note)
        self.console.file.write(f"{self.line()}{', ' + note if note else ''}\n")
        self.console.file.flush()

    def skip(self, steps: int) -> None:
        """Count steps that an earlier run has done."""
        self.done += steps
        self._done_before += steps

    def line(self) -> str:
        """Return the progress in words."""
        counted = f"{self.done}/{self.total} {self.unit}, {self.rate:.1f} {self.unit}/s"
        if not self.rate:
            return f"{self.label}: {counted}"
        return f"{self.label}: {counted}, {(self.total - self.done) / self.rate:.0f} s left"

    @property
    def rate(self) -> float:
        """Steps per second of this run so far."""
        return (self.done - self._done_before) / self.seconds

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return max(time.monotonic() - self.started, 1e-9)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, most: int = 20) -> None:
    """Write a table to standard output, the first rows of a long one."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        justify = "left" if column == columns[0] else "right"
        table.add_column(Text(printable(column)), justify=justify, no_wrap=True)
    for row in rows[:most]:
        table.add_row(*(Text(printable(cell)) for cell in row))  # no markup: "[red]" is a name
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # nobody wraps a file
    console.print(table)
    if len(rows) > most:
        console.print(f"... and {len(rows) - most} more")


def say(text: str) -> None:
    """Write a line to standard output."""
    sys.stdout.write(printable(text) + "\n")
    sys.stdout.flush()
