"""Kernel sets: raw functions, tensors in and tensors out, that the registered operations call.

A set knows nothing of autograd. It is named by a string, since that is what an operation of a
traced graph can carry, and found here when first asked for. A set need not have every topic.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Protocol, cast

from torch import Tensor

from atomeq.ops.specification import OpSpec

# (topic, set) -> "module:class"
KERNELS: dict[tuple[str, str], str] = {
    ("edge", "cpu"): "atomeq.ops.backends.cpu.edge:CPUEdgeKernels",
}


class EdgeKernels(Protocol):
    """Rotation of features into and out of the edge frames, for one kernel set.

    ``wigner`` (n_edges, n_rows, n_sph) holds the rows |m| <= mmax of each edge's rotation W in
    m-primary order, block diagonal in l; multiplied by an infinitesimal rotation from the right it
    is still that. G x joins the atoms at ``indices`` along the channels: S indices make rows of
    S * channels; no index means that x belongs to the edges already. ``segments`` holds, for each
    index, the start of every atom's edges in a sorted list (n_atoms + 1,) and that list (n_edges,);
    it is empty unless ``wants_segments``.
    """

    wants_segments: bool

    def refusal(self, spec: OpSpec) -> str | None:
        """Return None if these kernels serve the call, else the reason why not."""
        ...

    def gather_rotate(
        self,
        x: Tensor,
        wigner: Tensor,
        indices: Sequence[Tensor],
        *,
        lmax: int,
        mmax: int,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Return scale * W G x, (n_edges, n_rows, S * channels).

        ``scale`` (n_edges, sum over m of (lmax - m + 1) * S * channels) has m ascending; +m and -m
        share theirs.
        """
        ...

    def rotate_scatter(
        self,
        rows: Tensor,
        wigner: Tensor,
        indices: Sequence[Tensor],
        segments: Sequence[Tensor],
        n_atoms: int,
        *,
        lmax: int,
        mmax: int,
        factor: Tensor | None = None,
    ) -> Tensor:
        """Return G^T W^T (factor * rows), (n_atoms, n_sph, channels).

        ``factor`` is (n_edges,). Without indices the result is (n_edges, n_sph, channels).
        """
        ...

    def torque(
        self,
        x: Tensor,
        rows: Tensor,
        wigner: Tensor,
        indices: Sequence[Tensor],
        *,
        lmax: int,
        mmax: int,
    ) -> Tensor:
        """Return <W^T rows, X_k G x> for the three generators X_k, (n_edges, 3)."""
        ...


@cache
def edge_kernels(name: str) -> EdgeKernels:
    """Return the edge kernels of a set, importing them when first asked for."""
    return cast(EdgeKernels, _load("edge", name))


def _load(topic: str, name: str) -> object:
    module, _, attribute = KERNELS[topic, name].partition(":")
    return getattr(import_module(module), attribute)()
