"""The Clebsch-Gordan product in plain torch."""

import torch
from torch import Tensor

from atomeq.ops.coupling.clebsch_gordan import Coupling, Form, coupling_table, couplings
from atomeq.ops.paths import Path
from atomeq.ops.specification import Mode
from atomeq.ops.tables import table_like


def coupled(x: Tensor, y: Tensor, weights: Tensor | None, form: Form) -> Tensor:
    """Couple groups of paths by one matrix each, weight them and sum those of equal l3.

    Args:
        x: (*, n1, U).
        y: (*, n2), or (*, n2, channels).
        weights: ([*,] n_paths, ...); None for weights of 1.
        form: What is coupled.

    Returns:
        (*, rows, channels).
    """
    paths, mode = form.paths, form.mode
    n_terms = form.n_terms(x.shape[-1], y.shape[-1])
    products: dict[int, Tensor] = {}
    for coupling in couplings(paths, mode):
        table = table_like(coupling_table, form, coupling, n_terms, like=x)
        rows = _coupled(x, y, table, coupling, mode)  # (*, rows of these paths, channels)
        sizes = [2 * paths[number].l3 + 1 for number in coupling.numbers]
        for number, part in zip(coupling.numbers, rows.split(sizes, dim=-2), strict=True):
            products[number] = _weighted(part, weights, number, mode)
    ordered = [products[number] for number in range(len(paths))]
    return torch.cat(ordered, dim=-2) if form.stacked else _summed(ordered, paths)


def _coupled(x: Tensor, y: Tensor, table: Tensor, coupling: Coupling, mode: Mode) -> Tensor:
    """Contract a group of paths with its table, (rows of y, rows of output, 2 l1 + 1)."""
    first, last = coupling.rows2
    left = x[..., coupling.l1**2 : (coupling.l1 + 1) ** 2, :]
    if mode == "uvu":
        return (y[..., first:last] @ table.flatten(1)).unflatten(-1, table.shape[1:]) @ left
    right = y[..., first:last, :]
    if mode == "uuu":
        outer = right.unsqueeze(-2) * left.unsqueeze(-3)  # (*, d2, d1, channels)
    else:
        outer = (right[..., :, None, None, :] * left[..., None, :, :, None]).flatten(-2)
    return table.transpose(0, 1).flatten(1) @ outer.flatten(-3, -2)  # (*, rows, channels)


def _weighted(part: Tensor, weights: Tensor | None, number: int, mode: Mode) -> Tensor:
    if weights is None:
        return part
    if mode == "uvw":
        return part @ weights[..., number, :, :, :].flatten(-3, -2)
    return part * weights[..., number, None, :]


def _summed(products: list[Tensor], paths: tuple[Path, ...]) -> Tensor:
    """Sum the paths of equal l3; a degree that no path reaches is zero."""
    totals: dict[int, Tensor] = {}
    for product, path in zip(products, paths, strict=True):
        totals[path.l3] = totals[path.l3] + product if path.l3 in totals else product
    *batch, _, channels = products[0].shape
    for l in range(max(totals)):
        if l not in totals:
            totals[l] = products[0].new_zeros(*batch, 2 * l + 1, channels)
    return torch.cat([totals[l] for l in range(len(totals))], dim=-2)
