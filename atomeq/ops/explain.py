"""explain(): who serves an operation here, why the others do not, and the least it can cost."""

from dataclasses import dataclass

import torch

from atomeq.ops.costs import MACHINES, cost
from atomeq.ops.dispatch import AUTO_ORDER, BACKENDS, chosen_backend, load_backend
from atomeq.ops.specification import OpSpec


@dataclass(frozen=True)
class Explanation:
    """Who serves a call and at what cost; ``str()`` gives the report.

    Attributes:
        spec: The call.
        asked_for: The name asked for, or ``auto``.
        backend: The name of the backend that serves it; None if the one asked for does not.
        refusals: Why each of the other backends does not.
        flops: Arithmetic of one forward call.
        bytes: Memory traffic of a fused kernel.
        floor: Least time on ``machine``, s.
        machine: The machine assumed for the floor.
    """

    spec: OpSpec
    asked_for: str
    backend: str | None
    refusals: dict[str, str]
    flops: int
    bytes: int
    floor: float
    machine: str

    def __str__(self) -> str:
        spec = self.spec
        lines = [
            f"{spec.op}: lmax={spec.lmax} mmax={spec.mmax} channels={spec.channels} "
            f"n_edges={spec.n_edges} {spec.dtype} on {spec.device}",
            f"  served by   {self.backend or 'none'} (asked for: {self.asked_for})",
        ]
        lines += [f"  not by      {name}: {reason}" for name, reason in self.refusals.items()]
        lines.append(f"  arithmetic  {self.flops / 1e6:.3g} MFLOP")
        lines.append(f"  traffic     {self.bytes / 1e6:.3g} MB, if fused")
        lines.append(f"  floor       {self.floor * 1e6:.3g} µs on {self.machine} (assumed)")
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
) -> Explanation:
    """Report which backend would serve a call here, why the others would not, and the least cost.

    Args:
        op: Name of a method of :class:`~atomeq.ops.dispatch.Backend`.
        lmax: Highest degree.
        mmax: Highest order.
        channels: Number of channels.
        n_edges: Number of edges, or of rows where the operation has no edges.
        dtype: Dtype of the features.
        device: Device of the features.

    Raises:
        ValueError: If the operation is unknown.

    Example:
        >>> report = explain("so2_linear", lmax=2, mmax=2, channels=16, n_edges=1000,
        ...                  dtype=torch.float32, device="cpu")
        >>> report.backend
        'cpu'
    """
    spec = OpSpec(op, lmax, mmax, channels, n_edges, dtype, torch.device(device))
    work = cost(spec)
    asked_for = chosen_backend()
    candidates = AUTO_ORDER if asked_for == "auto" else (asked_for,)
    reasons = {name: load_backend(name).refusal(spec) for name in BACKENDS}
    backend = next((name for name in candidates if reasons[name] is None), None)
    machine = MACHINES["cuda" if spec.device.type == "cuda" else "cpu"]
    return Explanation(
        spec=spec,
        asked_for=asked_for,
        backend=backend,
        refusals={
            name: reason or f"it could, but {backend} comes first"
            for name, reason in reasons.items()
            if name != backend
        },
        flops=work.flops,
        bytes=work.bytes,
        floor=work.floor(machine, dtype),
        machine=machine.name,
    )
