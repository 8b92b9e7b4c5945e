"""Structures that break neighbour searches, and cutoffs that no length of theirs is equal to."""

import numpy as np
from ase import Atoms
from ase.build import bulk, fcc111, molecule

# Generic: a cutoff equal to a lattice length would put pairs on the border, where rounding rules.
CUTOFFS = (2.37, 4.91)


def rattled(atoms, seed=0):
    atoms = atoms.copy()
    atoms.positions += np.random.default_rng(seed).normal(0, 0.08, atoms.positions.shape)
    return atoms


def random_atoms(n_atoms, cell, pbc, seed=0):
    scaled = np.random.default_rng(seed).random((n_atoms, 3))
    return Atoms(f"H{n_atoms}", cell=cell, pbc=pbc, scaled_positions=scaled)


def far_outside():
    atoms = rattled(bulk("Cu", cubic=True) * (2, 2, 2))
    shifts = np.random.default_rng(5).integers(-7, 8, (len(atoms), 3))
    atoms.positions += shifts @ atoms.cell.array
    return atoms


def one_unwrapped():
    atoms = rattled(bulk("NaCl", "rocksalt", a=5.64))
    atoms.positions[1] += 3 * atoms.cell.array[2] - atoms.cell.array[0]
    return atoms


def slab_without_c():
    atoms = fcc111("Pt", (2, 2, 3), vacuum=None)
    atoms.cell[2] = 0
    atoms.pbc = (True, True, False)
    return rattled(atoms)


def overlapping():
    atoms = bulk("Cu", cubic=True)
    atoms.positions[1] = atoms.positions[0]
    return atoms


def left_handed():
    atoms = random_atoms(9, [[4.1, 0.3, 0.2], [0.1, 0.4, 5.3], [0.5, 3.9, 0.1]], True, seed=3)
    assert np.linalg.det(atoms.cell.array) < 0
    return atoms


TINY_SKEWED = [[1.9, 0, 0], [1.5, 0.8, 0], [-1.1, 0.5, 1.7]]
STRUCTURES = {
    "cubic": lambda: rattled(bulk("Cu", cubic=True) * (2, 2, 2)),
    "one-atom primitive": lambda: bulk("Cu"),
    "triclinic": lambda: random_atoms(7, [[5.1, 0, 0], [1.7, 4.3, 0], [-0.9, 1.1, 3.9]], True),
    "tiny skewed": lambda: random_atoms(2, TINY_SKEWED, True),
    "left-handed": left_handed,
    "slab TTF": lambda: rattled(fcc111("Pt", (2, 2, 3), vacuum=6.0, periodic=False)),
    "slab with zero c": slab_without_c,
    "wire FFT": lambda: random_atoms(6, [[9, 0, 0], [0, 9, 0], [0.3, 0.2, 2.2]], (0, 0, 1)),
    "molecule without cell": lambda: molecule("C6H6"),
    "far outside the cell": far_outside,
    "one atom unwrapped": one_unwrapped,
    "huge cell": lambda: Atoms(
        "H4", [[0, 0, 0], [1.1, 0, 0], [499, 0, 0], [250, 250, 250]], cell=[500] * 3, pbc=True
    ),
    "single atom": lambda: Atoms("H", [[0.3, 0.1, 9.0]]),
    "overlapping": overlapping,
    "FFF in a cell": lambda: random_atoms(12, [6.0, 7.0, 8.0], False),
    "empty": lambda: Atoms(cell=[4.0] * 3, pbc=True),
    "mixed TFT skewed": lambda: random_atoms(
        8, [[3.1, 0.4, 0], [1.2, 6.3, 0.2], [0.7, 0.5, 3.3]], (1, 0, 1)
    ),
}
