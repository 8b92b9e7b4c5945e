"""What every property begins with: a crystal that is one, and results of many structures."""

from collections.abc import Callable, MutableSequence, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from atomeq.calculators.ase import AtomeqCalculator, has_volume

_CHUNK = 8  # structures between two reports of progress, and what a kill may cost of them
_RESULTS = ("energy", "free_energy", "forces", "stress")

#: Told of progress: the stage, structures done and their number.
Report = Callable[[str, int, int], None]


def untold(stage: str, done: int, total: int) -> None:
    """Tell nobody of progress."""


def refuse_no_crystal(atoms: Atoms, calculator: AtomeqCalculator, what: str) -> None:
    """Refuse structures whose cell or atoms cannot be moved, and potentials without a stress.

    Raises:
        ValueError: The structure has no volume or fixed atoms, or the potential no stress.
    """
    name = atoms.get_chemical_formula()
    if not has_volume(atoms):
        raise ValueError(
            f"{what} needs a crystal: {name} is not periodic in three directions (pbc "
            f"{atoms.pbc.tolist()}) or has no volume; give it a cell"
        )
    if "stress" not in calculator.implemented_properties:
        raise ValueError(
            f"{what} needs a stress, and this potential has a force head, whose forces are no "
            "derivative of an energy, and no stress head; take a conservative potential"
        )
    if atoms.constraints:
        raise ValueError(
            f"{what} moves every atom and the cell, but {name} has fixed atoms; free them"
        )


def computed(
    structures: Sequence[Atoms],
    calculator: AtomeqCalculator,
    properties: Sequence[str],
    *,
    stage: str,
    results: MutableSequence[dict[str, Any]] | None = None,
    report: Report = untold,
) -> list[Atoms]:
    """Compute structures in batches; return copies that hold their results.

    Args:
        structures: What to compute.
        calculator: Computes them.
        properties: Names of ASE properties.
        stage: Names the progress.
        results: Of the first structures, computed before; those of the others are appended.
        report: Told of progress.
    """
    found = [] if results is None else results
    report(stage, len(found), len(structures))
    for start in range(len(found), len(structures), _CHUNK):
        for result in calculator.evaluate(structures[start : start + _CHUNK], properties):
            found.append(result)
            report(stage, len(found), len(structures))
    return [with_values(atoms, result) for atoms, result in zip(structures, found, strict=True)]


def with_values(atoms: Atoms, results: dict[str, Any]) -> Atoms:
    """Return a copy of a structure that holds results."""
    frozen = atoms.copy()
    copies = {name: np.array(results[name]) for name in _RESULTS if name in results}
    values = {name: copy if copy.ndim else copy.item() for name, copy in copies.items()}
    frozen.calc = SinglePointCalculator(frozen, **values)
    return frozen
