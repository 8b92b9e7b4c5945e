"""Time the operations of atomeq.ops beside e3nn and every other library that is installed.

``benchmark.py tensor-product [--device cpu|cuda] [--quick] [--only OP]``

One process, one thread on a CPU, implementations by turns: rounds.py measures the cases of
operation_cases.py, operation_bars.py judges them. Times are CPU seconds of the process on a CPU
and CUDA events on a GPU. Errors stand beside the times: the largest deviation from the reference
backend in float64, of the value, its gradient and its second gradient, relative to their largest
number. The last line says which bars are met.
"""

import argparse
import dataclasses
import warnings
from pathlib import Path

import torch

from benchmarks.judged import Judged, summary
from benchmarks.operation_bars import bars
from benchmarks.operation_cases import cases
from benchmarks.record import RESULTS, installed, machine, write
from benchmarks.rounds import PHASES, measure

PEERS = ("e3nn", "cuequivariance-torch", "sphericart-torch", "openequivariance")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer degrees, shorter rounds")
    parser.add_argument("--only", help="one operation, as cg_conv")
    parser.add_argument("--out", type=Path, help="JSON file; by default in results")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; use --device cpu")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high" if arguments.device == "cuda" else "highest")
    # e3nn scripts its harmonics and cuEquivariance says that it has no kernels: known, no news.
    warnings.filterwarnings("ignore")
    out = arguments.out or RESULTS / f"tensor_product_{arguments.device}.json"
    document = {**header(arguments), "rows": []}
    lines: list[Judged] = []
    for name, version in document["versions"].items():
        print(f"{name:<22} {version or 'not installed'}")
    print(f"\n{'op':<20} L    C   edges dtype    implementation      ", end="")
    print(
        "ns per edge and ratio to auto: forward, + backward, double; saved bytes per edge; errors"
    )
    seconds = 1.6 if arguments.quick else 4.0
    every = [cases(arguments.device, arguments.quick, shrink) for shrink in (1, 100)]
    for (op, make), (_, make_small) in zip(*every, strict=True):
        if arguments.only not in (None, op):
            continue
        try:
            case = make()
            small = case if arguments.device == "cpu" else make_small()
            for row in measure(case, small, seconds):
                document["rows"].append(row)
                print(table_line(row), flush=True)
        except torch.OutOfMemoryError as error:
            print(f"{op}: {str(error).splitlines()[0]}")
        lines = [bar.judged(document["rows"]) for bar in bars(arguments.device)]
        document["bars"] = [dataclasses.asdict(line) for line in lines]
        write(out, document)  # what was measured survives a time limit
    print(f"\nwritten: {out}")
    print(summary(lines))
    return 0


def header(arguments: argparse.Namespace) -> dict:
    """Return what the figures depend on besides the code."""
    device = {"device": torch.cuda.get_device_name()} if arguments.device == "cuda" else {}
    return {
        **machine(),
        **device,
        "quick": arguments.quick,
        "clock": "CUDA events" if arguments.device == "cuda" else "CPU seconds of the process",
        "matmul_precision": torch.get_float32_matmul_precision(),
        "versions": {name: installed(name) for name in ("torch", "triton", "numpy", *PEERS)},
    }


def table_line(row: dict) -> str:
    """Return one row as a line of the table."""
    place = f"{row['op']:<20} {row['lmax']:>1} {row['channels']:>4} {row['n_edges']:>7}"
    place += f" {row['dtype']:<8} {row['implementation']:<19}"
    if "failed" in row:
        return f"{place} failed: {row['failed'][:80]}"
    times = [row.get("seconds", {}).get(phase) for phase in PHASES]
    ratios = [row["ratio"].get(phase) for phase in PHASES]
    cells = [
        "       -        " if t is None else f"{t / row['n_edges'] * 1e9:>9.1f} {r or 0:>5.2f}x"
        for t, r in zip(times, ratios, strict=True)
    ]
    worst = " ".join(f"{error:.0e}" for error in row["errors"])
    return f"{place} {' '.join(cells)} {row['saved_bytes_per_edge']:>9.0f}  {worst}"
