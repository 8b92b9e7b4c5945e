"""What a backend or a kernel set must know of a call to say whether it serves it."""

from typing import NamedTuple

import torch


class OpSpec(NamedTuple):
    """One call: the operation, its sizes, its dtype and device."""

    op: str
    lmax: int
    mmax: int
    channels: int
    n_edges: int
    dtype: torch.dtype
    device: torch.device
