"""All that a GPU is to show, in stages that end in time: proofs first, then measurements.

``benchmark.py gpu [--device cuda|cpu] [--quick] [--only WORD] [--seconds N] [--again]``; on a bare
machine ``bash scripts/gpu_check.sh`` prepares Python and calls this.

Each stage is a process with a limit of its own, so a slow or broken one leaves the others what they
have. What came of it is written to gpu_DEVICE.json at once, its output to gpu_STAGE.log beside it.
Called again it goes on where it stopped: a stage that has passed with this very code on this device
is not repeated, but with ``--again``. A stage that needs a package which is not there is left out
by its name. On a CPU, with ``--quick``, it is a smoke test of the machinery. The exit code is 1
where a stage did not pass.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.record import DOOR, RESULTS, ROOT, code_digest, machine, read, write

STRUCTURES = ("ase", "vesin")  # what reading structures and finding neighbours needs


class Stage(NamedTuple):
    """A process with a limit.

    Attributes:
        limit: s.
        needs: Packages beside torch, numpy, jaxtyping and e3nn.
        command: Returns its words, from the device, whether it is to be quick, and the folder of
            the results.
    """

    limit: int
    needs: tuple[str, ...]
    command: Callable[[str, bool, Path], list[str]]


def _tests(*paths: str) -> Callable[[str, bool, Path], list[str]]:
    def command(device: str, quick: bool, out: Path) -> list[str]:
        chosen = "(gpu or triton) and not slow" if device == "cuda" else "gpu"
        return ["-m", "pytest", *paths, "-m", chosen, "-q", "-p", "no:cacheprovider"]

    return command


def _benchmark(name: str, *words: str, file: str) -> Callable[[str, bool, Path], list[str]]:
    def command(device: str, quick: bool, out: Path) -> list[str]:
        options = ["--device", device, "--out", str(out / f"{file}_{device}.json")]
        return [str(DOOR), name, *words, *options, *["--quick"] * quick]

    return command


#: 520 s in all, the proofs first.
STAGES: dict[str, Stage] = {
    "kernels": Stage(
        120,
        ("pytest", "triton"),
        _tests("tests/ops/test_triton.py", "tests/ops/test_triton_gradients.py",
               "tests/ops/test_precision.py", "tests/device/test_self_check.py"),
    ),
    "potentials": Stage(
        60,
        ("pytest", *STRUCTURES),
        _tests("tests/potential/test_captured.py", "tests/graph/test_device_neighbors.py",
               "tests/calculators/test_ase_calculator.py", "tests/dynamics/test_in_flight.py"),
    ),
    "export": Stage(
        50, ("pytest", "triton", *STRUCTURES), _tests("tests/potential/test_export.py")
    ),
    "adapters": Stage(30, ("pytest",), _tests("tests/ops/test_adapters.py")),
    "operations": Stage(120, ("scipy",), _benchmark("tensor-product", file="tensor_product")),
    "dynamics": Stage(70, STRUCTURES, _benchmark("on-device", "dynamics", file="dynamics_gpu")),
    "models": Stage(70, STRUCTURES, _benchmark("on-device", "models", file="whole_models")),
    "training": Stage(50, STRUCTURES, _benchmark("on-device", "training", file="training_gpu")),
    "precision": Stage(40, STRUCTURES, _benchmark("precision", file="precision")),
}  # fmt: skip
PEERS = ("e3nn", "cuequivariance_torch", "openequivariance")


def main(argv: list[str] | None = None) -> int:
    """Run the stages that have not passed yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="shorter measurements")
    parser.add_argument(
        "--only", default="", metavar="WORD", help="stages whose name has this word"
    )
    parser.add_argument("--seconds", type=float, default=520, help="for all of them")
    parser.add_argument("--again", action="store_true", help="repeat what has passed too")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --device cpu --quick tries the machinery")
    device = torch.cuda.get_device_name() if options.device == "cuda" else machine()["device"]
    missing = [name for name in PEERS if find_spec(name) is None]
    print(f"gpu: {device}, torch {torch.__version__}; not here: {', '.join(missing) or 'none'}")
    file, end = options.out / f"gpu_{options.device}.json", time.monotonic() + options.seconds
    about = {"code": code_digest(), "device": device, "quick": options.quick}
    results = []
    for name, stage in STAGES.items():
        if options.only in name:
            before = read(file).get(name, {})
            known = all(before.get(key) == value for key, value in about.items())
            if known and before.get("status") == "passed" and not options.again:
                result = {**before, "status": "passed before"}
            else:
                result = {**about, **run(name, stage, options, end - time.monotonic())}
                write(file, {**read(file), "machine": machine(), name: result})
            results.append(result["status"])
            print(
                f"gpu: {name:11} {result['status']} ({result.get('seconds', 0):.0f} s)", flush=True
            )
    fine = [status for status in results if status.startswith(("passed", "left out"))]
    print(f"gpu: {len(fine)} of {len(results)} stages passed or left out; {file}")
    return 0 if len(fine) == len(results) else 1


def run(name: str, stage: Stage, options: argparse.Namespace, left: float) -> dict[str, Any]:
    """Run a stage; return its status, its seconds and the end of its output."""
    missing = [package for package in stage.needs if find_spec(package) is None]
    if missing:
        return {"status": f"left out: there is no {', '.join(missing)} here"}
    limit = min(stage.limit, left)
    if limit < min(10, stage.limit):
        return {"status": "not begun: no time was left"}
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / f"gpu_{name}.log"
    paths = [
        str(ROOT),
        str(ROOT / "scripts"),
        str(ROOT / "tests"),
        os.environ.get("PYTHONPATH", ""),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, *stage.command(options.device, options.quick, options.out)]
    begun = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT,
                timeout=limit, check=False,
            ).returncode  # fmt: skip
            status = "passed" if code == 0 else f"failed: exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"failed: not done after {limit:.0f} s, what it wrote is kept"
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
    if not status.startswith("passed"):
        print("\n".join(f"  | {line}" for line in tail))
    return {"status": status, "seconds": round(time.monotonic() - begun, 1), "output": tail}


if __name__ == "__main__":
    sys.exit(main())
