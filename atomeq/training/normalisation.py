"""References from training structures: the shift per element and the scale of the network."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from atomeq.data.ase_files import DataError, atomic_number, read_isolated_atoms
from atomeq.data.batching import GraphDataset
from atomeq.data.datamodule import DataFile
from atomeq.potential.checkpoint import load_potential
from atomeq.potential.potential import Potential
from atomeq.potential.references import AtomicReferences, least_squares_shift

logger = logging.getLogger(__name__)


def fit_references(
    dataset: GraphDataset,
    *,
    shift: Literal["least_squares", "none"] | DataFile | Mapping[str, float] = "least_squares",
    scale: Literal["forces", "energy"] | float = "forces",
    offset: float = 0.0,
) -> AtomicReferences:
    """Return references fitted to training structures alone.

    Args:
        dataset: The training structures with labels.
        shift: ``least_squares``, ``none``, a file of isolated atoms, or eV by element symbol.
        scale: ``forces``, ``energy``, or eV per unit of the network's output.
        offset: eV of every structure, taken as it is.

    Raises:
        DataError: Labels that the fit needs are missing, or an element has no isolated atom.
    """
    elements = dataset.elements
    table = _shift(dataset, shift, elements)
    factor = _scale(dataset, scale, table)
    shown = ", ".join(f"Z={z}: {e:.4f}" for z, e in table.items())
    logger.info("references: %s eV; scale %.5g", shown, factor)
    return AtomicReferences(table, scale=factor, offset=offset)


def take_weights(potential: Potential, source: str | Path) -> None:
    """Give a potential the weights and references of another with the same model.

    Args:
        potential: Changed in place.
        source: Name or folder of the other.

    Raises:
        CheckpointError: There is no such potential.
        DataError: It has another model.
    """
    other = load_potential(source)
    try:
        potential.model.load_state_dict(other.model.state_dict())
    except RuntimeError as error:
        raise DataError(
            f"{source} is a {type(other.model).__name__} whose weights do not fit the "
            f"{type(potential.model).__name__} of this configuration: {error}"
        ) from error
    potential.references = other.references


def _shift(
    dataset: GraphDataset,
    source: Literal["least_squares", "none"] | DataFile | Mapping[str, float],
    elements: list[int],
) -> dict[int, float]:
    if isinstance(source, Mapping):
        given = {atomic_number(symbol): float(energy) for symbol, energy in source.items()}
        return _covering(given, elements, "the references given by element")
    if source == "none":
        return dict.fromkeys(elements, 0.0)
    if source == "least_squares":
        labelled = [g for g in dataset.sample() if bool(torch.isfinite(_label(g, "energy")).all())]
        if not labelled:
            raise DataError("references by least squares need energies; none of the structures has")
        fitted = least_squares_shift(
            [graph.atomic_numbers for graph in labelled], [float(g.energy) for g in labelled]
        )
        return _covering(fitted, elements, "the energies that the references are fitted to")
    return _covering(read_isolated_atoms(source), elements, f"the isolated atoms of {source}")


def _covering(given: dict[int, float], elements: list[int], what: str) -> dict[int, float]:
    missing = [f"Z={z}" for z in elements if z not in given]
    if missing:
        raise DataError(f"{what} lack {', '.join(missing)}, which the training structures hold")
    return {z: given[z] for z in elements}


def _scale(
    dataset: GraphDataset, source: Literal["forces", "energy"] | float, shift: dict[int, float]
) -> float:
    if isinstance(source, int | float):
        if not (math.isfinite(source) and source > 0):
            raise DataError(f"scale must be positive, got {source}")
        return float(source)
    values = [
        _label(graph, "forces").flatten() if source == "forces" else _residual(graph, shift)
        for graph in dataset.sample()
    ]
    joined = torch.cat(values)
    joined = joined[torch.isfinite(joined)]
    if not len(joined):
        raise DataError(f"scale={source!r} needs {source} labels; none of the structures has them")
    rms = float(joined.square().mean().sqrt())
    # A set of one kind of perfect crystals has no spread; its network then works in eV.
    return rms if rms > 1e-8 else 1.0


def _residual(graph: object, shift: dict[int, float]) -> Tensor:
    numbers = graph.atomic_numbers.tolist()  # pyright: ignore[reportAttributeAccessIssue]
    return (_label(graph, "energy") - sum(shift[z] for z in numbers)) / len(numbers)


def _label(graph: object, key: str) -> Tensor:
    value = getattr(graph, key, None)
    return value if value is not None else torch.full((1,), float("nan"), dtype=torch.float64)
