"""``atomeq benchmark``: prediction files of public benchmarks."""

import signal
from typing import Any

from jsonargparse import Namespace

from atomeq.cli.door import ignorable
from atomeq.cli.screen import Observer, parse_retry, parse_shard
from atomeq.cli.terminal import Meter, say, show_table
from atomeq.cli.verbs import load, stages
from atomeq.properties.matbench_kappa import KappaSettings, predict_matbench_kappa
from atomeq.screening.matbench_discovery import predict_matbench_discovery

#: Options that a task asks for, and those that it has no use for.
_NEEDED = {"discovery": ("entries", "references"), "kappa": ()}
_USELESS = {
    "discovery": ("displacement",),
    "kappa": ("entries", "references", "engine", "workers", "address", "max_edges"),
}


def run(options: Namespace) -> int:
    """Compute what has no row yet; write the files when all have one."""
    task = options.task
    if missing := [f"--{name}" for name in _NEEDED[task] if options[name] is None]:
        raise ValueError(f"--task {task} needs {' and '.join(missing)}")
    if useless := [f"--{name}" for name in _USELESS[task] if options[name] is not None]:
        raise ValueError(
            f"--task {task} has no use for {' and '.join(useless)}; leave it out"
            + (", and share the work by --shard" if task == "kappa" else "")
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as schedulers end jobs
    return _discovery(options) if task == "discovery" else _kappa(options)


def _given(options: Namespace, **names: str) -> dict[str, Any]:
    """Return options that were given, under the names of arguments."""
    return {name: options[key] for name, key in names.items() if options[key] is not None}


def _discovery(options: Namespace) -> int:
    meter = Meter("matbench-discovery", 0, unit="structures")
    try:
        with meter.running():
            found = predict_matbench_discovery(
                options.structures,
                options.potential,
                out=options.out,
                entries=options.entries,
                references=options.references,
                **_given(options, fmax="fmax", max_steps="max_steps"),
                engine=options.engine or "local",
                workers=options.workers,
                address=options.address,
                device=options.device,
                dtype=options.dtype,
                shard=parse_shard(options.shard),
                retry=parse_retry(options.retry),
                max_edges=options.max_edges,
                ignore=ignorable(options.ignore),
                observe=Observer(meter, 0),
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"after {meter.done} structures, whose rows are written; the same command goes on"
        ) from None
    rows = [[status, str(count)] for status, count in found.summary.counts.items()]
    rows += [[f"  failed: {kind}", str(count)] for kind, count in found.summary.kinds.items()]
    show_table(["status", "structures"], rows)
    if found.missing:
        say(f"{found.missing} structures are left to other shards; the last one writes the files")
    else:
        say(f"wrote {found.discovery} and {found.geometry}")
    return 0


def _kappa(options: Namespace) -> int:
    calculator = load(options.potential, options, dtype=options.dtype or "float64")
    protocol = _given(options, displacement="displacement", fmax="fmax", max_steps="max_steps")
    try:
        with stages() as report:
            found = predict_matbench_kappa(
                options.structures,
                calculator,
                out=options.out,
                settings=KappaSettings(**protocol),
                shard=parse_shard(options.shard),
                retry=bool(parse_retry(options.retry)),
                report=report,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "in the midst of a crystal; those before it are written, and the same command goes on"
        ) from None
    counts = {"with a record": found.done, "not stable": found.unstable, "failed": found.failed}
    show_table(["crystals", ""], [[name, str(count)] for name, count in counts.items()])
    if found.missing:
        say(f"{found.missing} crystals are left to other shards; the last one writes the file")
    else:
        say(f"wrote {found.file}")
    return 0
