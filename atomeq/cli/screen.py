"""``atomeq screen``: from a pile of structures to a ranked, explained table."""

import os
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from atomeq.cli.door import ignorable
from atomeq.cli.terminal import Meter, say, show_table
from atomeq.potential.checkpoint import load_potential
from atomeq.potential.folders import split_head
from atomeq.screening.dry_run import Estimate, estimate
from atomeq.screening.export import export_chemiscope, export_database
from atomeq.screening.intake import Seen
from atomeq.screening.results import read_run
from atomeq.screening.rows import Row
from atomeq.screening.run import Summary, screen
from atomeq.screening.sources import count_structures, read_sources
from atomeq.screening.steps import DEFAULT_STEPS, Rank, parse_steps, read_steps


def run(options: Namespace) -> int:
    """Screen, or tell what it would take."""
    if options.resume and not options.sources:
        _take_up(options)
    if not options.sources or not options.potential:
        raise ValueError("give SOURCE and --potential, or --resume with the --out of a run")
    if options.dry_run:
        return _dry_run(options)
    return _run(options)


def _take_up(options: Namespace) -> None:
    """Fill in what the run in the folder was asked for."""
    request = read_run(Path(options.out)).get("request")
    if not request:
        raise ValueError(
            f"{options.out} was not begun by this command, and does not know its sources; give them"
        )
    for name in ("potential", "device", "dtype", "max_edges"):
        setattr(options, name, request[name])
    options.precision = request.get("precision")  # runs of before it do not have it
    options.ignore = ",".join(request.get("ignore", []))
    for name in ("engine", "workers", "address"):  # another one gives the same rows
        if options[name] is None:
            setattr(options, name, request[name])
    options.sources = request["sources"]
    options.id_key, options.info = request["id_key"], ",".join(request["info"]) or None
    options.steps = request["steps"]
    options.working_directory = request["working_directory"]


def _steps(options: Namespace) -> list[Any]:
    """Return the list of steps with what the command line says of relax."""
    if "steps" in options:
        return list(options.steps)
    steps = list(read_steps(options.config) if options.config else DEFAULT_STEPS)
    given = {"fmax": options.fmax, "max_steps": options.max_steps, "cell": options.cell or None}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return steps
    places = [k for k, step in enumerate(steps) if step == "relax" or "relax" in _keys(step)]
    if not places:
        raise ValueError(f"{options.config} has no step relax, which --{next(iter(given))} is for")
    own = steps[places[0]]["relax"] if isinstance(steps[places[0]], dict) else {}
    steps[places[0]] = {"relax": {**(own or {}), **given}}
    return steps


def _keys(step: Any) -> tuple[str, ...]:
    return tuple(step) if isinstance(step, dict) else ()


def _run(options: Namespace) -> int:
    steps = _steps(options)
    parse_steps(steps)
    directory = options.working_directory if "working_directory" in options else os.getcwd()
    whole = [str(Path(directory, source)) for source in options.sources]
    request = {
        "sources": options.sources,
        "working_directory": directory,
        "potential": _absolute(options.potential),
        "steps": steps,
        "device": options.device,
        "dtype": options.dtype,
        "precision": options.precision,
        "ignore": ignorable(options.ignore),
        "max_edges": options.max_edges,
        "id_key": options.id_key,
        "info": options.info.split(",") if options.info else [],
        "engine": options.engine,
        "workers": options.workers,
        "address": options.address,
    }
    found = read_sources(options.sources, working_directory=directory)
    shard = parse_shard(options.shard)
    meter = Meter("screen", 0, unit="structures")
    observer = Observer(meter, (count_structures(whole) or 0) // shard[1])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as schedulers end jobs
    try:
        with meter.running():
            summary = screen(
                found,
                request["potential"],
                out=options.out,
                steps=steps,
                engine=options.engine or "local",
                workers=options.workers,
                address=options.address,
                device=options.device,
                dtype=options.dtype,
                precision=options.precision,
                ignore=request["ignore"],
                shard=shard,
                retry=parse_retry(options.retry),
                max_edges=options.max_edges,
                id_key=options.id_key,
                info=request["info"],
                rebuild=options.resume,
                observe=observer,
                request=request,
            )
    except KeyboardInterrupt:
        shown = f" --shard {options.shard}" if options.shard else ""
        raise KeyboardInterrupt(
            f"after {meter.done} structures, whose rows are written; go on with: "
            f"atomeq screen --out {shlex.quote(options.out)}{shown} --resume"
        ) from None
    _tell(summary, parse_steps(steps))
    _export(options)
    return 0


class Observer:
    """Moves the meter as rows come; what earlier runs did is not part of its total."""

    def __init__(self, meter: Meter, n_structures: int) -> None:
        self._meter, self._n_structures = meter, n_structures

    def __call__(self, seen: Seen, row: Row | None) -> None:
        """Take a new row, or None at the end, and what has been seen so far."""
        known = max(self._n_structures, seen.structures) - seen.earlier
        # Sources that do not tell how many they hold have at least one more, until the end.
        self._meter.total = max(known, seen.rows + (self._n_structures == 0))
        if row is None:
            self._meter.total = seen.rows
        earlier = f", {seen.earlier} done earlier" if seen.earlier else ""
        self._meter.advance(seen.rows - self._meter.done, note=f"{seen.failed} failed{earlier}")


def _dry_run(options: Namespace) -> int:
    directory = options.working_directory if "working_directory" in options else os.getcwd()
    whole = [str(Path(directory, source)) for source in options.sources]
    potential = load_potential(_absolute(options.potential), device=options.device)
    potential.ignore(ignorable(options.ignore))
    found: Estimate = estimate(
        read_sources(options.sources, working_directory=directory),
        potential,
        parse_steps(_steps(options)),
        total=count_structures(whole),
        workers=options.workers or 1,
    )
    show_table(["estimate", "value"], found.table())
    return 0


def _tell(summary: Summary, steps: Sequence[Any]) -> None:
    rows = [[status, str(count)] for status, count in summary.counts.items()]
    rows += [[f"  failed: {kind}", str(count)] for kind, count in summary.kinds.items()]
    rows.append(["seconds", f"{summary.seconds:.1f}"])
    show_table(["status", "structures"], rows)
    rank = next((step for step in steps if isinstance(step, Rank)), None)
    if rank is not None:
        best = summary.best[:10]
        named = ["id"] if any(row["id"] for row in best) else []
        columns = list(dict.fromkeys([*named, "formula", rank.by, "energy_per_atom", "locator"]))
        show_table(columns, [[_text(row[name]) for name in columns] for row in best])
    say(f"wrote {summary.folder}/results and {summary.report}")


def _text(value: Any) -> str:
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def _export(options: Namespace) -> None:
    folder = Path(options.out)
    for path, write in (
        (options.export_db, export_database),
        (options.export_chemiscope, export_chemiscope),
    ):
        if path:
            say(f"wrote {write(folder, Path(path))} structures to {path}")


def _absolute(potential: str) -> str:
    """Return the folder of a potential wherever the run goes on; shipped names and heads stay."""
    name, head = split_head(potential)
    folder = str(Path(name).resolve()) if Path(name).is_dir() else str(name)
    return folder + (f"@{head}" if head else "")


def parse_shard(text: str | None) -> tuple[int, int]:
    """Return ``(k, n)`` of k/n, or that of this task of a SLURM array for auto."""
    if text is None:
        return 0, 1
    if text == "auto":
        try:
            first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
            task, count = os.environ["SLURM_ARRAY_TASK_ID"], os.environ["SLURM_ARRAY_TASK_COUNT"]
        except KeyError as error:
            raise ValueError(f"--shard auto is for SLURM arrays: {error} is not set") from error
        return int(task) - first, int(count)
    k, slash, n = text.partition("/")
    if not (slash and k.isdigit() and n.isdigit()):
        raise ValueError(f"--shard is k/n, such as 0/8, or auto, not {text!r}")
    return int(k), int(n)


def parse_retry(text: str | None) -> list[str] | bool:
    """Return the kinds of failures to compute again; True for all, False for none."""
    if text is None:
        return False
    return True if text == "all" else [kind.strip() for kind in text.split(",")]
