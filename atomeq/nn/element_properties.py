"""Measured properties of the elements: physics-aware inputs of atom embeddings.

The table ``element_properties.csv`` beside this file has one row for each element from 1 to 118:
period, group, and the 14 properties FAENet (arXiv:2305.05577) standardises, as facts from mendeleev
0.12.1. An empty cell means nobody has measured it, or that the element is in no group.
"""

import csv
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

#: Elements whose values set the mean and the spread of each column.
STANDARDISED_UP_TO = 85
#: Rows of a table of groups: 1 to 18, and row 0 for lanthanides and actinides, which are in none.
N_GROUPS = 19


class ElementProperties(NamedTuple):
    """Properties by atomic number; row 0 is no element and has zeros.

    Attributes:
        values: (119, 14) float32, each column with mean 0 and standard deviation 1 over the
            elements 1 to 85 that have it.
        measured: (119, 14), False where the cell is empty and ``values`` has the mean, 0.
        period: (119,) from 1 to 7.
        group: (119,) from 1 to 18, and 0 for the f-block.
    """

    values: Tensor
    measured: Tensor
    period: Tensor
    group: Tensor


@cache
@torch.inference_mode(False)  # what is kept serves training too, whoever asked first
def element_properties() -> ElementProperties:
    """Read the table once. The tensors are shared: copy them before writing."""
    path = Path(__file__).with_suffix(".csv")
    with path.open(encoding="utf-8", newline="") as stream:
        _header, *rows = csv.reader(stream)
    cells = [["", "0", "", *([""] * (len(rows[0]) - 3))], *rows]
    values = torch.tensor([[float(cell or "nan") for cell in row[3:]] for row in cells])
    measured = ~values.isnan()
    return ElementProperties(
        values=torch.where(measured, values, 0.0),
        measured=measured,
        period=torch.tensor([int(row[1]) for row in cells]),
        group=torch.tensor([int(row[2] or 0) for row in cells]),
    )
