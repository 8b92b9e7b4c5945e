"""The backend of the Triton kernels: registered operations whose kernels need CUDA."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from atomeq.ops.kernel_backend import KernelBackend
from atomeq.ops.paths import Mode, Path, RadialMap, made_weights
from atomeq.ops.reference_backend import ReferenceBackend
from atomeq.ops.specification import OpSpec

# What is made once for all layers, a few hundredths of the time of one, and what calls a function
# of the user's between two products of matrices.
_BY_TORCH = frozenset({"edge_wigner", "spherical_harmonics", "sphere_pointwise"})
_COUPLINGS = frozenset({"tensor_product", "cg_conv"})
_reference = ReferenceBackend()


class TritonBackend(KernelBackend):
    """The registered operations with Triton's kernels; Triton is imported when they are needed."""

    def __init__(self) -> None:
        super().__init__("triton")
        self.edge_wigner = _reference.edge_wigner
        self.spherical_harmonics = _reference.spherical_harmonics
        self.sphere_pointwise = _reference.sphere_pointwise

    def refusal(self, spec: OpSpec) -> str | None:
        """Refuse machines without CUDA or Triton at once; what remains the kernels know."""
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "Triton's kernels need CUDA, which this machine has not "
                "(torch.cuda.is_available() is False); TRITON_INTERPRET=1 in the environment runs "
                "them on a CPU, for tests"
            )
        if find_spec("triton") is None:
            return "Triton is not installed: pip install atomeq[cuda]"
        return None if self.by_torch(spec) else super().refusal(spec)

    def by_torch(self, spec: OpSpec) -> bool:
        """Whether the call has no kernels here and runs as the reference's plain torch."""
        return spec.op in _BY_TORCH or (spec.op in _COUPLINGS and spec.mode != "uvu")

    def tensor_product(
        self,
        x: Tensor,
        y: Tensor,
        weights: Tensor | None,
        paths: tuple[Path, ...],
        mode: Mode,
        stacked: bool,
    ) -> Tensor:
        """Couple two features by Clebsch-Gordan paths; kernels have mode uvu."""
        by_kernels = super().tensor_product if mode == "uvu" else _reference.tensor_product
        return by_kernels(x, y, weights, paths, mode, stacked)

    def cg_conv(
        self,
        x: Tensor,
        y: Tensor,
        weights: Tensor | None,
        edge_index: Tensor,
        n_atoms: int,
        paths: tuple[Path, ...],
        mode: Mode,
        stacked: bool,
        radial_map: RadialMap | None,
    ) -> Tensor:
        """Gather x on the sources, couple it with y, sum on the targets.

        Kernels have mode uvu; the sum over edges, which has to be repeatable, is one in any mode.
        """
        if mode == "uvu":
            return super().cg_conv(
                x, y, weights, edge_index, n_atoms, paths, mode, stacked, radial_map
            )
        weights = made_weights(weights, radial_map)
        gathered = x.index_select(0, edge_index[0])
        messages = _reference.tensor_product(gathered, y, weights, paths, mode, stacked)
        return self.segment_sum(messages, edge_index[1], n_atoms)
