"""Small structures without symmetry, on which tests of every folder hold their laws."""

import numpy as np
from ase import Atoms
from ase.build import bulk, fcc111, molecule


def rattled_molecule() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=1)
    return atoms


def rattled_crystal() -> Atoms:
    """A sheared rocksalt cell, smaller than the cutoff: atoms see images of themselves."""
    atoms = bulk("MgO", "rocksalt", a=4.2, cubic=True)
    shear = np.eye(3) + np.array([[0.02, 0.03, 0.0], [0.0, -0.01, 0.04], [0.01, 0.0, 0.03]])
    atoms.set_cell(atoms.cell.array @ shear, scale_atoms=True)
    atoms.rattle(0.08, seed=2)
    return atoms


def rattled_slab() -> Atoms:
    atoms = fcc111("Cu", (2, 2, 2), vacuum=6.0, periodic=True)
    atoms.rattle(0.05, seed=3)
    return atoms


RATTLED = {
    "molecule": rattled_molecule,
    "crystal": rattled_crystal,
    "slab": rattled_slab,
}
