"""What a backend or a kernel set must know of a call to say whether it serves it."""

from typing import NamedTuple

import torch

from atomeq.ops.paths import Mode


class OpSpec(NamedTuple):
    """One call: the operation, its sizes, its dtype and device.

    Attributes:
        op: Name of the operation.
        lmax: Highest degree.
        mmax: Highest order.
        channels: Number of channels.
        n_edges: Number of rows the operation works on, edges mostly.
        dtype: Dtype of the features.
        device: Device of the features.
        mode: How channels couple, in Clebsch-Gordan products.
        weighted: Whether the paths of a Clebsch-Gordan product have weights.
    """

    op: str
    lmax: int
    mmax: int
    channels: int
    n_edges: int
    dtype: torch.dtype
    device: torch.device
    mode: Mode = "uvu"
    weighted: bool = True
