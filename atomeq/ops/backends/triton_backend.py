"""The backend of the Triton kernels: registered operations for edges and couplings, CUDA only."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from atomeq.ops.backends.kernel_backend import KernelBackend
from atomeq.ops.backends.reference import ReferenceBackend
from atomeq.ops.clebsch_gordan import Form
from atomeq.ops.paths import Mode, Path
from atomeq.ops.registered import coupling
from atomeq.ops.registered.kernel_sets import coupling_kernels
from atomeq.ops.specification import OpSpec
from atomeq.typing import EdgeIndex

_COUPLINGS = ("tensor_product", "cg_conv")
# Made once for all layers, a few hundredths of the time of one: plain torch serves them.
_PLAIN = ("edge_wigner",)


class TritonBackend(KernelBackend):
    """The registered operations with Triton's kernels; Triton is imported when they are needed."""

    def __init__(self) -> None:
        super().__init__("triton")

    def refusal(self, spec: OpSpec) -> str | None:
        """Refuse machines without CUDA or Triton at once; what remains the kernels know."""
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "Triton's kernels need CUDA, which this machine has not "
                "(torch.cuda.is_available() is False)"
            )
        if find_spec("triton") is None:
            return "Triton is not installed: pip install atomeq[cuda]"
        if spec.op in _PLAIN:
            return None
        if spec.op in _COUPLINGS:
            return coupling_kernels(self.name).refusal(spec)
        return super().refusal(spec)

    def edge_wigner(self, vectors: Tensor, lmax: int, mmax: int) -> Tensor:
        """Return the Wigner rows that take edges to +y."""
        return ReferenceBackend().edge_wigner(vectors, lmax, mmax)

    def tensor_product(
        self,
        x: Tensor,
        y: Tensor,
        weights: Tensor | None,
        paths: tuple[Path, ...],
        mode: Mode,
        stacked: bool,
    ) -> Tensor:
        """Couple two features that belong to the same things."""
        batch = x.shape[:-2]
        flat_y = y.reshape(-1, y.shape[-1]) if mode == "uvu" else y.reshape(-1, *y.shape[-2:])
        per_item = weights is not None and weights.ndim > (4 if mode == "uvw" else 2)
        if weights is not None and per_item:
            weights = weights.reshape(-1, *weights.shape[len(batch) :])
        flat_x = x.reshape(-1, *x.shape[-2:])
        form = Form(paths, mode, stacked)
        product = coupling.couple(flat_x, flat_y, weights, None, len(flat_x), form, self.name)
        return product.reshape(*batch, *product.shape[1:])

    def cg_conv(
        self,
        x: Tensor,
        y: Tensor,
        weights: Tensor | None,
        edge_index: EdgeIndex,
        n_atoms: int,
        paths: tuple[Path, ...],
        mode: Mode,
        stacked: bool,
    ) -> Tensor:
        """Gather x on the sources, couple it with y, sum on the targets."""
        source, target = edge_index
        form = Form(paths, mode, stacked)
        return coupling.couple(x, y, weights, (source, target), n_atoms, form, self.name)
