"""Progress of long runs, and how Ctrl-C ends them."""

import contextlib
import io
import signal

import pytest
from rich.console import Console

from atomeq.cli.terminal import Meter


@pytest.fixture(autouse=True)
def interrupts():
    """A terminal's handler: background jobs of a shell ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_a_finalizer_swallows_ends_the_next_step():
    meter = Meter("md", 10, unit="steps", console=Console(file=io.StringIO()))
    with meter.running():
        with contextlib.suppress(KeyboardInterrupt):  # as Python does in __del__
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            meter.advance()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
