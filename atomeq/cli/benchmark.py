"""``atomeq benchmark``: prediction files of public benchmarks."""

import signal

from jsonargparse import Namespace

from atomeq.cli.screen import Observer, parse_retry, parse_shard
from atomeq.cli.terminal import Meter, say, show_table
from atomeq.screening.matbench_discovery import predict_matbench_discovery


def run(options: Namespace) -> int:
    """Relax what has no row yet; write the files when all have one."""
    meter = Meter("matbench-discovery", 0, unit="structures")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as schedulers end jobs
    try:
        with meter.running():
            found = predict_matbench_discovery(
                options.structures,
                options.potential,
                out=options.out,
                entries=options.entries,
                references=options.references,
                fmax=options.fmax,
                max_steps=options.max_steps,
                engine=options.engine or "local",
                workers=options.workers,
                address=options.address,
                device=options.device,
                dtype=options.dtype,
                shard=parse_shard(options.shard),
                retry=parse_retry(options.retry),
                max_edges=options.max_edges,
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
