"""Structures at the edge of what has an energy: each is answered rightly or refused clearly.

Rightly means as an ordinary structure that describes the same atoms is answered; clearly means by
an error made for the caller, not by an accident deep inside. ``check`` runs these laws in full.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from ase.data import atomic_numbers, covalent_radii

from atomeq.check.laws import (
    Evaluation,
    Law,
    Measured,
    Subject,
    describe,
    quiet,
    unknown_element,
)
from atomeq.graph.neighbors import complete_cell

_VACUUM = 60.0  # Å; beyond any cutoff in use
_SKEW = np.array([[1, 2, -1], [0, 1, 1], [0, 0, 1]])  # the same lattice by other vectors

#: What a calculator raises when nobody thought of the structure, as against a refusal.
_ACCIDENTS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError),
    *(np.linalg.LinAlgError, RecursionError),
)

#: A strange structure, and the ordinary one with the same energy, forces and stress.
Twins = tuple[Atoms, Atoms]


def answer(subject: Subject, atoms: Atoms) -> Evaluation | Measured:
    """Ask a new calculator for a structure; return its answer, or what its refusal is worth."""
    try:
        with quiet():
            return subject.evaluate(atoms, calculator=subject.factory())
    except Exception as error:  # a calculator may refuse by whatever it likes, if it is clear
        accident = isinstance(error, _ACCIDENTS) or not str(error)
        verdict = "stumbled" if accident else "refused"
        return Measured(0.0, f"{verdict}: {describe(error)}", broken=accident)


def compared(found: Evaluation | Measured, expected: Callable[[], Evaluation]) -> Measured:
    """Measure an answer against the right one, which is computed only if there is an answer."""
    if isinstance(found, Measured):
        return found
    return Measured(expected().distance(found), f"answered, E = {found.energy:.6g} eV")


def answered_as(make: Callable[[Subject], Twins], subject: Subject) -> Measured:
    """Compare a strange structure with its ordinary twin."""
    strange, ordinary = make(subject)
    return compared(answer(subject, strange), lambda: subject.evaluate(ordinary))


def refused(make: Callable[[Subject], Atoms], subject: Subject) -> Measured:
    """Ask for a clear refusal."""
    found = answer(subject, make(subject))
    if isinstance(found, Measured):
        return found
    return Measured(math.inf, f"accepted with energy {found.energy:.6g} eV")


def lone_atom(subject: Subject) -> Measured:
    """Compute one atom: no force, and the energy it has in a box."""
    symbol = subject.elements[0]
    boxed = Atoms(symbol, cell=3 * [_VACUUM], pbc=not subject.molecules_only)

    def expected() -> Evaluation:
        return Evaluation(subject.energy(boxed), np.zeros((1, 3)), None)

    return compared(answer(subject, Atoms(symbol, positions=[[0.3, 0.2, 0.1]])), expected)


def short_cell(subject: Subject) -> Measured:
    """Compute one atom in a skewed cell shorter than the cutoff; the answer is a crystal's share.

    There are no forces, and the stress is that of the crystal.
    """
    lattice = _primitive(subject)
    skewed = lattice.copy()
    skewed.set_cell(_SKEW @ lattice.cell.array)

    def expected() -> Evaluation:
        copies = 27
        whole = subject.evaluate(lattice.repeat(3))
        return Evaluation(whole.energy / copies, np.zeros((1, 3)), whole.stress)

    return compared(answer(subject, skewed), expected)


def distant_pieces(subject: Subject) -> Measured:
    """Put two clusters 100,000 Å apart: energies add, forces are those of each alone."""
    first, second = subject.cluster(), subject.cluster("second cluster")[:-3]
    both = first.copy()
    both += _moved(second, np.array([1e5, 0.0, 0.0]))

    def expected() -> Evaluation:
        one, other = subject.evaluate(first), subject.evaluate(second)
        forces = np.vstack([one.forces, other.forces])
        return Evaluation(one.energy + other.energy, forces, None)

    return compared(answer(subject, both), expected)


def coincident_atoms(subject: Subject) -> Measured:
    """Put an atom of a crystal on another: refuse it, or answer with more energy than apart."""
    crystal, symbol = subject.crystal(), subject.elements[0]
    crowded = crystal.copy()
    crowded += Atoms(symbol, positions=crystal.positions[:1])
    found = answer(subject, crowded)
    if isinstance(found, Measured):
        return found
    apart = subject.energy(crystal) + subject.energy(Atoms(symbol, positions=[[0.0, 0.0, 0.0]]))
    sensible = math.isfinite(found.energy) and found.energy > apart
    note = f"answered, E = {found.energy:.6g} eV, apart {apart:.6g} eV"
    return Measured(0.0 if sensible else math.inf, note)


def left_handed(subject: Subject) -> Twins:
    """Exchange two lattice vectors: the same crystal with a negative determinant."""
    atoms = subject.periodic()
    strange = atoms.copy()
    strange.set_cell(atoms.cell.array[[1, 0, 2]])
    return strange, atoms


def skewed(subject: Subject) -> Twins:
    """Describe a crystal by strongly skewed lattice vectors."""
    atoms = subject.periodic()
    strange = atoms.copy()
    strange.set_cell(_SKEW @ atoms.cell.array)
    return strange, atoms


def huge_cell(subject: Subject) -> Twins:
    """Put a cluster into a periodic cell of 10 µm."""
    atoms = subject.cluster()
    strange = atoms.copy()
    strange.set_cell(1e5 * np.eye(3))
    strange.pbc = True
    return strange, atoms


def far_outside(subject: Subject) -> Twins:
    """Move each atom by up to a thousand lattice vectors of its own."""
    atoms = subject.periodic()
    shifts = subject.random("far outside").integers(-1000, 1001, (len(atoms), 3))
    return _moved(atoms, shifts @ atoms.cell.array), atoms


def unwrapped(subject: Subject) -> Twins:
    """Leave one atom outside of the cell, as dynamics does."""
    atoms = subject.periodic()
    strange = atoms.copy()
    strange.positions[1] += atoms.cell.array[0] - 2 * atoms.cell.array[2]
    return strange, atoms


def slab_without_vacuum(subject: Subject) -> Twins:
    """Give a slab no third lattice vector at all."""
    return _opened(subject, (True, True, False), keep=False)


def slab_in_thin_cell(subject: Subject) -> Twins:
    """Leave the third vector of a slab where it was in the crystal, not periodic."""
    return _opened(subject, (True, True, False), keep=True)


def wire(subject: Subject) -> Twins:
    """Give a wire one lattice vector, and zeros."""
    return _opened(subject, (False, False, True), keep=False)


def mixed_periodicity(subject: Subject) -> Twins:
    """Make a crystal open along the second of its three skewed vectors."""
    return _opened(subject, (True, False, True), keep=True)


def cluster_with_cell(subject: Subject) -> Twins:
    """Give a cluster a cell smaller than itself that is not periodic."""
    atoms = subject.cluster()
    strange = atoms.copy()
    strange.set_cell(2 * np.eye(3))
    return strange, atoms


def cluster_with_flat_cell(subject: Subject) -> Twins:
    """Give a cluster a cell without volume that is not periodic."""
    atoms = subject.cluster()
    strange = atoms.copy()
    strange.set_cell([[5, 0, 0], [0, 5, 0], [5, 5, 0]])
    return strange, atoms


def single_precision(subject: Subject) -> Twins:
    """Store the positions as float32."""
    strange, ordinary = subject.crystal(), subject.crystal()
    strange.arrays["positions"] = strange.positions.astype(np.float32)
    ordinary.positions = strange.positions.astype(np.float64)
    return strange, ordinary


def fixed_atoms(subject: Subject) -> Twins:
    """Fix atoms: the calculator's own forces on them stay, ASE takes them away."""
    atoms = subject.crystal()
    strange = atoms.copy()
    strange.set_constraint(FixAtoms([0, 2]))
    return strange, atoms


def misshapen_arrays(subject: Subject) -> Atoms:
    """Return more positions than atomic numbers, as a slip with ``atoms.arrays`` leaves them."""
    atoms = subject.cluster()
    atoms.arrays["numbers"] = atoms.numbers[:-1]
    return atoms


def no_atoms(subject: Subject) -> Atoms:
    """Return a cell with nothing in it."""
    return Atoms(cell=[5, 5, 5], pbc=True)


def position_of(value: float, subject: Subject) -> Atoms:
    """Return a crystal with an impossible coordinate."""
    atoms = subject.crystal()
    atoms.positions[1, 2] = value
    return atoms


def cell_of_nan(subject: Subject) -> Atoms:
    """Return a crystal with an impossible lattice vector."""
    atoms = subject.periodic()
    atoms.cell.array[2, 2] = math.nan
    return atoms


def foreign_element(subject: Subject) -> Atoms:
    """Return a cluster with an element the calculator does not know."""
    atoms = subject.cluster()
    atoms.symbols[1] = unknown_element(subject)
    return atoms


def dummy_atom(subject: Subject) -> Atoms:
    """Return a cluster with an atom of number 0."""
    atoms = subject.cluster()
    atoms.symbols[1] = "X"
    return atoms


def zero_cell(subject: Subject) -> Atoms:
    """Return a cluster that is periodic without a cell."""
    atoms = subject.cluster()
    atoms.pbc = True
    return atoms


def flat_cell(subject: Subject) -> Atoms:
    """Return a crystal whose lattice vectors lie in one plane."""
    atoms = subject.periodic()
    atoms.cell.array[2] = atoms.cell.array[0] + atoms.cell.array[1]
    return atoms


def _opened(subject: Subject, pbc: tuple[bool, bool, bool], *, keep: bool) -> Twins:
    """Return a crystal periodic along some vectors, and the same in vacuum, periodic along all.

    Args:
        subject: Whose crystal it is.
        pbc: Which vectors stay periodic.
        keep: Keep the other vectors in the strange structure, where they mean nothing.
    """
    open_directions = ~np.array(pbc)
    strange = subject.periodic()
    strange.pbc = pbc
    cell = complete_cell(strange.cell.array, np.array(pbc))
    cell[open_directions] *= _VACUUM
    ordinary = Atoms(strange.numbers, strange.positions, cell=cell, pbc=True)
    if not keep:
        strange.cell.array[open_directions] = 0.0
    return strange, ordinary


def _primitive(subject: Subject) -> Atoms:
    """Return a primitive fcc cell of touching atoms."""
    symbol = subject.elements[0]
    contact = 2.2 * float(covalent_radii[atomic_numbers[symbol]])
    vectors = contact / math.sqrt(2) * np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]])
    return Atoms(symbol, cell=vectors, pbc=True)


def _moved(atoms: Atoms, displacement: np.ndarray) -> Atoms:
    moved = atoms.copy()
    moved.positions = atoms.positions + displacement
    return moved


def _laws() -> tuple[Law, ...]:
    measures: dict[str, Callable[[Subject], Measured]] = {
        "one atom": lone_atom,
        "short skewed cell": short_cell,
        "pieces 100,000 Å apart": distant_pieces,
        "atoms on one place": coincident_atoms,
        "left-handed cell": partial(answered_as, left_handed),
        "skewed cell": partial(answered_as, skewed),
        "huge cell": partial(answered_as, huge_cell),
        "atoms far outside": partial(answered_as, far_outside),
        "one atom unwrapped": partial(answered_as, unwrapped),
        "slab without a third vector": partial(answered_as, slab_without_vacuum),
        "slab with a short one": partial(answered_as, slab_in_thin_cell),
        "wire": partial(answered_as, wire),
        "mixed periodicity": partial(answered_as, mixed_periodicity),
        "cluster in a small cell": partial(answered_as, cluster_with_cell),
        "cluster in a flat cell": partial(answered_as, cluster_with_flat_cell),
        "float32 positions": partial(answered_as, single_precision),
        "fixed atoms": partial(answered_as, fixed_atoms),
        "arrays of wrong shape": partial(refused, misshapen_arrays),
        "no atoms": partial(refused, no_atoms),
        "NaN position": partial(refused, partial(position_of, math.nan)),
        "infinite position": partial(refused, partial(position_of, math.inf)),
        "NaN cell": partial(refused, cell_of_nan),
        "unknown element": partial(refused, foreign_element),
        "atom of number 0": partial(refused, dummy_atom),
        "periodic without a cell": partial(refused, zero_cell),
        "coplanar lattice vectors": partial(refused, flat_cell),
    }
    # Atoms 1e5 Å away lose the digits that leave about 1e-10 eV/Å.
    kin = {"pieces 100,000 Å apart": "separated fragments add", "one atom": "single atom"}
    return tuple(
        Law(name, measure, "eV, Å", 1e-8, 1e-4, depth="full", along_with=kin.get(name, ""))
        for name, measure in measures.items()
    )


#: In the order in which they are reported.
DEGENERATE_STRUCTURES: tuple[Law, ...] = _laws()
