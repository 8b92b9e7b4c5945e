"""What benchmarks share: the machine they ran on, the files they write, processes of their own."""

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from atomeq.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "benchmarks" / "results"
DOOR = ROOT / "scripts" / "benchmark.py"


def machine() -> dict[str, str]:
    """Return what figures depend on besides the code, and the commit of the code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device": names[0] if names else platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "atomeq": installed("atomeq") or "in its source tree",
        "commit": commit(),
    }


def commit(*folders: str) -> str:
    """Return the commit of the source tree and, after a ``+``, the files that differ from it.

    Args:
        *folders: Files of these are named; by default all but results, which benchmarks write.
    """
    looked_at = folders or (".", f":!{RESULTS.relative_to(ROOT)}")
    changed = [line[3:] for line in _git("status", "--porcelain", "--", *looked_at)]
    return " + ".join([*_git("describe", "--always"), *changed]) or "unknown"


def _git(*words: str) -> list[str]:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


def code_digest() -> str:
    """Return a digest of the package and the benchmarks, which says when figures are stale."""
    digest = hashlib.sha256()
    for folder in ("atomeq", "scripts/benchmarks", "configs", "potentials"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".c", ".h", ".yaml", ".safetensors"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def installed(package: str) -> str | None:
    """Return the version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(path: Path, document: Any) -> None:
    """Write a result as JSON, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as partial:
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """Return an earlier result, or nothing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def rows_of_tested(
    file: Path, runs: dict[str, Path], row_of: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """Return the rows that a file has, of runs elsewhere perhaps, and those of tested runs here."""
    tested = {name: run for name, run in runs.items() if (run / "test_errors.json").exists()}
    return read(file).get("models", {}) | {name: row_of(run) for name, run in tested.items()}


def in_own_process(name: str, *words: str, **environment: str) -> str:
    """Run a benchmark in a process of its own and return what it prints.

    Args:
        name: Of the benchmark.
        *words: Its arguments.
        **environment: Variables beside this process's own.
    """
    command = [sys.executable, str(DOOR), name, *words]
    done = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, check=True, text=True
    )
    return done.stdout


def atomeq(*words: str) -> None:
    """Run a command of the package in a process of its own, on one thread."""
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    code = "from atomeq.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, *words], env=os.environ | threads, check=True)


def children_cpu_seconds() -> float:
    """Return the CPU seconds of all processes that this one has started and awaited."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def fit(run: Path, words: list[str]) -> None:
    """Train until the end in a folder, going on where an earlier call was stopped.

    ``commit`` is written when it has ended, and has the code of each call as it began, for files
    may change under a long one; the CPU seconds of each go to ``cpu_seconds.json``, for a fit that
    was stopped has cost its time too.

    Args:
        run: Folder of the run; made.
        words: Options of ``atomeq fit``, but for the folder and the checkpoint.
    """
    run.mkdir(parents=True, exist_ok=True)
    done = run / "commit"
    if done.exists():
        return
    last = run / "checkpoints" / "last.ckpt"
    resumed = "--ckpt_path=last" if last.exists() else "--overwrite"
    spent = run / "cpu_seconds.json"
    earlier = json.loads(spent.read_text()) if spent.exists() else []
    begun = run / "commits"
    codes = [
        *(begun.read_text().splitlines() if begun.exists() else []),
        commit("atomeq", "configs"),
    ]
    begun.write_text("\n".join(codes))
    before = children_cpu_seconds()
    try:
        atomeq("fit", *words, f"--trainer.default_root_dir={run}", resumed)
    finally:
        write(spent, [*earlier, round(children_cpu_seconds() - before, 1)])
    done.write_text(", then ".join(dict.fromkeys(codes)))


def cpu_seconds_so_far() -> float:
    """Return CPU seconds of this process and of the children that have ended."""
    return time.process_time() + children_cpu_seconds()
