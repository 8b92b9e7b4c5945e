"""References from training structures: the shift per element and the scale of the network."""

import copy
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from jsonargparse.typing import register_type
from torch import Tensor

from atomeq.data.ase_files import DataError, atomic_number, read_isolated_atoms
from atomeq.data.batching import GraphDataset
from atomeq.data.splits import DataFile
from atomeq.data.targets import ScalarTarget
from atomeq.graph.atom_graph import AtomGraph
from atomeq.graph.convert import element_symbols
from atomeq.models.base import AtomisticModel
from atomeq.models.charged import Charged
from atomeq.models.frame_averaged import OverFrames
from atomeq.potential.folders import installed_potentials, shipped_potentials, split_head
from atomeq.potential.potential import Potential
from atomeq.potential.predictor import Predictor
from atomeq.potential.references import AtomicReferences, least_squares_shift

logger = logging.getLogger(__name__)

#: Parts of networks that give forces or stress, and what makes a network without them.
_HEADS = ("forces", "stress")
_OFF: dict[str, Any] = {"direct_forces": False, "direct_stress": False, "stress_head": None}

if TYPE_CHECKING:
    PotentialSource: TypeAlias = str | os.PathLike[str]
else:

    class PotentialSource(str):
        """The name of a known potential, or a folder as :class:`DataFile` has it."""

    def _source_from_yaml(value: Any) -> PotentialSource:
        known = split_head(value)[0] in (*shipped_potentials(), *installed_potentials())
        by_name = known and not os.path.isdir(value)
        return PotentialSource(value if by_name else DataFile.from_yaml(value))

    register_type(PotentialSource, str, _source_from_yaml)

#: Structures that the shift of energies is fitted to, at least, and for each element.
_ENOUGH, _OF_EACH = 200, 5

_PLURAL = {"energy": "energies", "scalar": "labels of the target"}

#: Where the shift per element comes from.
Shift: TypeAlias = Literal["least_squares", "none", "atoms"] | DataFile | Mapping[str, float]


def fit_references(
    dataset: GraphDataset,
    *,
    shift: Shift = "least_squares",
    scale: Literal["forces", "energy"] | float = "forces",
    offset: float = 0.0,
) -> AtomicReferences:
    """Return references fitted to training structures alone.

    Args:
        dataset: The training structures with labels.
        shift: ``least_squares``, ``none``, a file of isolated atoms, or their eV by element symbol;
            to those of isolated atoms the mean per atom of what they leave is added.
        scale: ``forces``, ``energy``, or eV per unit of the network's output.
        offset: eV of every structure, taken as it is.

    Raises:
        DataError: Labels that the fit needs are missing, or an element has no isolated atom.
    """
    if shift == "atoms":
        raise DataError("references 'atoms' are those of a known target; name one, or a file")
    table = _shift(dataset, shift, dataset.elements)
    if shift not in ("least_squares", "none"):
        # What binds the atoms, on average: a network would have to learn this constant first.
        bound = torch.cat([_residual(graph, table) for graph in dataset.sample()])
        bound = bound[torch.isfinite(bound)]
        mean = float(bound.mean()) if len(bound) else 0.0
        logger.info("isolated atoms and a mean of %.4f eV/atom beside them", mean)
        table = {z: energy + mean for z, energy in table.items()}
    factor = _scale(dataset, scale, table)
    shown = ", ".join(f"Z={z}: {e:.4f}" for z, e in table.items())
    logger.info("references: %s eV; scale %.5g", shown, factor)
    return AtomicReferences(table, scale=factor, offset=offset)


def fit_scalar_references(
    dataset: GraphDataset,
    target: ScalarTarget,
    *,
    shift: Shift | None = None,
    scale: float | None = None,
    own_readout: bool = False,
) -> AtomicReferences:
    """Return references of a scalar target, fitted to training structures alone.

    Where atoms are summed over a shift per element the result is extensive and has no offset;
    otherwise the offset is the mean of what the shift leaves of the labels.

    Args:
        dataset: The training structures with labels.
        target: What is learned.
        shift: As for energies, or ``atoms``: what the data set publishes of them. By default least
            squares for a sum, none for a mean.
        scale: Of the network's output; by default the rms of what shift and offset leave, for a sum
            per atom.
        own_readout: Whether the network gives one number for each structure.

    Raises:
        DataError: Labels or references are missing, or do not fit the readout.
    """
    if shift is None:
        shift = "least_squares" if target.readout == "sum" else "none"
    if shift == "atoms":
        if not target.atoms:
            raise DataError(f"there are no values of isolated atoms for {target.name}")
        shift = target.atoms
    if shift != "none" and target.readout == "mean":
        raise DataError(f"{target.name} is a mean over atoms: set references to 'none'")
    table = _shift(dataset, shift, dataset.elements, label="scalar")
    graphs = list(dataset.sample())
    residual = torch.cat([_residual(graph, table, "scalar") for graph in graphs])
    n_atoms = torch.tensor([graph.n_atoms for graph in graphs])
    known = torch.isfinite(residual)
    if not bool(known.any()):
        raise DataError(f"no training structure has a label for {target.name}")
    residual, n_atoms = residual[known] * n_atoms[known], n_atoms[known]
    extensive = target.readout == "sum" and not own_readout
    offset = 0.0 if extensive and shift != "none" else float(residual.mean())
    left = (residual - offset) / (n_atoms if extensive else 1)
    if scale is None:
        scale = _spread(left)
    logger.info("%s: offset %.5g, scale %.5g %s", target.name, offset, scale, target.unit)
    return AtomicReferences(table, scale=scale, offset=offset)


def conservative_form(model: AtomisticModel) -> dict[str, Any]:
    """Return the node of what a model with heads becomes when forces are derived from its energy.

    Args:
        model: With a head for forces, or for the stress.

    Raises:
        ValueError: It has no such head.
    """
    if not model.outputs & {"forces", "stress"}:
        raise ValueError(
            f"the {type(model).__name__} has no head for forces or stress: it is conservative "
            "already, so leave model.conservative out"
        )
    node = model.config()
    arguments = {name: _OFF.get(name, value) for name, value in node["init_args"].items()}
    return {**node, "init_args": arguments}


def take_weights(potential: Predictor, other: Predictor) -> None:
    """Give a potential what another with the same model has learned, and its references and terms.

    Either may have heads for forces or stress that the other has not: those of the potential are
    new, those of the other stay behind, and both are told.

    Args:
        potential: Changed in place.
        other: Where to start from.

    Raises:
        DataError: It has another model.
    """
    model = potential.model
    for around in (Charged, OverFrames):  # vectors of charges are zero, frames yet to be learned
        if isinstance(model, around) and not isinstance(other.model, around):
            model = model.model
    own, given = model.state_dict(), other.model.state_dict()
    heads = {name for name in own.keys() ^ given.keys() if name.split(".")[0] in _HEADS}
    carried = {name: weight for name, weight in given.items() if name not in heads}
    new = {name: own[name] for name in own.keys() & heads}
    try:
        model.load_state_dict({**carried, **new})
    except RuntimeError as error:
        raise DataError(
            f"{other.name} is a {type(other.model).__name__} whose weights do not fit the "
            f"{type(potential.model).__name__} of this configuration: {error}"
        ) from error
    if heads:
        left = {name: given[name] for name in given.keys() & heads}
        logger.info(
            "of %s: %s are carried; left behind: %s; new: %s",
            other.name,
            *map(_told, (carried, left, new)),
        )
    potential.references = other.references.train()
    if isinstance(potential, Potential) and isinstance(other, Potential):
        potential.terms, potential.distances = other.terms, other.distances
        if potential.conservative and not other.conservative:
            # Heads had scales of their own; derivatives have that of the energy.
            table = {z: float(other.references.shift[z]) for z in other.references.elements}
            scale, offset = other.references.scale, float(other.references.offset)
            potential.references = AtomicReferences(table, scale=scale, offset=offset)


def _told(weights: Mapping[str, Tensor]) -> str:
    parts = sorted({name.split(".")[0] for name in weights})
    count = sum(weight.numel() for weight in weights.values())
    return f"{count:,} weights ({', '.join(parts)})" if weights else "nothing"


def fit_shift(potential: Potential, dataset: GraphDataset) -> AtomicReferences:
    """Return references that meet the zeros of other energies: those of other data of a potential.

    Another code, pseudopotential or correction moves the energy of each element; the network would
    spend its training on these constants. What it misses of the labels is fitted to them.

    Args:
        potential: Whose references they are; its network is asked, and stays.
        dataset: The training structures.

    Raises:
        DataError: No structure has an energy.
    """
    references = potential.references
    graphs = [g for g in _some(dataset) if bool(torch.isfinite(_label(g, "energy")).all())]
    if not graphs:
        raise DataError(
            "the shift of energies needs energies, and none of the structures has one; set "
            "references to 'none' to leave it out"
        )
    shift = shift_of_missed(potential, graphs)
    symbols = element_symbols(torch.tensor(list(shift)))
    shown = ", ".join(
        f"{symbol} {e:+.4f}" for symbol, e in zip(symbols, shift.values(), strict=True)
    )
    logger.info("energies of elements moved to those of the data (eV): %s", shown)
    before = references.shift.detach()
    compared = ", ".join(
        f"{symbol} {float(before[z]):.4f} to {float(before[z]) + shift[z]:.4f}"
        for symbol, z in zip(symbols, shift, strict=True)
    )
    logger.info("references before and after (eV): %s", compared)
    moved = copy.deepcopy(references)
    with torch.no_grad():
        moved.shift[list(shift)] += moved.shift.new_tensor(list(shift.values()))
    return moved


@torch.no_grad()
def shift_of_missed(potential: Potential, graphs: Sequence[AtomGraph]) -> dict[int, float]:
    """Return what a potential misses of the energies by element, eV, whatever a few of them say."""
    missed = [
        float(graph.energy) - float(potential(graph.to(potential.device), ("energy",))["energy"])
        for graph in graphs
    ]
    return least_squares_shift([graph.atomic_numbers for graph in graphs], missed, robust=True)


def stride(graphs: Sequence[AtomGraph], at_least: int) -> int:
    """Return the step that takes so many of them, and of each element some, where there are."""
    elements = {z for graph in graphs for z in graph.atomic_numbers.tolist()}
    return -(-len(graphs) // max(at_least, _OF_EACH * len(elements)))


def _some(dataset: GraphDataset) -> list[AtomGraph]:
    """Return structures from everywhere in a set, and with each of its elements."""
    graphs = dataset.sample()
    chosen = dict.fromkeys(range(0, len(graphs), stride(graphs, _ENOUGH)))
    seen = {z for k in chosen for z in graphs[k].atomic_numbers.tolist()}
    for k, graph in enumerate(graphs):
        if further := set(graph.atomic_numbers.tolist()) - seen:
            seen |= further
            chosen[k] = None
    return [graphs[k] for k in chosen]


def _shift(
    dataset: GraphDataset, source: Shift, elements: list[int], label: str = "energy"
) -> dict[int, float]:
    if isinstance(source, Mapping):
        given = {atomic_number(symbol): float(energy) for symbol, energy in source.items()}
        return _covering(given, elements, "the references given by element")
    if source == "none":
        return dict.fromkeys(elements, 0.0)
    if source == "least_squares":
        labelled = [g for g in dataset.sample() if bool(torch.isfinite(_label(g, label)).all())]
        if not labelled:
            raise DataError(
                f"references by least squares need {_PLURAL[label]}; none of the structures has"
            )
        fitted = least_squares_shift(
            [graph.atomic_numbers for graph in labelled], [float(g[label]) for g in labelled]
        )
        return _covering(fitted, elements, "the labels that the references are fitted to")
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
    return _spread(joined)


def _spread(values: Tensor) -> float:
    rms = float(values.square().mean().sqrt())
    # A set of one kind of perfect crystals has no spread; its network then works in the unit.
    return rms if rms > 1e-8 else 1.0


def _residual(graph: object, shift: dict[int, float], label: str = "energy") -> Tensor:
    numbers = graph.atomic_numbers.tolist()  # pyright: ignore[reportAttributeAccessIssue]
    return (_label(graph, label) - sum(shift[z] for z in numbers)) / len(numbers)


def _label(graph: object, key: str) -> Tensor:
    value = getattr(graph, key, None)
    return value if value is not None else torch.full((1,), float("nan"), dtype=torch.float64)
