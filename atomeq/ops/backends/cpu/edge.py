"""Edge rotations of the ``cpu`` set in plain torch, a block of edges at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atomeq.ops.backends.blocks import blocks
from atomeq.ops.orders import radial_rows
from atomeq.ops.registered.edge_rotation import gathered
from atomeq.ops.specification import OpSpec
from atomeq.ops.tables import table_like
from atomeq.ops.wigner import flat_generators


class CPUEdgeKernels:
    """See :class:`~atomeq.ops.registered.kernel_sets.EdgeKernels`."""

    wants_segments = False  # atoms are added to one after the other, in the order of the edges

    def refusal(self, spec: OpSpec) -> str | None:
        """Refuse other devices."""
        return None if spec.device.type == "cpu" else "its kernels run on a CPU"

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
        """Return scale * W G x."""
        channels = max(1, len(indices)) * x.shape[2]
        rows = x.new_empty(*wigner.shape[:2], channels)
        for part in blocks(len(rows), x.shape[1] * channels, x.device):
            members = gathered(x[part], []) if not indices else gathered(x, _part(indices, part))
            torch.bmm(wigner[part], members, out=rows[part])
            if scale is not None:
                order = table_like(radial_rows, lmax, mmax, like=x)
                rows[part].mul_(scale[part].unflatten(1, (-1, channels)).index_select(1, order))
        return rows

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
        channels = rows.shape[2] // max(1, len(indices))
        shape = (n_atoms if indices else len(rows), wigner.shape[2], channels)
        total = rows.new_zeros(shape) if indices else rows.new_empty(shape)
        for part in blocks(len(rows), wigner.shape[2] * rows.shape[2], rows.device):
            lab = torch.bmm(wigner[part].mT, rows[part])
            if factor is not None:
                lab.mul_(factor[part, None, None])
            if not indices:
                total[part] = lab
            for index, members in zip(indices, lab.split(channels, dim=-1), strict=False):
                total.index_add_(0, index[part], members)
        return total

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
        """Sum over the channels first: the size of what is left does not grow with them."""
        result = rows.new_empty(len(rows), 3)
        generators = table_like(flat_generators, lmax, like=x)
        for part in blocks(len(rows), wigner.shape[2] * rows.shape[2], x.device):
            members = x[part] if not indices else gathered(x, _part(indices, part))
            outer = torch.bmm(torch.bmm(wigner[part].mT, rows[part]), members.mT)
            torch.mm(outer.flatten(1), generators, out=result[part])
        return result


def _part(indices: Sequence[Tensor], part: slice) -> list[Tensor]:
    return [index[part] for index in indices]
