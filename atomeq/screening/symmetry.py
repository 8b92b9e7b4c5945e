"""Space groups and primitive cells, by spglib; None where it finds none."""

import warnings
from collections.abc import Callable
from typing import Any

import spglib
from ase import Atoms


def space_group(atoms: Atoms, symprec: float) -> tuple[str, int] | None:
    """Return symbol and number of the space group of a crystal.

    Args:
        atoms: Periodic in three directions.
        symprec: Å.
    """
    found = _ask(spglib.get_symmetry_dataset, atoms, symprec)
    return None if found is None else (str(found.international), int(found.number))


def primitive_cell(atoms: Atoms, symprec: float) -> Atoms | None:
    """Return the primitive cell of a crystal.

    Args:
        atoms: Periodic in three directions.
        symprec: Å.
    """
    found = _ask(spglib.find_primitive, atoms, symprec)
    if found is None:
        return None
    lattice, scaled, numbers = found
    return Atoms(numbers=numbers, scaled_positions=scaled, cell=lattice, pbc=True)


def _ask(function: Callable[..., Any], atoms: Atoms, symprec: float) -> Any:
    cell = (atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)
    with warnings.catch_warnings():
        # spglib announces that it will raise instead of returning None; both are taken here.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return function(cell, symprec=symprec)
        except spglib.error.SpglibError:
            return None
