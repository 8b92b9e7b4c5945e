"""Time the operations of atomeq.ops beside e3nn and every other library that is installed.

``.venv/bin/python scripts/benchmark_tensor_product.py [--device cpu|cuda] [--quick] [--only OP]``

One process, one thread on a CPU. The implementations of a case take turns, one call each a round,
so that whatever slows the machine slows them all; a ratio is the median over rounds of the paired
times. Times are CPU seconds of the process on a CPU and CUDA events on a GPU. Errors stand beside
the times: the largest deviation from the reference backend in float64, of the value, its gradient
and its second gradient, relative to their largest number. The last line says which bars are met.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from atomeq.ops.backends.irreps import from_mul_ir, product_problem, to_mul_ir
from atomeq.ops.clebsch_gordan import clebsch_gordan
from atomeq.ops.dispatch import BACKENDS, load_backend, use_backend
from atomeq.ops.gaunt import gaunt_product
from atomeq.ops.orders import m_primary_order
from atomeq.ops.paths import Mode, tensor_product_paths
from atomeq.ops.paths import Path as CouplingPath
from atomeq.ops.so2 import (
    escn_conv,
    rotate_from_edge,
    rotate_to_edge,
    so2_linear,
    so2_linear_with_scalars,
)
from atomeq.ops.specification import OpSpec
from atomeq.ops.sphere import sphere_silu
from atomeq.ops.sphere_grid import SphereGrid
from atomeq.ops.spherical_harmonics import spherical_harmonics
from atomeq.ops.tensor_product import cg_conv, tensor_product
from atomeq.ops.wigner import build_edge_frame

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("forward", "forward_backward", "double_backward")
DEGREE = 20  # edges per atom
PEERS = ("e3nn", "cuequivariance-torch", "sphericart-torch", "openequivariance")


@dataclasses.dataclass
class Implementation:
    """One way to compute a case, with the layout it would choose for itself.

    ``prepare`` and ``restore`` change from and to our layout; they are outside the timing.
    """

    name: str
    compute: Callable[..., Tensor]
    prepare: Callable[..., list[Tensor]] = lambda *inputs: list(inputs)
    restore: Callable[[Tensor], Tensor] = lambda out: out
    phases: tuple[str, ...] = PHASES

    def whole(self, *inputs: Tensor) -> Tensor:
        """Compute in our layout, for the errors."""
        return self.restore(self.compute(*self.prepare(*inputs)))


@dataclasses.dataclass
class Case:
    """The same numbers for every implementation; the first one is compared with the others."""

    op: str
    lmax: int
    channels: int
    n_edges: int
    dtype: torch.dtype
    inputs: list[Tensor]
    implementations: list[Implementation]
    truth: Callable[..., Tensor] | None = None
    error: Callable[[Tensor], float] | None = None


def measure(case: Case, small: Case, seconds: float) -> Iterator[dict]:
    """Yield one row per implementation; errors are those of a small case, as float64 is big."""
    expected = None
    if small.truth is not None:
        with use_backend("reference"):
            expected = derivatives(small.truth, [tensor.double() for tensor in small.inputs])
    rows = {}
    for implementation, checked in zip(case.implementations, small.implementations, strict=True):
        row = {
            "op": case.op,
            "lmax": case.lmax,
            "channels": case.channels,
            "n_edges": case.n_edges,
            "dtype": str(case.dtype).removeprefix("torch."),
            "implementation": implementation.name,
        }
        rows[implementation.name] = row
        try:
            row["errors"] = errors(small, checked, expected)
            row["saved_bytes_per_edge"] = saved_bytes(case, implementation) / case.n_edges
            row["differing_runs"] = differing_runs(case, implementation)
        except (RuntimeError, NotImplementedError, ValueError) as problem:  # memory included
            row["failed"] = str(problem).splitlines()[0]
    for phase in PHASES:
        running = [
            implementation
            for implementation in case.implementations
            if phase in implementation.phases and "failed" not in rows[implementation.name]
        ]
        for name, times in rounds(case, running, phase, seconds).items():
            rows[name].setdefault("seconds", {})[phase] = statistics.median(times)
            rows[name].setdefault("rounds", {})[phase] = len(times)
            rows[name].setdefault("_times", {})[phase] = times
    first = rows[case.implementations[0].name]
    for row in rows.values():
        row["ratio"] = {
            phase: statistics.median(
                theirs / ours for theirs, ours in zip(times, first["_times"][phase], strict=True)
            )
            for phase, times in row.get("_times", {}).items()
            if phase in first.get("_times", {})
        }
    for row in rows.values():
        row.pop("_times", None)
        yield row


def rounds(
    case: Case, implementations: list[Implementation], phase: str, seconds: float
) -> dict[str, list[float]]:
    """Let the implementations take turns until the time is up, at least three rounds."""
    calls = {}
    for implementation in implementations:
        inputs = [t.detach() for t in implementation.prepare(*case.inputs)]
        calls[implementation.name] = phase_of(implementation.compute, inputs, phase)
    timer = cuda_seconds if case.inputs[0].is_cuda else cpu_seconds
    for name, call in list(calls.items()):
        try:
            call()  # tables, buffers, compilation
            timer(call)
        except RuntimeError as problem:  # out of memory, or no second gradient of a compiled graph
            print(f"{case.op} L={case.lmax} {name} {phase}: {str(problem).splitlines()[0][:100]}")
            del calls[name]
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)  # nobody always runs in the cache that the same other has left
    begin = time.process_time()
    while calls and (len(next(iter(times.values()))) < 3 or time.process_time() - begin < seconds):
        for name in order.sample(list(calls), len(calls)):
            times[name].append(timer(calls[name]))
        if len(next(iter(times.values()))) >= 200:
            break
    return times


def phase_of(
    compute: Callable[..., Tensor], inputs: Sequence[Tensor], phase: str
) -> Callable[[], object]:
    """Return the call to be timed; its leaves are new each time, as in training."""

    def forward() -> object:
        with torch.no_grad():
            return compute(*inputs)

    def backward() -> object:
        leaves = [tensor.requires_grad_() for tensor in map(Tensor.detach, inputs)]
        return torch.autograd.grad(compute(*leaves).sum(), leaves)

    return {
        "forward": forward,
        "forward_backward": backward,
        "double_backward": lambda: derivatives(compute, inputs),
    }[phase]


def derivatives(
    compute: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the value, the gradient and the gradient of a sum over the gradient, each flat.

    This is a step of force training: the gradient is made with a graph, a loss of it is
    differentiated with respect to everything.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    value = compute(*leaves)
    energy = (value * probe(value.numel(), value.dtype, value.device).view_as(value)).sum()
    first = torch.autograd.grad(energy, leaves, create_graph=True)
    loss = torch.stack([gradient.square().sum() for gradient in first]).sum()
    second = torch.autograd.grad(loss, leaves)
    flat = [torch.cat([tensor.detach().flatten() for tensor in level]) for level in (first, second)]
    return value.detach().flatten(), flat[0], flat[1]


@functools.cache
def probe(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return fixed weights of a sum: a plain sum of squares of harmonics would be constant."""
    return torch.linspace(-1, 1, n, dtype=dtype, device=device)


def errors(
    case: Case, implementation: Implementation, expected: tuple[Tensor, ...] | None
) -> list[float]:
    """Return the relative errors of the value and, where there are derivatives, of both."""
    if case.error is not None:
        with torch.no_grad():
            return [case.error(implementation.whole(*case.inputs))]
    assert expected is not None, "a case has a truth or an error of its own"
    found = derivatives(implementation.whole, case.inputs)
    return [
        ((ours.double() - true).abs().max() / true.abs().max()).item()
        for ours, true in zip(found, expected, strict=True)
    ]


def saved_bytes(case: Case, implementation: Implementation) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, inputs not counted."""
    if "forward_backward" not in implementation.phases:
        return 0
    leaves = [t.detach().requires_grad_() for t in implementation.prepare(*case.inputs)]
    own = {tensor.untyped_storage().data_ptr() for tensor in leaves}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = implementation.compute(*leaves)
    del out
    return sum(size for pointer, size in kept.items() if pointer not in own)


def differing_runs(case: Case, implementation: Implementation) -> int:
    """Return how many of three further runs differ from the first in any bit."""
    inputs = [tensor.detach() for tensor in implementation.prepare(*case.inputs)]
    with torch.no_grad():
        first = implementation.compute(*inputs)
        return sum(not torch.equal(first, implementation.compute(*inputs)) for _ in range(3))


def cpu_seconds(call: Callable[[], object]) -> float:
    """Return the CPU time of a call."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def cuda_seconds(call: Callable[[], object]) -> float:
    """Return the time between two events around a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def ours(name: str, compute: Callable[..., Tensor], backend: str = "auto") -> Implementation:
    """Return our own operation, served by one backend."""

    def served(*inputs: Tensor) -> Tensor:
        with use_backend(backend):
            return compute(*inputs)

    return Implementation(name, served)


def own(compute: Callable[..., Tensor], device: str) -> Implementation:
    """Return our operation as it is to be fast on a device: on CUDA the kernels must be named."""
    name = "triton" if device == "cuda" else "auto"
    return ours(name, compute, name)


def halved(implementation: Implementation) -> Implementation:
    """Return the forward pass with operands of bfloat16."""

    def compute(*inputs: Tensor) -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            return implementation.compute(*inputs)
        finally:
            torch.set_float32_matmul_precision(before)

    name = f"{implementation.name} bf16"
    return dataclasses.replace(implementation, name=name, compute=compute, phases=("forward",))


def adapters(
    op: str, lmax: int, channels: int, n_edges: int, inputs: list[Tensor], compute: Callable
) -> list[Implementation]:
    """Return the backends other than the reference that serve this call when named."""
    spec = OpSpec(op, lmax, lmax, channels, n_edges, inputs[0].dtype, inputs[0].device)
    taken = ("reference", "e3nn", "cpu", "triton")  # they have rows of their own
    names = [name for name in BACKENDS if name not in taken]
    return [ours(name, compute, name) for name in names if load_backend(name).refusal(spec) is None]


def harmonics_case(lmax: int, n_edges: int, dtype: torch.dtype, device: str) -> Case:
    from e3nn import o3

    vectors = torch.randn(n_edges, 3, dtype=dtype, device=device)
    degrees = list(range(lmax + 1))

    def compute(vectors: Tensor) -> Tensor:
        return spherical_harmonics(vectors, lmax)

    def by_e3nn(vectors: Tensor) -> Tensor:
        return o3.spherical_harmonics(degrees, vectors, normalize=True, normalization="component")

    implementations = [own(compute, device), ours("reference", compute, "reference")]
    implementations.append(Implementation("e3nn", by_e3nn))
    if installed("sphericart-torch"):
        import sphericart.torch

        evaluator = sphericart.torch.SphericalHarmonics(lmax)
        scale = math.sqrt(4 * math.pi)  # orthonormal, polar axis z
        implementations.append(
            Implementation("sphericart", lambda zxy: evaluator(zxy) * scale, to_polar_z)
        )
    if lmax <= 3:  # building the polynomials of cuEquivariance takes long above
        implementations += adapters("spherical_harmonics", lmax, 1, n_edges, [vectors], compute)
    return Case("spherical_harmonics", lmax, 1, n_edges, dtype, [vectors], implementations, compute)


def to_polar_z(vectors: Tensor) -> list[Tensor]:
    return [vectors[:, [2, 0, 1]]]


def wigner_case(lmax: int, n_edges: int, dtype: torch.dtype, device: str) -> Case:
    """Matrices that take edges to +y; ours are never differentiated, so only forward counts."""
    from e3nn import o3

    vectors = torch.nn.functional.normalize(torch.randn(n_edges, 3, dtype=dtype, device=device))
    rows = torch.tensor(m_primary_order(lmax, lmax), device=device).argsort()

    def compute(vectors: Tensor) -> Tensor:
        edges = torch.zeros(2, n_edges, dtype=torch.long, device=device)
        return build_edge_frame(vectors, edges, n_atoms=1, lmax=lmax, mmax=lmax).wigner

    def by_e3nn(vectors: Tensor) -> Tensor:
        alpha, beta = o3.xyz_to_angles(vectors)
        zero = torch.zeros_like(alpha)
        blocks = [o3.wigner_D(l, zero, -beta, -alpha) for l in range(lmax + 1)]
        out = vectors.new_zeros(n_edges, (lmax + 1) ** 2, (lmax + 1) ** 2)
        for l, block in enumerate(blocks):
            out[:, l * l : (l + 1) ** 2, l * l : (l + 1) ** 2] = block
        return out

    def misalignment(matrices: Tensor) -> float:
        harmonics = spherical_harmonics(vectors, lmax)
        pole = spherical_harmonics(torch.tensor([0.0, 1, 0], dtype=dtype, device=device), lmax)
        return ((matrices @ harmonics.unsqueeze(-1)).squeeze(-1) - pole).abs().max().item()

    implementations = [
        dataclasses.replace(own(compute, device), restore=lambda out: out[:, rows]),
        Implementation("e3nn", by_e3nn),
    ]
    for implementation in implementations:
        implementation.phases = ("forward",)
    inputs = [vectors]
    return Case("edge_wigner", lmax, 1, n_edges, dtype, inputs, implementations, error=misalignment)


def random_edges(n_edges: int, device: str) -> tuple[Tensor, int]:
    """Return a random graph with edges sorted by their target, as neighbour lists give them."""
    n_atoms = max(2, n_edges // DEGREE)
    edges = torch.randint(0, n_atoms, (2, n_edges), device=device)
    return edges[:, edges[1].argsort()], n_atoms


def coupling_case(
    op: str, lmax: int, channels: int, n_edges: int, dtype: torch.dtype, device: str
) -> Case:
    """Uvu products of features with harmonics, one item per edge, with or without the sums."""
    paths = tensor_product_paths(lmax, lmax, lmax)
    edge_index, n_atoms = random_edges(n_edges, device)
    options = {"dtype": dtype, "device": device}
    convolved = op == "cg_conv"
    x = torch.randn(n_atoms if convolved else n_edges, (lmax + 1) ** 2, channels, **options)
    y = spherical_harmonics(torch.randn(n_edges, 3, **options), lmax)
    weights = torch.randn(n_edges, len(paths), channels, **options)

    def compute(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        if convolved:
            return cg_conv(x, y, weights, edge_index, n_atoms, paths)
        return tensor_product(x, y, weights, paths)

    product = e3nn_product(paths, lmax, channels, "uvu", dtype, device)

    def by_e3nn(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        if not convolved:
            return product(x, y, weights)
        messages = product(x.index_select(0, edge_index[0]), y, weights)
        totals = messages.new_zeros(n_atoms, messages.shape[1])
        return totals.index_add(0, edge_index[1], messages)

    inputs = [x, y, weights]
    implementations = [
        own(compute, device),
        ours("reference", compute, "reference"),
        Implementation(
            "e3nn",
            by_e3nn,
            lambda x, y, weights: [to_mul_ir(x), y, weights.flatten(1)],
            lambda out: from_mul_ir(out, list(range(lmax + 1)), channels),
        ),
    ]
    if lmax <= 2 or device == "cuda":  # on a CPU its paths are einsums, planned one by one
        implementations += adapters(op, lmax, channels, n_edges, inputs, compute)
    return Case(op, lmax, channels, n_edges, dtype, inputs, implementations, compute)


def e3nn_product(
    paths: Sequence[CouplingPath],
    lmax: int,
    channels: int,
    mode: Mode,
    dtype: torch.dtype,
    device: str,
) -> torch.nn.Module:
    """Return e3nn's own product, as e3nn's defaults make it."""
    from e3nn import o3

    problem = product_problem(
        tuple(paths),
        (lmax, lmax),
        (channels, 1 if mode == "uvu" else channels, channels),
        mode,
        stacked=False,
        weighted=True,
    )
    return o3.TensorProduct(*problem, shared_weights=False, internal_weights=False).to(
        device=device, dtype=dtype
    )


def escn_case(lmax: int, channels: int, n_edges: int, dtype: torch.dtype, device: str) -> Case:
    """One edge layer of eSCN: both atoms' features, radial factors, two SO(2) maps and a gate."""
    mmax = min(2, lmax)
    edge_index, n_atoms = random_edges(n_edges, device)
    options = {"dtype": dtype, "device": device}
    vectors = torch.randn(n_edges, 3, **options)
    frame = build_edge_frame(vectors, edge_index, n_atoms=n_atoms, lmax=lmax, mmax=mmax)
    x = torch.randn(n_atoms, (lmax + 1) ** 2, channels, **options)
    sizes = [lmax - m + 1 for m in range(mmax + 1)]
    radial = torch.randn(n_edges, sum(sizes) * 2 * channels, **options)
    first = so2_weights(sizes, 2 * channels, channels, lmax * channels, options)
    second = so2_weights(sizes, channels, channels, 0, options)
    degree_of_row = torch.tensor(
        [math.isqrt(row) for row in m_primary_order(lmax, mmax)], device=device
    )

    def layer(vectors: Tensor, x: Tensor, radial: Tensor, *weights: Tensor) -> Tensor:
        here = dataclasses.replace(frame, vectors=vectors)
        here = dataclasses.replace(here, wigner=frame.wigner.to(x.dtype))
        rows = rotate_to_edge(x, here, side="both")
        rows, gates = so2_linear_with_scalars(
            rows, weights[: mmax + 1], lmax=lmax, mmax=mmax, scale=radial
        )
        opened = torch.sigmoid(gates).unflatten(1, (lmax, channels))
        scalars = torch.nn.functional.silu(rows[:, :1])
        higher = rows[:, 1:] * opened[:, degree_of_row[1:] - 1]
        rows = torch.cat((scalars, higher), dim=1)
        rows = so2_linear(rows, weights[mmax + 1 :], lmax=lmax, mmax=mmax)
        return rotate_from_edge(rows, here)

    inputs = [vectors, x, radial, *first, *second]

    def fused(recompute: bool) -> Callable[..., Tensor]:
        def compute(vectors: Tensor, x: Tensor, radial: Tensor, *weights: Tensor) -> Tensor:
            here = dataclasses.replace(frame, vectors=vectors)
            maps = weights[: mmax + 1], weights[mmax + 1 :]
            return escn_conv(x, here, *maps, radial=radial, recompute=recompute)

        return compute

    implementations = [own(fused(False), device), ours("reference", layer, "reference")]
    recomputing = own(fused(True), device)
    implementations.append(
        dataclasses.replace(recomputing, name=f"{recomputing.name}, recomputing")
    )
    if device == "cuda":
        implementations.append(halved(implementations[0]))
        compiled = ours("reference compiled", layer, "reference")
        compiled.compute = torch.compile(compiled.compute)
        compiled.phases = ("forward", "forward_backward")  # compiled graphs have no second one
        compiled.whole = implementations[1].whole
        implementations.append(compiled)
    return Case("escn_layer", lmax, channels, n_edges, dtype, inputs, implementations, layer)


def so2_weights(
    sizes: list[int], c_in: int, c_out: int, n_scalars: int, options: dict
) -> list[Tensor]:
    """Return random weights, W_1 and W_2 for each m > 0, that keep the variance."""
    shapes = [(n_scalars + sizes[0] * c_out, sizes[0] * c_in)]
    shapes += [(2, n * c_out, n * c_in) for n in sizes[1:]]
    return [torch.randn(shape, **options) / math.sqrt(shape[-1] * len(shape)) for shape in shapes]


def activation_case(
    lmax: int, channels: int, n_edges: int, dtype: torch.dtype, device: str
) -> Case:
    from e3nn import o3

    grid = SphereGrid(lmax, lmax, normalization="component")
    x = torch.randn(n_edges, (lmax + 1) ** 2, channels, dtype=dtype, device=device)
    to_grid = o3.ToS2Grid(lmax, grid.shape, normalization="component").to(x)
    from_grid = o3.FromS2Grid(grid.shape, lmax, normalization="component").to(x)

    def compute(x: Tensor) -> Tensor:
        return sphere_silu(x, grid)

    implementations = [
        own(compute, device),
        ours("reference", compute, "reference"),
        Implementation(
            "e3nn",
            lambda x: from_grid(torch.nn.functional.silu(to_grid(x))),
            lambda x: [x.mT.contiguous()],
            lambda out: out.mT,
        ),
    ]
    return Case("sphere_silu", lmax, channels, n_edges, dtype, [x], implementations, compute)


def gaunt_case(lmax: int, channels: int, n_edges: int, dtype: torch.dtype, device: str) -> Case:
    """Beside it the same function as a sum of Clebsch-Gordan paths with Gaunt's coefficients."""
    options = {"dtype": dtype, "device": device}
    x, y = (torch.randn(n_edges, (lmax + 1) ** 2, channels, **options) for _ in range(2))
    paths = tensor_product_paths(lmax, lmax, lmax)
    weights = gaunt_weights(paths).to(x)[:, None].expand(-1, channels).contiguous()
    product = e3nn_product(paths, lmax, channels, "uuu", dtype, device)

    def compute(x: Tensor, y: Tensor) -> Tensor:
        return gaunt_product(x, y, lmax)

    implementations = [
        own(compute, device),
        ours("paths", lambda x, y: tensor_product(x, y, weights, paths, mode="uuu")),
        Implementation(
            "e3nn",
            lambda x, y: product(x, y, weights.flatten()[None]),
            lambda x, y: [to_mul_ir(x), to_mul_ir(y)],
            lambda out: from_mul_ir(out, list(range(lmax + 1)), channels),
        ),
    ]
    return Case("gaunt_product", lmax, channels, n_edges, dtype, [x, y], implementations, compute)


def gaunt_weights(paths: Sequence[CouplingPath]) -> Tensor:
    """Return the path weights that make a Clebsch-Gordan product the Gaunt product."""
    weights = []
    for l1, l2, l3 in paths:
        shared = sum(path.l3 == l3 for path in paths)
        factor = math.sqrt((2 * l1 + 1) * (2 * l2 + 1) * shared / (4 * math.pi))
        weights.append(factor * clebsch_gordan(l1, l2, l3)[l1, l2, l3])
    return torch.stack(weights)


def cases(device: str, quick: bool, shrink: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yield every case by its operation, made when it is its turn, with edges / shrink."""
    single = torch.float32
    size = (1 if device == "cpu" else 500) / shrink  # edges; a GPU needs many to be busy
    for lmax in (2, 4) if quick else (1, 2, 3, 4):
        yield (
            "spherical_harmonics",
            lambda l=lmax: harmonics_case(l, int(4000 * size), single, device),
        )
    for lmax in (3, 4) if quick else (1, 2, 3, 4, 6):
        n = 1000 if device == "cpu" else 50_000 // shrink
        yield "edge_wigner", lambda l=lmax, n=n: wigner_case(l, n, single, device)
    channels = 64 if device == "cpu" else 128
    few = {1: 1000, 2: 600, 3: 300, 4: 150, 6: 60}
    for lmax in (1, 2, 4, 6) if device == "cpu" else (1, 2, 3, 4):
        n = few[lmax] if device == "cpu" else {1: 500_000, 2: 500_000}.get(lmax, 50_000) // shrink
        yield (
            "cg_conv",
            lambda l=lmax, n=n: coupling_case("cg_conv", l, channels, n, single, device),
        )
    for lmax in (2,) if quick else (1, 2, 4):
        n = few[lmax] if device == "cpu" else 50_000 // shrink
        yield (
            "tensor_product",
            lambda l=lmax, n=n: coupling_case("tensor_product", l, channels, n, single, device),
        )
    sizes = [(2, 64), (2, 128), (4, 64), (4, 128), (6, 128)]
    if device == "cuda":
        sizes = [(2, 128), (3, 128), (4, 128), (6, 128)]
    for lmax, width in sizes:
        n = (
            {2: 800, 4: 400, 6: 60}[lmax]
            if device == "cpu"
            else {2: 500_000}.get(lmax, 100_000) // shrink
        )
        yield "escn_layer", lambda l=lmax, c=width, n=n: escn_case(l, c, n, single, device)
    for lmax in (4,) if quick else (2, 4, 6):
        n = int(200 * size)
        yield "sphere_silu", lambda l=lmax, n=n: activation_case(l, channels, n, single, device)
        yield "gaunt_product", lambda l=lmax, n=n // 2: gaunt_case(l, channels, n, single, device)


@dataclasses.dataclass
class Bar:
    """A figure to reach: a ratio to another implementation, seconds, or bytes."""

    op: str
    lmax: int
    channels: int
    what: str  # a phase, "saved_bytes_per_edge" or "differing_runs"
    limit: float
    against: str | None = None  # the implementation; None for a figure of our own
    by: tuple[str, ...] = ("auto",)  # whose figure counts, the first one measured

    def __str__(self) -> str:
        place = f"{self.op} L={self.lmax} C={self.channels} {self.what}"
        if self.against is not None:
            return f"{place} >= {self.limit:g}x {self.against}"
        unit = " ns per edge" if self.what in PHASES else ""
        owner = f" of {self.by[0]}" if self.by[0] != "auto" else ""
        return f"{place} <= {self.limit:g}{unit}{owner}"

    def figure(self, rows: list[dict]) -> float | None:
        """Return the figure reached, or None where it was not measured."""
        place = (self.op, self.lmax, self.channels)
        found = {
            row["implementation"]: row
            for row in rows
            if (row["op"], row["lmax"], row["channels"]) == place
        }
        names = (self.against,) if self.against is not None else self.by
        row = next((found[name] for name in names if name in found), {})
        if self.against is not None:
            return row.get("ratio", {}).get(self.what)
        if self.what in PHASES:
            seconds = row.get("seconds", {}).get(self.what)
            return None if seconds is None else seconds / row["n_edges"] * 1e9
        return row.get(self.what)

    def met(self, figure: float) -> bool:
        """Whether the figure is good enough."""
        return figure >= self.limit if self.against is not None else figure <= self.limit


def bars(device: str) -> list[Bar]:
    """Return the figures that the backend is to reach on a device."""
    if device == "cuda":
        found = [
            Bar("escn_layer", 2, 128, "forward", 14.0, by=("triton",)),
            Bar("escn_layer", 2, 128, "forward", 7.0, by=("triton bf16",)),
        ]
        found += [
            Bar("escn_layer", lmax, 128, "forward_backward", limit, "reference compiled")
            for lmax, limit in ((2, 2.5), (3, 2.0), (4, 2.0), (6, 1.5))
        ]
        found.append(Bar("escn_layer", 2, 128, "double_backward", 3.0, "reference"))
        found += [
            Bar(op, 2, 128, "differing_runs", 0, by=("triton",)) for op in ("escn_layer", "cg_conv")
        ]
        for lmax, phase in ((lmax, phase) for lmax in (1, 2, 3, 4) for phase in PHASES):
            found.append(Bar("cg_conv", lmax, 128, phase, 10.0, "e3nn"))
            found.append(Bar("cg_conv", lmax, 128, phase, 1.2, "cuequivariance"))
        return found
    found = [
        Bar("cg_conv", lmax, 64, phase, limit, "e3nn")
        for lmax, limit in ((1, 2.0), (2, 2.0), (4, 5.0), (6, 5.0))
        for phase in PHASES
    ]
    found += [Bar("edge_wigner", lmax, 1, "forward", 20.0, "e3nn") for lmax in (3, 4)]
    for lmax in (2, 4):
        found.append(Bar("spherical_harmonics", lmax, 1, "forward", 1.0, "sphericart"))
        found.append(Bar("spherical_harmonics", lmax, 1, "double_backward", 2.0, "sphericart"))
    found += [
        Bar("escn_layer", lmax, channels, phase, 1.3, "reference")
        for lmax in (2, 4)
        for channels in (64, 128)
        for phase in PHASES
    ]
    found += [
        Bar(
            "escn_layer",
            lmax,
            128,
            "saved_bytes_per_edge",
            kilobytes * 1000,
            by=("auto, recomputing", "auto"),
        )
        for lmax, kilobytes in ((2, 6), (4, 13), (6, 21))
    ]
    return found


def installed(package: str) -> str | None:
    """Return the version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def header(arguments: argparse.Namespace) -> dict:
    """Return what the figures depend on besides the code."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    device = platform.processor() or platform.machine()
    if arguments.device == "cuda":
        device = torch.cuda.get_device_name()
    return {
        "commit": commit.stdout.strip() or None,
        "device": device,
        "quick": arguments.quick,
        "threads": torch.get_num_threads(),
        "clock": "CUDA events" if arguments.device == "cuda" else "CPU seconds of the process",
        "matmul_precision": torch.get_float32_matmul_precision(),
        "versions": {name: installed(name) for name in ("torch", "triton", "numpy", *PEERS)},
        "python": platform.python_version(),
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


def verdict(device: str, rows: list[dict]) -> tuple[list[dict], str]:
    """Return the bars with their figures, and the last line."""
    judged, missed, unknown = [], [], []
    for bar in bars(device):
        figure = bar.figure(rows)
        met = None if figure is None else bar.met(figure)
        judged.append({"bar": str(bar), "figure": figure, "met": met})
        if met is None:
            unknown.append(str(bar))
        elif not met:
            missed.append(f"{bar}: {figure:.3g}")
    n_met = sum(entry["met"] is True for entry in judged)
    line = f"bars: {n_met} met, {len(missed)} missed"
    if missed:
        line += f" ({'; '.join(missed)})"
    if unknown:
        line += f", {len(unknown)} not measured ({'; '.join(unknown)})"
    return judged, line


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer degrees, shorter rounds")
    parser.add_argument("--only", help="one operation, as cg_conv")
    parser.add_argument("--out", type=Path, help="JSON file; scripts/results/... by default")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; use --device cpu")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high" if arguments.device == "cuda" else "highest")
    # e3nn scripts its harmonics and cuEquivariance says that it has no kernels: known, no news.
    warnings.filterwarnings("ignore")
    out = arguments.out or ROOT / "scripts/results" / f"tensor_product_{arguments.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    document = {**header(arguments), "rows": []}
    for name, version in document["versions"].items():
        print(f"{name:<22} {version or 'not installed'}")
    print(f"\n{'op':<20} L    C   edges dtype    implementation      ", end="")
    print(
        "ns per edge and ratio to auto: forward, + backward, double; saved bytes per edge; errors"
    )
    seconds = 0.7 if arguments.quick else 4.0
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
        document["bars"], line = verdict(arguments.device, document["rows"])
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        os.replace(partial, out)  # what was measured survives a time limit
    print(f"\nwritten: {out}")
    print(line)


if __name__ == "__main__":
    main()
