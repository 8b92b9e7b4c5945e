"""Count what an edge layer on the Triton kernels reads and writes, on a machine without a GPU.

    python scripts/benchmark.py count-traffic [LMAX ...] [--precision NAME] [--cublas]

prints bytes per edge for a forward pass and for forces (+ backward) with fixed weights, then for a
step of force training (both, + the gradient of the gradient), which keeps and writes more, the time
at an H200's bandwidth, and the largest parts. No kernel runs: a call counts each input once and
each output once, so an atom's features that many edges gather count once, as if the cache held
them; weights, which do not grow with the edges, cancel in the difference of two sizes; frames and
sorted edges, which all layers share, are there before. The figures are there to predict what a
change gains, not to replace a measurement.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # the kernels are called on CPU tensors, and replaced below

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atomeq.ops.coupling.triton import kernels as coupling
from atomeq.ops.dispatch import use_backend
from atomeq.ops.edge.operations import escn_conv
from atomeq.ops.edge.triton import gate, rotation, row_scale, so2, wigner
from atomeq.ops.edge.wigner import build_edge_frame
from atomeq.ops.registration import functions
from atomeq.ops.segment.triton import kernels as segment
from atomeq.ops.sphere.triton import kernels as sphere

BANDWIDTH = 4.3e12  # bytes/s
EDGES = 256
DEGREE = 16  # edges of an atom
PHASES = {
    "fixed": ("forward", "+ backward"),
    "trained": ("forward", "+ backward", "+ second gradient"),
}
MODULES = (coupling, gate, rotation, row_scale, segment, so2, sphere, wigner)


class Traffic(TorchDispatchMode):
    """Counts bytes by the name of the operation or kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.launches = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "atomeq":  # what it is made of counts, not itself
            with self:
                return functions[func._schema.name](*args, **kwargs)
        result = func(*args, **kwargs)
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not view and "empty" not in func.__name__ and "detach" not in func.__name__:
            written = _tensors(result)
            read = written if "index_select" in func.__name__ else _tensors([args, kwargs])
            self.count(func.__name__.partition(".")[0], [*read, *written])
        return result

    def count(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Add what a call reads and writes."""
        self.bytes[name] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.launches += 1

    def launch(
        self, kernel: Any, grid: object, *tensors: Tensor | None, like: Tensor, **constants: Any
    ) -> None:
        """Count, and start nothing: what the kernels are given in the place of ``launch``."""
        self.count(kernel.__name__, [tensor for tensor in tensors if tensor is not None])


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    return (
        [t for member in value for t in _tensors(member)] if isinstance(value, list | tuple) else []
    )


def layer(
    lmax: int, channels: int, n_edges: int, *, trained: bool
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return an edge layer as models have it, with its last radial layer inside, and its inputs."""
    mmax, n_atoms, width = min(2, lmax), n_edges // DEGREE, 64
    edges = torch.randint(0, n_atoms, (2, n_edges)).sort(dim=1).values
    sizes = [lmax - m + 1 for m in range(mmax + 1)]
    n_scales = sum(sizes) * 2 * channels
    first = [((lmax + sizes[0]) * channels, sizes[0] * 2 * channels)]
    first += [(2, n * channels, n * 2 * channels) for n in sizes[1:]]
    second = [(sizes[0] * channels, sizes[0] * channels)]
    second += [(2, n * channels, n * channels) for n in sizes[1:]]
    shapes = [(n_atoms, (lmax + 1) ** 2, channels), (n_edges, 3), (n_edges, width)]
    shapes += [(n_scales, width), (n_scales,), (n_edges,), *first, *second]
    inputs = [torch.randn(shape) for shape in shapes]
    for number, tensor in enumerate(inputs):  # features, vectors, radial values and envelopes move
        tensor.requires_grad_(trained or number in (0, 1, 2, 5))
    frame = build_edge_frame(inputs[1], edges, n_atoms=n_atoms, lmax=lmax, mmax=mmax)
    frame.segments_for(frame.ends("both"))

    def compute(*given: Tensor) -> Tensor:
        x, _, radial, weight, bias, envelope, *maps = given  # the frame has the vectors
        return escn_conv(
            x,
            frame,
            maps[: mmax + 1],
            maps[mmax + 1 :],
            radial=radial,
            radial_map=(weight, bias),
            envelope=envelope,
        )

    return compute, inputs


def traffic(lmax: int, channels: int, n_edges: int, weights: str) -> list[Traffic]:
    """Return what each phase adds."""
    compute, inputs = layer(lmax, channels, n_edges, trained=weights == "trained")
    found = [Traffic() for _ in PHASES[weights]]

    def counted(number: int, call: Callable[[], Any]) -> Any:
        for module in MODULES:
            module.launch = found[number].launch
        with found[number], use_backend("triton"):
            return call()

    out = counted(0, lambda: compute(*inputs))
    moved = [inputs[0], inputs[1]]
    if weights == "fixed":
        counted(1, lambda: torch.autograd.grad(out.sum(), moved))
        return found
    first = counted(1, lambda: torch.autograd.grad(out.sum(), moved, create_graph=True))
    # A loss of energies and forces: the layer's gradient by the energy is merged with the second.
    loss = torch.stack([out.sum(), *(gradient.sum() for gradient in first)]).sum()
    counted(2, lambda: torch.autograd.grad(loss, inputs, allow_unused=True))
    return found


def counts(lmax: int, channels: int, weights: str) -> Iterator[str]:
    """Yield a line for each phase."""
    torch.manual_seed(0)
    few, many = (traffic(lmax, channels, n, weights) for n in (EDGES, 2 * EDGES))
    total = 0.0
    for phase, one, two in zip(PHASES[weights], few, many, strict=True):
        parts = {name: (two.bytes[name] - one.bytes[name]) / EDGES for name in two.bytes}
        total += sum(parts.values())
        largest = sorted(parts, key=lambda name: -parts[name])[:6]
        yield (
            f"{phase:<18} {sum(parts.values()) / 1e3:7.1f} kB, "
            f"{two.launches:4d} launches; up to here {total / 1e3:7.1f} kB, "
            f"{total / BANDWIDTH * 1e9:6.2f} ns: "
            + ", ".join(f"{name} {parts[name] / 1e3:.1f}" for name in largest)
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("lmax", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--precision", default="high", choices=("highest", "high", "medium"))
    many = (
        f"as with more than {so2._MANY_EDGES} edges, where cuBLAS multiplies and gates are a pass"
    )
    parser.add_argument("--cublas", action="store_true", help=many)
    arguments = parser.parse_args(argv)
    if arguments.cublas:
        so2._MANY_EDGES = 0
    torch.set_float32_matmul_precision(arguments.precision)
    for lmax in arguments.lmax:
        for weights in PHASES:
            for line in counts(lmax, arguments.channels, weights):
                sys.stdout.write(f"L={lmax} C={arguments.channels} {weights} {line}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
