"""What verbs with a potential share: loading, progress, summaries."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ase import Atoms
from jsonargparse import Namespace

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli.door import ignorable
from atomeq.cli.structures import write_summary
from atomeq.cli.terminal import Meter, say, show_table
from atomeq.graph.convert import validate_structure
from atomeq.graph.files import read_structures
from atomeq.properties.single_points import Report


def prepare(options: Namespace, *, index: str) -> tuple[AtomeqCalculator, list[Atoms]]:
    """Read the structures, load the potential and refuse what it cannot compute."""
    structures = read_structures(options.input, index=index)
    head = f"@{options.head}" if options.head else ""
    calculator = load(options.potential + head, options)
    for number, atoms in enumerate(structures):
        validate_structure(
            atoms, name=f"{options.input}[{number}]", known_elements=calculator.elements
        )
    return calculator, structures


def load(potential: str, options: Namespace, **how: Any) -> AtomeqCalculator:
    """Return the calculator of a potential, on the device and with the precision of a run."""
    given = {name: options.get(name) for name in ("device", "dtype", "precision")}
    return AtomeqCalculator(potential, **given | how, ignore=ignorable(options.ignore))


def settings(options: Namespace) -> dict[str, Any]:
    """Return the options of a run as a summary tells them."""
    hidden = ("input", "out", "overwrite")
    return {key: value for key, value in options.as_dict().items() if key not in hidden}


@contextmanager
def stages() -> Iterator[Report]:
    """Show the stages of a property as meters, one after the other."""
    with ExitStack() as stack:
        meters: dict[str, Meter] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in meters:
                stack.close()
                meters[stage] = Meter(stage, total, unit="structures", done=done)
                stack.enter_context(meters[stage].running())
            meters[stage].advance(done - meters[stage].done)

        yield report


def finish(
    verb: str,
    options: Namespace,
    calculator: AtomeqCalculator,
    results: dict[str, Any],
    files: Sequence[Path],
) -> None:
    """Write the summary of a property, show its numbers and name the files."""
    summary = write_summary(
        verb,
        options.out,
        source=options.input,
        calculator=calculator,
        settings=settings(options),
        results=results,
    )
    flat = {**results, **results.get("thermal", {})}
    rows = [[key, _shown(value)] for key, value in flat.items() if not isinstance(value, dict)]
    show_table(["quantity", "value"], [row for row in rows if row[0] != "stiffness_GPa"])
    say(f"wrote {options.out}, {', '.join(map(str, files))} and {summary}")


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
