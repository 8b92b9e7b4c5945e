"""Perfect supercells become their primitive cells: the same labels for a fraction of the cost."""

import warnings
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

_SAME = 1e-4  # Å and eV/Å, between atoms that are images of each other


def without_repetition(atoms: Atoms) -> Atoms:
    """Return the primitive cell of a structure that repeats one, forces included, or itself.

    Args:
        atoms: With its labels as a calculator's results: the energy becomes that of the primitive
            cell, the forces those of its atoms, and the stress stays.
    """
    if not atoms.pbc.all() or len(atoms) == 1:
        return atoms
    cell = _primitive_cell(atoms)
    if cell is None:
        return atoms
    n_cells = round(float(atoms.cell.volume / abs(np.linalg.det(cell))))
    groups = _images(atoms, cell)
    results = dict(atoms.calc.results) if atoms.calc is not None else {}
    forces = results.get("forces", np.zeros((len(atoms), 3)))
    alike = all(np.ptp(forces[group], axis=0).max() < _SAME for group in groups)
    if n_cells < 2 or {len(group) for group in groups} != {n_cells} or not alike:
        return atoms
    primitive = atoms[[group[0] for group in groups]]
    primitive.info = dict(atoms.info)
    primitive.set_cell(cell)
    if "energy" in results:
        results["energy"] /= n_cells
    if "forces" in results:
        results["forces"] = np.array([forces[group].mean(axis=0) for group in groups])
    primitive.calc = SinglePointCalculator(primitive, **results) if results else None
    return primitive


def _primitive_cell(atoms: Atoms) -> np.ndarray | None:
    """Return the lattice vectors in the orientation of the structure, Å."""
    import spglib

    cell: Any = (atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)
    with warnings.catch_warnings():
        # spglib announces that it will raise instead of returning None; both are taken here.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            found = spglib.standardize_cell(
                cell, to_primitive=True, no_idealize=True, symprec=_SAME
            )
        except spglib.error.SpglibError:
            return None
    return None if found is None else np.asarray(found[0])


def _images(atoms: Atoms, cell: np.ndarray) -> list[list[int]]:
    """Return the atoms that lattice vectors carry into each other."""
    groups: list[list[int]] = []
    for k, (number, position) in enumerate(zip(atoms.numbers, atoms.positions, strict=True)):
        for group in groups:
            apart = np.linalg.solve(cell.T, position - atoms.positions[group[0]])
            same = np.linalg.norm((apart - apart.round()) @ cell) < _SAME
            if same and number == atoms.numbers[group[0]]:
                group.append(k)
                break
        else:
            groups.append([k])
    return groups
