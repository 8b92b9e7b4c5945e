"""The Wigner rows of edges as a registered operation, which is never differentiated."""

from types import SimpleNamespace

from torch import Tensor

from atomeq.ops.orders import m_primary_order
from atomeq.ops.registration import kernels_of, registered


def _fake_rows(call: SimpleNamespace) -> Tensor:
    n_rows = len(m_primary_order(call.lmax, call.mmax))
    return call.vectors.new_empty(call.vectors.shape[0], n_rows, (call.lmax + 1) ** 2)


@registered(outputs=_fake_rows)
def edge_wigner(vectors: Tensor, lmax: int, mmax: int, kernels: str) -> Tensor:
    """Return the rows that take edges to +y, (n_edges, n_rows, n_sph)."""
    return kernels_of("edge", kernels).edge_wigner(vectors, lmax, mmax)
