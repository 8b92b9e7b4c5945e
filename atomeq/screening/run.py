"""screen(): sources in, a folder of results out; called again it goes on where it was ended."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from atomeq.potential.potential import Potential
from atomeq.screening.compute import Candidate
from atomeq.screening.engine_processes import ProcessEngine
from atomeq.screening.engine_ray import RayEngine
from atomeq.screening.engines import Engine, Job, LocalEngine
from atomeq.screening.filters import Filters
from atomeq.screening.intake import Intake, Seen
from atomeq.screening.labels import Labels
from atomeq.screening.provenance import provenance_of
from atomeq.screening.ranking import best_rows, write_ranking
from atomeq.screening.report import write_report
from atomeq.screening.results import Results
from atomeq.screening.rows import Row
from atomeq.screening.sources import Found, read_sources
from atomeq.screening.steps import Rank, Step, describe_steps, parse_steps
from atomeq.typing import Precision

EngineName = Literal["local", "processes", "ray"]


@dataclass
class Summary:
    """What a run has come to.

    Attributes:
        folder: Of the results.
        counts: Rows by status, of this and earlier runs into the folder.
        kinds: Failures by kind.
        seen: What came out of the sources this time.
        seconds: What this run took.
        ranking: The ranking's file, where a rank was asked for.
        report: The HTML file.
        best: The first rows of the ranking.
    """

    folder: Path
    counts: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)
    seconds: float = 0.0
    ranking: Path | None = None
    report: Path | None = None
    best: list[Row] = field(default_factory=list)


def screen(
    sources: str | Path | Sequence[str | Path] | Iterable[Found],
    potential: str | Path | Potential,
    *,
    out: str | Path,
    steps: Sequence[Any] | None = None,
    engine: EngineName = "local",
    workers: int | None = None,
    address: str | None = None,
    device: str | None = None,
    dtype: Literal["float32", "float64"] | None = None,
    precision: Precision | None = None,
    ignore: Sequence[str] = (),
    shard: tuple[int, int] = (0, 1),
    retry: Sequence[str] | bool = False,
    max_edges: int | None = None,
    id_key: str | None = None,
    info: Sequence[str] = (),
    rebuild: bool = False,
    observe: Callable[[Seen, Row | None], None] | None = None,
    request: dict[str, Any] | None = None,
) -> Summary:
    """Screen structures: validate, leave out copies, relax, compute properties, filter and rank.

    Results are rows in ``out/results/*.parquet``, one per structure, bad ones with their reason.
    Calling it again with the same folder and settings computes only what has no row yet, also
    after the process was killed. Filters and the ranking may differ: rows are judged again.

    Args:
        sources: Files and folders, read as a stream; or a stream of
            :class:`~atomeq.screening.sources.Found` of your own, the same in every run.
        potential: Name or folder, or a potential.
        out: Folder, created if missing.
        steps: As :func:`~atomeq.screening.steps.parse_steps` reads them; by default validate,
            dedupe, relax, properties, rank.
        engine: ``local`` computes in this process, ``processes`` in several, ``ray`` on a cluster.
        workers: How many, by default as many as GPUs, on the CPU half the cores.
        address: Of the Ray cluster; by default one is started on this machine.
        device: ``cpu`` or ``cuda``, which is spread over the GPUs by several workers; by default
            where a potential that is given is, and the CPU for a name.
        dtype: Precision of the network; by default that of the potential.
        precision: Of tensor products on a GPU, as of load_potential(); by default the potential's.
        ignore: ``charge``, ``spin``: compute structures that carry them as if they did not, where
            the potential knows neither; by default such are rows that failed.
        shard: ``(k, n)``: take every n-th structure, by hash; n such runs share the folder.
        retry: Compute failures again: True for all, or the kinds, such as ``["overlap"]``.
        max_edges: Edges computed at once by each worker.
        id_key: What sources call their ids: a key of ``atoms.info`` or column of Parquet; else as
            :class:`~atomeq.screening.labels.Labels` finds it.
        info: Further such keys that become columns, texts or, as ``band_gap:number``, numbers.
        rebuild: Make a ledger that is damaged anew from the results.
        observe: Called with what has been seen so far and each new row, and at the end with None.
        request: Plain values kept in ``run.json``, from which a caller takes up the run.

    Returns:
        What came of it.

    Raises:
        ValueError: A setting is not allowed, the folder holds results of other settings, or its
            ledger is damaged.
        RuntimeError: A structure that came out of the sources has no row.
        Exception: Whatever the stream of sources raised; what came before has its rows.
        KeyboardInterrupt: It was interrupted; what was computed is written.

    Example:
        >>> steps = ["validate", {"relax": {"fmax": 0.05}}, {"filter": "energy_per_atom < -3.5"}]
        >>> screen("structures/", "cu-pbe", out="screening", steps=steps)  # doctest: +SKIP
    """
    started = time.perf_counter()
    _refuse_shard(shard)
    parsed = parse_steps(steps)
    described = describe_steps(parsed)
    name = potential if isinstance(potential, Potential) else str(potential)
    seen, labels = Seen(), Labels(id_key, info)
    device = device or str(getattr(potential, "device", "cpu"))
    job = Job(name, described, device, dtype, max_edges, precision, tuple(ignore))
    loaded = job.load(name, job.device_of(0))
    provenance = provenance_of(name, loaded, described, columns=labels.settings)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = provenance["potential"]["sha256"]
    chosen = _engine(engine, job, sha256, workers=workers, address=address)
    options: dict[str, Any] = {"shard": shard, "request": request, "rebuild": rebuild}
    with closing(Results(folder, provenance, **options)) as results:
        results.filter_again(Filters(parsed))
        if retry:
            results.retry(None if retry is True else retry)
        take = partial(_take, results, seen, observe)
        intake = Intake(
            _stream(sources),
            results,
            take,
            steps=parsed,
            elements=loaded.elements,
            seen=seen,
            labels=labels,
            shard=shard,
        )
        _work(chosen, intake.candidates(), take)
        results.settle(seen.structures, seen.earlier + seen.rows)
        summary = Summary(folder, results.ledger.counts(), results.ledger.kinds(), seen)
    if observe is not None:
        observe(seen, None)
    _conclude(summary, parsed)
    summary.seconds = time.perf_counter() - started
    return summary


def _conclude(summary: Summary, steps: Sequence[Step]) -> None:
    summary.best = best_rows(summary.folder, steps)
    if any(isinstance(step, Rank) for step in steps):
        summary.ranking = write_ranking(summary.folder, summary.best)
    summary.report = write_report(summary.folder, summary.best)


def _take(
    results: Results, seen: Seen, observe: Callable[[Seen, Row | None], None] | None, row: Row
) -> None:
    results.add(row)
    seen.rows += 1
    seen.failed += row["status"] == "failed"
    if observe is not None:
        observe(seen, row)


def _work(engine: Engine, candidates: Iterator[Candidate], take: Callable[[Row], None]) -> None:
    rows = engine.run(candidates)
    try:
        for row in rows:
            take(row)
    finally:
        if isinstance(rows, Generator):
            rows.close()  # workers end before the folder is given back


def _stream(sources: Any) -> Iterable[Found]:
    if isinstance(sources, str | Path):
        return read_sources([sources])
    if isinstance(sources, list | tuple) and not any(isinstance(item, Found) for item in sources):
        return read_sources(sources)
    return sources


def _engine(
    name: EngineName, job: Job, sha256: str, *, workers: int | None, address: str | None
) -> Engine:
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    if name == "local":
        return LocalEngine(job, sha256)
    if name == "processes":
        return ProcessEngine(job, sha256, workers=workers)
    if name == "ray":
        return RayEngine(job, sha256, workers=workers, address=address)
    raise ValueError(f"there is no engine {name!r}; engines are local, processes, ray")


def _refuse_shard(shard: tuple[int, int]) -> None:
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard must be (k, n) with 0 <= k < n, not {shard}")
