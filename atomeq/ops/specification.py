"""What a backend must know of a call to say whether it serves it."""

from typing import Literal, NamedTuple

import torch

Mode = Literal["uvu", "uvw", "uuu"]


class Size(NamedTuple):
    """The sizes of a call, its dtype and device.

    Attributes:
        lmax: Highest degree.
        mmax: Highest order.
        channels: Number of channels.
        n_edges: Number of rows the operation works on, edges mostly; only 0 is told apart.
        dtype: Dtype of the features.
        device: Device of the features.
        mode: How channels couple, in Clebsch-Gordan products.
        weighted: Whether the paths of a Clebsch-Gordan product have weights.
    """

    lmax: int
    mmax: int
    channels: int
    n_edges: int
    dtype: torch.dtype
    device: torch.device
    mode: Mode = "uvu"
    weighted: bool = True


class OpSpec(NamedTuple):
    """One call: the name of the operation, and its :class:`Size`."""

    op: str
    lmax: int
    mmax: int
    channels: int
    n_edges: int
    dtype: torch.dtype
    device: torch.device
    mode: Mode = "uvu"
    weighted: bool = True
