"""The backend of the Triton kernels: registered operations whose kernels need CUDA."""

import os
from importlib.util import find_spec

import torch

from atomeq.ops.backends.kernel_backend import KernelBackend
from atomeq.ops.backends.reference import ReferenceBackend
from atomeq.ops.specification import OpSpec


class TritonBackend(KernelBackend):
    """The registered operations with Triton's kernels; Triton is imported when they are needed."""

    # Made once for all layers, a few hundredths of the time of one; and what calls a function of
    # the user's between two products of matrices.
    by_torch = frozenset({"edge_wigner", "spherical_harmonics", "sphere_pointwise"})

    def __init__(self) -> None:
        super().__init__("triton")
        reference = ReferenceBackend()
        self.edge_wigner = reference.edge_wigner
        self.spherical_harmonics = reference.spherical_harmonics
        self.sphere_pointwise = reference.sphere_pointwise

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
        return None if spec.op in self.by_torch else super().refusal(spec)
