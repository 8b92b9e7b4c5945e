"""explain(): who serves an operation here, why the others do not, and the least it can cost."""

from dataclasses import dataclass

import torch

import atomeq.ops.atoms.operations
import atomeq.ops.clifford.operations
import atomeq.ops.coupling.operations
import atomeq.ops.coupling.symmetric_contraction
import atomeq.ops.edge.operations
import atomeq.ops.harmonics.operations
import atomeq.ops.pairs.operations
import atomeq.ops.segment.operations
import atomeq.ops.sphere.gaunt
import atomeq.ops.sphere.operations  # noqa: F401 - an operation is known once it is imported
from atomeq.ops.c_compiler import unavailable
from atomeq.ops.costs import MACHINES, Floor, cost
from atomeq.ops.dispatch import AUTO_ORDER, backends, by_torch, chosen_backend, distrust, refusal
from atomeq.ops.specification import Mode, OpSpec

# Functions of atomeq.ops that call an operation of another name.
_CALLS = {
    "build_edge_frame": "edge_wigner",
    "so2_linear": "so2_linear_with_scalars",
    "segment_mean": "segment_sum",
}


@dataclass(frozen=True)
class Explanation:
    """Who serves a call and at what cost; ``str()`` gives the report.

    Attributes:
        spec: The call.
        asked_for: The name asked for, or ``auto``.
        auto: What ``auto`` chooses.
        backend: The name of the backend that serves it; None if the one asked for does not.
        by_torch: Whether it does so in plain torch, by no kernel made for this call.
        refusals: Why each of the other backends does not.
        kernels: What this machine has to run kernels by, see :func:`kernels_here`.
        flops: Arithmetic of one forward call.
        matrix_flops: That part of it which is products of large matrices.
        bytes: Memory traffic of a fused kernel.
        floor: Least time on ``machine``, s.
        limit: What sets it, ``arithmetic`` or ``memory``.
        machine: The machine assumed for the floor.
    """

    spec: OpSpec
    asked_for: str
    auto: str | None
    backend: str | None
    by_torch: bool
    refusals: dict[str, str]
    kernels: dict[str, str]
    flops: int
    matrix_flops: int
    bytes: int
    floor: float
    limit: str
    machine: str

    def __str__(self) -> str:
        spec = self.spec
        lines = [
            f"{spec.op}: lmax={spec.lmax} mmax={spec.mmax} channels={spec.channels} "
            f"n_edges={spec.n_edges} {spec.dtype} on {spec.device}",
            f"  served by   {self.backend or 'none'}{', in plain torch' if self.by_torch else ''} "
            f"(asked for: {self.asked_for})",
        ]
        if self.asked_for != "auto":
            lines.append(f"  auto takes  {self.auto or 'none'}")
        lines += [f"  not by      {name}: {reason}" for name, reason in self.refusals.items()]
        lines += [f"  {name:<11} {found}" for name, found in self.kernels.items()]
        share = self.matrix_flops / self.flops
        lines.append(f"  arithmetic  {self.flops / 1e6:.3g} MFLOP, {share:.0%} in large matrices")
        lines.append(f"  memory      {self.bytes / 1e6:.3g} MB read and written, if fused")
        per_row = self.floor / max(1, spec.n_edges) * 1e9
        lines.append(
            f"  floor       {self.floor * 1e6:.3g} µs, {per_row:.3g} ns per edge: no backend is "
            f"faster on {self.machine} (assumed), {self.limit} sets it"
        )
        return "\n".join(lines)


def explain(
    op: str,
    *,
    lmax: int,
    mmax: int,
    channels: int,
    n_edges: int,
    dtype: torch.dtype,
    device: torch.device | str,
    mode: Mode = "uvu",
    weighted: bool = True,
) -> Explanation:
    """Report which backend would serve a call here, why the others would not, and the least cost.

    Args:
        op: Name of a function of :mod:`atomeq.ops`.
        lmax: Highest degree.
        mmax: Highest order.
        channels: Number of channels.
        n_edges: Number of edges, or of rows where the operation has no edges.
        dtype: Dtype of the features.
        device: Device of the features.
        mode: How channels couple, in Clebsch-Gordan products.
        weighted: Whether the paths of such a product have weights.

    Returns:
        The report; ``print`` shows it as text.

    Raises:
        ValueError: If the operation is unknown.

    Example:
        >>> report = explain("so2_linear", lmax=2, mmax=2, channels=16, n_edges=1000,
        ...                  dtype=torch.float32, device="cpu")
        >>> report.backend
        'cpu'
    """
    name = _CALLS.get(op, op)
    where = torch.device(device)
    spec = OpSpec(name, lmax, mmax, channels, n_edges, dtype, where, mode, weighted)
    work = cost(spec)
    asked_for = chosen_backend()
    reasons = {name: refusal(name, spec) for name in backends()}
    for name in AUTO_ORDER:
        if reasons[name] is None and name != asked_for:
            reasons[name] = distrust(name, spec)
    auto = next((name for name in AUTO_ORDER if reasons[name] is None), None)
    named = asked_for if asked_for != "auto" and reasons[asked_for] is None else None
    backend = auto if asked_for == "auto" else named
    machine = MACHINES["cuda" if spec.device.type == "cuda" else "cpu"]
    floor: Floor = work.floor(machine, dtype)
    return Explanation(
        spec=spec,
        asked_for=asked_for,
        auto=auto,
        backend=backend,
        by_torch=backend is not None and by_torch(backend, spec),
        refusals={
            name: reason or _passed_over(name, asked_for, auto)
            for name, reason in reasons.items()
            if name != backend
        },
        kernels=kernels_here(),
        flops=work.flops,
        matrix_flops=work.matrix_flops,
        bytes=work.bytes,
        floor=floor.seconds,
        limit=floor.limit,
        machine=machine.name,
    )


def kernels_here() -> dict[str, str]:
    """Return what this machine runs kernels by: a C compiler and CUDA, or why it has none."""
    compiler = unavailable()
    cuda = "torch sees no CUDA device"
    if torch.cuda.is_available():
        cuda = torch.cuda.get_device_name()
    return {"C compiler": "there" if compiler is None else compiler, "CUDA": cuda}


def _passed_over(name: str, asked_for: str, auto: str | None) -> str:
    if asked_for != "auto":
        return f"it could, but {asked_for} was asked for"
    if name not in AUTO_ORDER:
        return "it could, but serves only when asked for by name"
    return f"it could, but {auto} comes first"
