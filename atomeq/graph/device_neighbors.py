"""Neighbour lists of many structures at once, searched on the device where their positions are.

On CUDA, nvalchemi-toolkit-ops searches the cell lists of a whole batch in one go; neighbors.py
decides beforehand, on the CPU, whether a structure can be searched at all, and how. The pairs are
those of :func:`~atomeq.graph.neighbors.neighbor_list`, in its order. moving.py asks here.
"""

import importlib.util
import logging
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_AT_LEAST = 16  # neighbours for which there is room at first
_FIRST_GUESS = 1.5  # times the neighbours that the mean density gives, for where it is higher
_log = logging.getLogger(__name__)


@cache
def searches_on(device: torch.device) -> bool:
    """Tell whether lists are searched on a device: on CUDA, with nvalchemi-toolkit-ops there."""
    if device.type != "cuda":
        return False
    if importlib.util.find_spec("nvalchemiops") is None:
        _log.warning(
            "neighbours are searched on the CPU; with pip install 'atomeq[cuda]' the GPU does it"
        )
        return False
    return True


def search_pairs(
    boxes: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
    cutoff: float,
    device: torch.device,
) -> list[tuple[Tensor, Tensor]]:
    """Find the pairs of many structures on a device.

    Args:
        boxes: Positions (n_atoms, 3), Å, and cell (3, 3), Å, of each structure, as
            :func:`~atomeq.graph.neighbors.enclosed` returns them.
        cutoff: Å; rounding decides on pairs at exactly this distance.
        device: Where to search, and where the result is.

    Returns:
        The edge_index (2, n_pairs) and cell_offsets (n_pairs, 3) of each structure.

    Raises:
        ImportError: nvalchemi-toolkit-ops is not installed.
    """
    counts = [len(pos) for pos, _ in boxes]
    pos = torch.from_numpy(np.concatenate([pos for pos, _ in boxes])).to(device)
    cell = torch.from_numpy(np.stack([cell for _, cell in boxes])).to(device)
    sizes = torch.tensor(counts, device=device)
    system = torch.arange(len(boxes), device=device).repeat_interleave(sizes)  # (n_atoms,)
    table, shifts, found = _cell_list(pos, cell, system, cutoff)
    filled = torch.arange(table.shape[1], device=device) < found[:, None]
    target, place = torch.nonzero(filled, as_tuple=True)
    source = table[target, place].long()
    offsets = shifts[target, place].long()
    order = _order(target, source, offsets, len(pos))
    target, source, offsets = target[order], source[order], offsets[order]
    first = (sizes.cumsum(0) - sizes)[system[target]]
    edge_index = torch.stack([source - first, target - first])
    n_pairs = torch.bincount(system[target], minlength=len(boxes)).tolist()
    return list(zip(edge_index.split(n_pairs, dim=1), offsets.split(n_pairs), strict=True))


def _cell_list(
    pos: Tensor, cell: Tensor, system: Tensor, cutoff: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return neighbours (n_atoms, width), their offsets, and how many of them there are."""
    from nvalchemiops.torch.neighbors import batch_cell_list

    density = torch.bincount(system) / torch.linalg.det(cell).abs()
    sphere = 4 / 3 * math.pi * cutoff**3
    width = _AT_LEAST + math.ceil(_FIRST_GUESS * sphere * float(density.max()))
    periodic = torch.ones(len(cell), 3, dtype=torch.bool, device=pos.device)
    while True:
        table, found, shifts = batch_cell_list(
            pos, cutoff, cell, periodic, system.to(torch.int32), max_neighbors=width
        )
        most = int(found.max())
        if most <= width:
            return table, shifts, found
        width = most


def _order(target: Tensor, source: Tensor, offsets: Tensor, n_atoms: int) -> Tensor:
    """Return what sorts pairs by target, then source, then offset."""
    span = 2 * int(offsets.abs().max()) + 1 if len(offsets) else 1
    image = (offsets[:, 0] * span + offsets[:, 1]) * span + offsets[:, 2]
    by_image = image.argsort()
    pair = (target * n_atoms + source)[by_image]
    return by_image[pair.argsort(stable=True)]
