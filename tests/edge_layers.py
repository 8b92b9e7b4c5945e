"""A whole eSCN edge layer with random weights, for the tests of its kernels."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from atomeq.ops.dispatch import use_backend
from atomeq.ops.edge.frame import EdgeFrame
from atomeq.ops.edge.operations import escn_conv
from atomeq.ops.edge.wigner import build_edge_frame

POLES = [[0.0, 1.3, 0.0], [0.0, -1.3, 0.0], [1e-8, 1.0, 0.0], [0.0, -1.0, 1e-8]]


@dataclass
class EdgeLayer:
    """Its inputs; all but ``edge_index`` are leaves that require a gradient."""

    lmax: int
    mmax: int
    channels: int = 3
    hidden: int = 4
    n_atoms: int = 4
    n_edges: int = 9
    chiral: bool = False
    biased: bool = False
    radial: str = "map"  # map, factors or none
    dtype: torch.dtype = torch.float64
    seed: int = 0
    leaves: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        degrees = [self.lmax + 1 - m for m in range(self.mmax + 1)]
        n_scales = sum(degrees) * 2 * self.channels
        x = random(self.n_atoms, (self.lmax + 1) ** 2, self.channels)
        poles = torch.tensor(POLES, dtype=torch.float64)[: self.n_edges]
        vectors = torch.cat((poles, random(max(0, self.n_edges - len(POLES)), 3)))
        shape = (2, len(vectors))
        self.edge_index = torch.randint(0, self.n_atoms, shape, generator=generator)
        leaves = {"x": x, "vectors": vectors}
        if self.radial == "map":
            leaves |= {
                "radial": random(len(vectors), 5),
                "radial_weight": random(n_scales, 5) / math.sqrt(5),
                "radial_bias": random(n_scales),
            }
        elif self.radial == "factors":
            leaves["radial"] = random(len(vectors), n_scales)
        if self.radial != "none":
            leaves["envelope"] = random(len(vectors)).square()
        leaves |= self._weights("first", degrees, 2 * self.channels, self.hidden, random)
        leaves |= self._weights("second", degrees, self.hidden, self.channels, random)
        if self.biased:
            leaves["first_bias"] = random(len(leaves["first.0"]))
            leaves["second_bias"] = random(len(leaves["second.0"]))
        self.leaves = {name: t.to(self.dtype).requires_grad_() for name, t in leaves.items()}

    def _weights(self, name, degrees, c_in, c_out, random) -> dict[str, Tensor]:
        weights = {}
        for m, n in enumerate(degrees):
            extra = self.lmax * c_out if m == 0 and name == "first" else 0
            both = (2,) if self.chiral and m else ()
            weight = random(*both, extra + n * c_out, n * c_in) / math.sqrt(n * c_in)
            weights[f"{name}.{m}"] = weight
        return weights

    def frame(self, rotation: Tensor | None = None) -> EdgeFrame:
        return build_edge_frame(
            self.leaves["vectors"],
            self.edge_index,
            n_atoms=self.n_atoms,
            lmax=self.lmax,
            mmax=self.mmax,
            rotation=rotation,
        )

    def __call__(
        self, backend: str, *, recompute: bool = False, frame: EdgeFrame | None = None
    ) -> Tensor:
        leaves = self.leaves
        radial_map = None
        if "radial_weight" in leaves:
            radial_map = (leaves["radial_weight"], leaves["radial_bias"])
        if frame is None:
            frame = self.frame()
        with use_backend(backend):
            return escn_conv(
                leaves["x"],
                frame,
                [leaves[f"first.{m}"] for m in range(self.mmax + 1)],
                [leaves[f"second.{m}"] for m in range(self.mmax + 1)],
                radial=leaves.get("radial"),
                radial_map=radial_map,
                envelope=leaves.get("envelope"),
                biases=(leaves.get("first_bias"), leaves.get("second_bias")),
                recompute=recompute,
            )

    def derivatives(self, backend: str, *, recompute: bool = False) -> dict[str, Tensor]:
        """Return the value, every gradient, and every gradient of a loss on all gradients."""
        generator = torch.Generator().manual_seed(1)
        inputs = list(self.leaves.values())
        frame = self.frame()
        out = self(backend, recompute=recompute, frame=frame)
        weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
        energy = (out * weights).sum() + out.square().sum()
        first = torch.autograd.grad(energy, inputs, create_graph=True)
        loss = sum((torch.sin(g) + g.square()).sum() for g in first)
        second = torch.autograd.grad(loss, inputs)
        found = {"value": out} | dict(zip(self.leaves, first, strict=True))
        return found | {f"second of {name}": g for name, g in zip(self.leaves, second, strict=True)}


def relative(value: Tensor, expected: Tensor) -> float:
    scale = expected.norm().clamp(min=torch.finfo(expected.dtype).tiny)
    return ((value - expected).norm() / scale).item()


def kept_bytes_of_an_edge(layer: EdgeLayer, *, recompute: bool = False) -> float:
    """Return the bytes kept per edge between the passes, without the frame layers share."""
    frame = layer.frame()
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer("cpu", recompute=recompute, frame=frame)
    pointers = {t.data_ptr() for t in (frame.wigner, frame.source, frame.target, frame.vectors)}
    of_edges = [t for at, t in kept.items() if at not in pointers and len(t) == layer.n_edges]
    return sum(t.numel() * t.element_size() for t in of_edges) / layer.n_edges
