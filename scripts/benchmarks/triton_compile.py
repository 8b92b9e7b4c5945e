"""Compile the Triton kernels for GPUs on a machine without one, and see that they fit.

    python scripts/benchmark.py triton-compile [LMAX MMAX] [--arch 80 86 89 90 100] [--json]

goes through every launch of the operations at 128 channels, float32 at each precision and bfloat16,
and prints for each kernel and architecture the most registers of a thread, kB of shared memory and
bytes of spilled registers. ``--json`` prints a line for each launch in its place, with the bytes of
its stack and the CPU seconds that compiling took (next to nothing if Triton's cache has it). The
exit code is 1 where a launch spills, or wants more shared memory than a block may have there.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from atomeq.ops.coupling.clebsch_gordan import Form
from atomeq.ops.coupling.triton import kernels as coupling
from atomeq.ops.edge.blockwise import WayIn
from atomeq.ops.edge.so2_map import SO2Shape
from atomeq.ops.edge.triton import gate, rotation, row_scale, so2
from atomeq.ops.edge.triton import wigner as edge_wigner
from atomeq.ops.paths import tensor_product_paths
from atomeq.ops.precision import matmul_precision, use_precision
from atomeq.ops.segment.triton import kernels as segment
from atomeq.ops.sphere.grid import SphereGrid
from atomeq.ops.sphere.triton import kernels as sphere

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
target = [90]  # the architecture that is compiled for
lines: list[dict] = []


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
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    before = sum(os.times()[:4])  # ptxas is another process
    architecture = GPUTarget("cuda", target[0], 32)
    compiled = triton.compile(source, target=architecture, options=options)
    line = {
        "kernel": kernel.__name__,
        "arch": target[0],
        "dtype": str(like.dtype),
        "precision": matmul_precision(),
        **resources(compiled),
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
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", report).groups())
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


def compile_all(lmax: int, mmax: int, channels: int, dtype: torch.dtype) -> None:
    """Go through every kernel as the kernel sets call them."""
    shape = SO2Shape(lmax, mmax, channels, channels, lmax * channels)
    n_edges, n_atoms, n_sph = 100, 10, (lmax + 1) ** 2

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    index = torch.zeros(n_edges, dtype=torch.int64)
    wigner = zeros(n_edges, shape.n_rows, n_sph)
    x, rows = zeros(n_atoms, n_sph, channels), zeros(n_edges, shape.n_rows, channels)
    rotation.gather_rotate(x, wigner, [index], scale=zeros(n_edges, shape.n_scales))
    rotation.rotate_scatter(rows, wigner, [index], [index, index], n_atoms, factor=zeros(n_edges))
    rotation.rotate_scatter(rows, wigner, [], [], n_atoms)
    rotation.torque(x, rows, wigner, [index])
    turn, both = zeros(n_edges, 3), SO2Shape(lmax, mmax, 2 * channels, channels, 0)
    rotation.leave_gradient(x, wigner, [index], rows, zeros(n_edges), zeros(n_edges), turn)
    rotation.gather_gradient(
        *(x, wigner, [index] * 2, [index] * 4, zeros(n_edges, both.width_in)),
        *(zeros(n_edges, both.n_scales), both, WayIn(zeros(n_edges, both.n_scales), x, turn)),
    )
    frames = SimpleNamespace(vectors=turn, turn=turn, sign=1.0, lmax=lmax, mmax=mmax)
    edge_wigner.wigner_rows(frames)
    edge_wigner.vector_gradient(frames)
    weights = []
    for block in shape.blocks:
        sizes = [part[0].stop - part[0].start for part in (block.outputs, block.inputs)]
        weights.append(zeros(*((2,) if block.order else ()), *sizes))
    so2_map, y = so2.SO2Map(weights, shape), zeros(n_edges, shape.width)
    so2_map.forward(rows.flatten(1), y)
    so2_map.transposed(y, rows.flatten(1))
    so2_map.gated(rows.flatten(1), y, keep=True)
    flat, scale = rows.flatten(1), zeros(n_edges, shape.n_scales)
    row_scale.moved_scaled(flat, flat, scale, scale, shape)
    row_scale.scaled_second(flat, flat, flat, flat, scale, scale, shape)
    row_scale.scaled_rows(flat, scale, shape)
    row_scale.row_products(flat, flat, shape)
    gated = gate.Gate(y, shape)
    gated.value()
    gated.gradient(rows.flatten(1))
    gated.second(y, rows.flatten(1))
    form = Form(tensor_product_paths(lmax, lmax, lmax), "uvu", stacked=False)
    per_edge = zeros(n_edges, len(form.paths), channels)
    call = SimpleNamespace(x=x, y=zeros(n_edges, n_sph), weights=per_edge, z=x, edges=[index] * 6)
    call.n_targets, call.arguments, call.form = n_atoms, "x y weights z", form.code
    coupling.cg_partials(call)
    segment.segment_total(SimpleNamespace(x=rows, index=index, n_segments=n_atoms))
    few = zeros(n_edges, 8)
    segment.segment_weights(SimpleNamespace(x=few, index=index, n_segments=n_atoms))
    grid = SphereGrid(lmax, mmax, order="m")
    to_grid, from_grid = grid.to_matrix(like=rows), grid.from_matrix(like=rows)
    for order in range(3):
        form = SimpleNamespace(factors=[rows] * (order + 1), matrices=[to_grid] * (order + 1))
        form.back, form.order = from_grid, order
        sphere.sphere_form(form)
    for precision in ("high", "medium") if dtype == torch.float32 else ():
        with use_precision(precision):
            so2_map.forward(rows.flatten(1), y)
            so2_map.transposed(y, rows.flatten(1))
            so2_map.gated(rows.flatten(1), y, keep=True)
            silu = SimpleNamespace(factors=[rows], matrices=[to_grid], back=from_grid, order=0)
            sphere.sphere_form(silu)


def show(columns: list[int]) -> bool:
    """Print the most that launches of each kernel want; return whether all fit."""
    table = Table("registers, kB, spilled", *(f"sm_{arch}" for arch in columns), box=None)
    fit = True
    for kernel in dict.fromkeys(line["kernel"] for line in lines):
        cells = []
        for arch in columns:
            own = [line for line in lines if (line["kernel"], line["arch"]) == (kernel, arch)]
            most = {key: max(line[key] for line in own) for key in ("registers", "shared", "stack")}
            spilled = max(line["spill_stores"] for line in own)
            fine = most["shared"] <= SHARED[arch] and not most["stack"]
            fit = fit and fine
            cell = f"{most['registers']} {most['shared'] / 1024:.0f} {spilled}"
            cells.append(cell if fine else f"{cell} !")
        table.add_row(kernel, *cells)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    return fit


def main(argv: list[str] | None = None) -> int:
    """Compile all kernels; each module's launch is replaced for good."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("degrees", nargs="*", type=int, default=[2, 2], metavar="LMAX MMAX")
    parser.add_argument("--arch", nargs="+", type=int, default=[90], choices=SHARED)
    parser.add_argument("--json", action="store_true", help="a line for each launch")
    options = parser.parse_args(argv)
    for module in (coupling, edge_wigner, gate, rotation, row_scale, segment, so2, sphere):
        module.launch = compile_only
    so2.architecture = coupling.architecture = lambda like: target[0]
    for target[0] in options.arch:
        for dtype in (torch.float32, torch.bfloat16):
            compile_all(*options.degrees, 128, dtype)
    if not options.json:
        return 0 if show(options.arch) else 1
    print("\n".join(map(json.dumps, lines)))
    fit = [line["shared"] <= SHARED[line["arch"]] and not line["stack"] for line in lines]
    return 0 if all(fit) else 1


if __name__ == "__main__":
    sys.exit(main())
