"""The reference's edge rotations in a graph of torch.compile: its plain torch as a kernel set.

The compiler traces the backward pass of an ``autograd.Function`` once and takes it for a constant
of further derivatives: forces would be right and a loss on them silently wrong. The registered
operations are closed under differentiation in a graph too, so there the reference goes by them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from atomeq.ops.edge import rotation as edge_rotation
from atomeq.ops.edge.frame import EdgeFrame
from atomeq.ops.edge.reference_rotation import gathered, scattered, torque_of

KERNELS = "reference"


def rotate_to_edge(x: Tensor, frame: EdgeFrame, indices: tuple[Tensor, ...]) -> Tensor:
    """Gather by each index, join the channels, rotate into the edge frames."""
    return edge_rotation.gather_rotate(
        *(x, frame.vectors, frame.wigner, None, list(indices), []),
        *(frame.lmax, frame.mmax, KERNELS),
    )


def rotate_from_edge(
    y: Tensor, frame: EdgeFrame, envelope: Tensor | None, *, total: bool
) -> Tensor:
    """Rotate back to the lab frame and, if total, sum on the targets."""
    return edge_rotation.rotate_scatter(
        *(y, frame.vectors, frame.wigner, envelope, None, [frame.target] if total else [], []),
        *(frame.n_atoms, frame.lmax, frame.mmax, KERNELS),
    )


class ReferenceRotations:
    """The rotations of :class:`~atomeq.ops.edge.kernel_sets.EdgeKernels`, in plain torch."""

    wants_segments = False

    def gather_rotate(
        self, x: Tensor, wigner: Tensor, indices: Sequence[Tensor], *, lmax: int, mmax: int
    ) -> Tensor:
        """Return W G x."""
        return torch.bmm(wigner, gathered(x, indices))

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
        """Return G^T W^T (factor * rows)."""
        lab = torch.bmm(wigner.mT, rows)
        if factor is not None:
            lab.mul_(factor[:, None, None])
        return scattered(lab, indices, n_atoms) if indices else lab

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
        """Return <W^T rows, X_k G x>."""
        return torque_of(torch.bmm(wigner.mT, rows), gathered(x, indices), lmax)
