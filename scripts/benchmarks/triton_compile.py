"""Compile the Triton kernels for GPUs on a machine without one, and see that they fit.

    python scripts/benchmark.py triton-compile [LMAX MMAX] [--arch 80 86 89 90 100] [--json --keep]

goes through value, gradients and second gradients of every operation that Triton serves, at 128
channels, float32 at each precision and bfloat16, and prints for each kernel and architecture the
most registers of a thread, kB of shared memory and bytes of spilled registers. ``--json`` prints a
line for each launch in its place, with the bytes of its stack and the CPU seconds that compiling
took (next to nothing if Triton's cache has it); ``--keep`` puts the rows of the table into
results/triton_compile.json, in the place of earlier ones. The exit code is 1 where a launch spills,
wants more shared memory than a block may have there or was compiled to a trap, and where no
operation leads to a kernel.
"""

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction

import atomeq.ops.atoms.operations
import atomeq.ops.explain
import atomeq.ops.pairs.operations  # noqa: F401 - an operation is known once it is imported
from atomeq.ops.dispatch import OPERATIONS, by_torch, load_backend, use_backend
from atomeq.ops.precision import PRECISIONS, matmul_precision, use_precision
from atomeq.ops.self_check import Example
from atomeq.ops.specification import OpSpec, Size
from benchmarks import record

#: Bytes of shared memory that a block may have, by architecture: A100, A10 and RTX 30, L4 and RTX
#: 40, H100 and H200, B200.
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPTIONS = ("num_warps", "num_stages")
CHANNELS = 128
MOST = ("registers", "shared", "stack", "spill_stores", "spill_loads", "traps")
target = [90]  # the architecture that is compiled for
lines: list[dict] = []
known_launches: set[tuple] = set()


def compile_only(kernel, grid, *tensors, like, **constants) -> None:
    """Take the place of launch(): compile what it would start, and report."""
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    signature, fixed, aligned = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        value = tensors[place] if place < len(tensors) else constants[name]
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            aligned[(place,)] = [["tt.divisibility", 16]]
        elif value is None or parameter.is_constexpr:
            signature[name], fixed[name] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    launched = name_of(kernel), target[0], repr((signature, fixed, options))
    if launched in known_launches:
        return
    known_launches.add(launched)
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    before = sum(os.times()[:4])  # ptxas is another process
    architecture = GPUTarget("cuda", target[0], 32)
    compiled = triton.compile(source, target=architecture, options=options)
    line = {
        "kernel": name_of(kernel),
        "arch": target[0],
        "dtype": str(like.dtype),
        "precision": matmul_precision(),
        **resources(compiled),
        "traps": "ret;" not in compiled.asm["ptx"],  # a compiler's way out: it never returns
        "shared": compiled.metadata.shared,
        "seconds": round(sum(os.times()[:4]) - before, 1),
    }
    lines.append(line)


def resources(compiled) -> dict[str, int]:
    """Return registers and stack of a kernel, and the bytes that it spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = tool("cuobjdump", "-res-usage", file.name)
    # Blackwell's have small functions of their own beside the kernel.
    own = [map(int, found) for found in re.findall(r"REG:(\d+) STACK:(\d+)", report)]
    registers, stack = map(max, zip(*own, strict=True))
    stores = loads = 0
    if stack:  # only a second run of the assembler tells what the stack is for
        with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
            file.write(compiled.asm["ptx"])
            file.flush()
            name = f"sm_{target[0]}{'a' * (target[0] >= 90)}"
            assembler = "ptxas-blackwell" if target[0] >= 100 else "ptxas"
            report = tool(assembler, "-v", f"--gpu-name={name}", file.name, "-o", os.devnull)
        pattern = r"(\d+) bytes spill stores, (\d+) bytes spill loads"
        stores, loads = map(int, re.search(pattern, report).groups())
    return {"registers": registers, "stack": stack, "spill_stores": stores, "spill_loads": loads}


def tool(name: str, *arguments: str) -> str:
    """Return what a tool that comes with Triton says."""
    command = [str(TOOLS / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def kernel_modules() -> list[ModuleType]:
    """Return the modules that start kernels, each by a ``launch`` of its own."""
    for known in OPERATIONS.values():
        load_backend("triton", known.family)
    ours = [module for name, module in sys.modules.items() if name.startswith("atomeq.ops.")]
    return [one for one in ours if ".triton." in one.__name__ and hasattr(one, "launch")]


def kernel_names() -> set[str]:
    """Return the names of what is launched: kernels that no other kernel calls."""
    kinds = triton.JITFunction, InterpretedFunction
    kernels = [
        value
        for module in kernel_modules()
        for value in vars(module).values()
        if isinstance(value, kinds)
    ]
    code = "\n".join({inspect.getsource(kernel.fn) for kernel in kernels})
    called = set(re.findall(r"(?<!def )\b(\w+)\(", code))
    return {name_of(kernel) for kernel in kernels if kernel.fn.__name__ not in called}


def name_of(kernel: Any) -> str:
    """Return the family and the name of a kernel."""
    return f"{kernel.fn.__module__.split('.')[2]} {kernel.fn.__name__}"


def launch_all(
    launch: Callable[..., None], lmax: int, mmax: int, channels: int, dtype: torch.dtype
) -> None:
    """Put every launch of value, gradients and second gradients into the hands of a function.

    No kernel runs: what they would write is memory as it was found.
    """
    for module in kernel_modules():
        module.launch = launch  # type: ignore[attr-defined]
    size = Size(lmax, mmax, channels, 1, dtype, torch.device("cpu"))
    for known in OPERATIONS.values():
        kernels = load_backend("triton", known.family)
        if known.example and kernels and not by_torch("triton", OpSpec(known.name, *size)):
            for precision in PRECISIONS if dtype == torch.float32 else ("highest",):
                with use_precision(precision), use_backend("reference"):
                    served = known.served_by(f"triton:{precision}")
                    differentiate_twice(known.example(size), served)


def differentiate_twice(example: Example, operation: Callable[..., Any]) -> None:
    """Go through an operation, its gradients and the gradients of these."""
    leaves, compute = example
    leaves = [leaf.requires_grad_() for leaf in leaves]
    value = compute(operation, *leaves).sum()
    if not leaves:
        return
    torch.autograd.grad(value, leaves, retain_graph=True)  # the last gradient has its own kernels
    for _ in range(2):
        found = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
        value = torch.stack([gradient.sum() for gradient in found if gradient is not None]).sum()
        if not value.requires_grad:
            return


def show(columns: list[int]) -> bool:
    """Print the most that launches of each kernel want; return whether all fit."""
    table = Table("registers, kB, spilled", *(f"sm_{arch}" for arch in columns), box=None)
    fit = True
    for kernel in dict.fromkeys(line["kernel"] for line in lines):
        cells = []
        for arch in columns:
            row = most(kernel, arch)
            fine = fits(row, arch)
            fit = fit and fine
            cell = f"{row['registers']} {row['shared'] / 1024:.0f} {row['spill_stores']}"
            cells.append(cell if fine else f"{cell} !")
        table.add_row(kernel, *cells)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    return fit


def fits(row: dict, arch: int) -> bool:
    """Whether a launch has the memory it wants, without a stack, and comes to an end."""
    return row["shared"] <= SHARED[arch] and not row["stack"] and not row["traps"]


def most(kernel: str, arch: int) -> dict[str, int]:
    """Return the most that the launches of a kernel want."""
    own = [line for line in lines if (line["kernel"], line["arch"]) == (kernel, arch)]
    return {key: max(line[key] for line in own) for key in MOST}


def keep(lmax: int, mmax: int) -> None:
    """Put what was found into the results."""
    path = record.RESULTS / "triton_compile.json"
    rows = record.read(path).get("kernels", {})
    found = {}
    for kernel, arch in dict.fromkeys((line["kernel"], line["arch"]) for line in lines):
        found.setdefault(f"L={lmax} M={mmax} sm_{arch}", {})[kernel] = most(kernel, arch)
    kernels = dict(sorted((rows | found).items()))
    record.write(path, {"triton": triton.__version__, "channels": CHANNELS, "kernels": kernels})


def main(argv: list[str] | None = None) -> int:
    """Compile all kernels; each module's launch is replaced for good."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("degrees", nargs="*", type=int, default=[2, 2], metavar="LMAX MMAX")
    parser.add_argument("--arch", nargs="+", type=int, default=[90], choices=SHARED)
    parser.add_argument("--json", action="store_true", help="a line for each launch")
    parser.add_argument("--keep", action="store_true", help="put the rows into the results")
    options = parser.parse_args(argv)
    for module in kernel_modules():
        if hasattr(module, "architecture"):
            module.architecture = lambda like: target[0]  # type: ignore[attr-defined]
    for target[0] in options.arch:
        for dtype in (torch.float32, torch.bfloat16):
            launch_all(compile_only, *options.degrees, CHANNELS, dtype)
    if options.keep:
        keep(*options.degrees)
    missed = kernel_names() - {line["kernel"] for line in lines}
    if missed:
        print(f"no operation leads to {', '.join(sorted(missed))}", file=sys.stderr)
    if not options.json:
        return 0 if show(options.arch) and not missed else 1
    print("\n".join(map(json.dumps, lines)))
    return 0 if all(fits(line, line["arch"]) for line in lines) and not missed else 1


if __name__ == "__main__":
    sys.exit(main())
