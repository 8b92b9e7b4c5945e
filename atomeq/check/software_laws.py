"""Laws of good behaviour: copies, changes in place, and the refusal of bad structures."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
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


def pickling(subject: Subject) -> Measured:
    """Pickle a used calculator and compute with what comes back."""
    return _copied(subject, lambda calculator: pickle.loads(pickle.dumps(calculator)))


def deep_copy(subject: Subject) -> Measured:
    """Copy a used calculator deeply and compute with the copy."""
    return _copied(subject, copy.deepcopy)


def spawned_workers(subject: Subject) -> Measured:
    """Send one calculator to two processes that start afresh, as data loaders and screening do."""
    structures = [[subject.crystal(f"worker {k}"), subject.cluster(f"worker {k}")] for k in (0, 1)]
    original = subject.factory()
    expected = [subject.evaluate(a, calculator=original) for work in structures for a in work]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(_evaluate, [original, original], structures))
    pairs = zip(expected, found[0] + found[1], strict=True)
    worst = max(reference.distance(evaluation) for reference, evaluation in pairs)
    return Measured(worst, "two processes")


def changes_in_place(subject: Subject) -> Measured:
    """Change positions, cell, elements and periodicity of a structure under its calculator."""
    atoms = subject.crystal()
    atoms.calc = subject.factory()
    worst = 0.0
    for change in _changes(atoms):
        found = Subject.energy_of(atoms), atoms.get_forces()
        fresh = subject.evaluate(atoms, calculator=subject.factory())
        worst = max(
            worst,
            fresh._replace(stress=None).distance(
                fresh._replace(energy=found[0], forces=found[1], stress=None)
            ),
        )
        change()
    return Measured(worst, "positions, cell, elements, periodicity")


def structure_untouched(subject: Subject) -> Measured:
    """Compare everything a structure holds with what it held before."""
    atoms = subject.crystal()
    atoms.info["note"] = "mine"
    atoms.set_array("label", np.arange(len(atoms)))
    before = atoms.copy()
    atoms.calc = subject.calculator
    atoms.get_forces()
    touched = [
        name
        for name in before.arrays
        if name not in atoms.arrays or not np.array_equal(before.arrays[name], atoms.arrays[name])
    ]
    touched += sorted(set(atoms.arrays) - set(before.arrays))
    touched += ["info"] * (atoms.info != before.info)
    touched += ["cell"] * (not np.array_equal(atoms.cell.array, before.cell.array))
    return Measured(len(touched), ", ".join(touched))


def free_energy_published(subject: Subject) -> Measured:
    """Ask for the energy consistent with the forces, as ASE's optimizers and checks do."""
    atoms = subject.crystal()
    atoms.calc = subject.factory()
    energy = float(atoms.get_potential_energy())
    try:
        consistent = float(atoms.get_potential_energy(force_consistent=True))
    except Exception as error:
        return Measured(math.inf, f"no free_energy: {describe(error)}", broken=True)
    return Measured(abs(energy - consistent) / len(atoms), "difference from the energy, per atom")


def nan_refused(subject: Subject) -> Measured:
    """Give NaN positions and cells, at once and after a good calculation, as dynamics does."""
    return _non_finite(subject, math.nan)


def inf_refused(subject: Subject) -> Measured:
    """Give infinite positions and cells, at once and after a good calculation."""
    return _non_finite(subject, math.inf)


def empty_refused(subject: Subject) -> Measured:
    """Give structures without atoms."""
    return _refusals(
        subject, [("no atoms", Atoms()), ("empty cell", Atoms(cell=[5, 5, 5], pbc=True))]
    )


def unknown_element_refused(subject: Subject) -> Measured:
    """Give an element the calculator does not know."""
    symbol = unknown_element(subject)
    atoms = subject.crystal()
    atoms.symbols[0] = symbol
    return _refusals(subject, [(f"one atom of {symbol}", atoms)])


def flat_cell_refused(subject: Subject) -> Measured:
    """Give a structure that is periodic along directions without lattice vectors."""
    flat = subject.periodic()
    flat.set_cell(np.zeros((3, 3)))
    dependent = subject.periodic()
    cell = dependent.cell.array.copy()
    cell[2] = cell[0] + cell[1]
    dependent.set_cell(cell)
    return _refusals(subject, [("zero cell", flat), ("coplanar lattice vectors", dependent)])


def overlapping_atoms(subject: Subject) -> Measured:
    """Put two atoms on one place: refuse it, or give a finite energy above that of the bond."""
    symbol = subject.elements[0]
    bond = 2.0 * float(covalent_radii[atomic_numbers[symbol]])
    atoms = Atoms(
        [symbol, symbol], positions=[[0.0, 0.0, 0.0], [bond / 3, 2 * bond / 3, 2 * bond / 3]]
    )
    bonded = subject.energy(atoms)
    atoms.positions[1] = atoms.positions[0]
    try:
        with quiet():
            energy = subject.energy(atoms, calculator=subject.factory())
    except Exception as error:
        return Measured(0.0, f"refused: {describe(error)}")
    accepted = math.isfinite(energy) and energy > bonded
    return Measured(float(not accepted), f"energy {energy:.6g} eV, bonded {bonded:.6g} eV")


def _evaluate(calculator: Calculator, structures: list[Atoms]) -> list[Evaluation]:
    """Evaluate structures in another process, with a calculator that came by pickle."""
    subject = Subject(lambda: calculator, [])
    return [subject.evaluate(atoms) for atoms in structures]


def _copied(subject: Subject, copied: Callable[[Calculator], Calculator]) -> Measured:
    atoms, later = subject.crystal(), subject.crystal("after copying")
    original = subject.factory()
    before = subject.evaluate(atoms, calculator=original)
    twin = copied(original)
    worst = before.distance(subject.evaluate(atoms, calculator=twin))
    reference = subject.evaluate(later, calculator=original)
    worst = max(worst, reference.distance(subject.evaluate(later, calculator=twin)))
    return Measured(worst)


def _changes(atoms: Atoms) -> Iterator[Callable[[], object]]:
    """Yield changes to make one after the other, each through another door of ASE."""

    def move() -> None:
        atoms.positions[0, 1] += 0.07

    def stretch() -> None:
        atoms.set_cell(1.02 * atoms.cell.array, scale_atoms=True)

    def stretch_cell_alone() -> None:
        atoms.cell.array[2, 2] *= 1.1

    def swap() -> None:
        different = np.flatnonzero(atoms.numbers != atoms.numbers[0])
        if len(different):
            atoms.numbers[[0, different[0]]] = atoms.numbers[[different[0], 0]]

    def open_up() -> None:
        atoms.pbc[2] = False

    def move_nothing() -> None:
        atoms.positions[:] = atoms.positions

    if atoms.pbc.all():
        yield from (move, stretch, stretch_cell_alone, swap, open_up, move_nothing)
    else:
        yield from (move, swap, move_nothing)


def _non_finite(subject: Subject, value: float) -> Measured:
    position = subject.crystal()
    position.positions[3, 1] = value
    free = subject.cluster()
    free.positions[2, 0] = value
    cell = subject.crystal()
    cell.cell.array[1, 1] = value
    figure, note, _ = _refusals(
        subject, [("position", position), ("free cluster", free), ("cell", cell)]
    )
    # Neighbour lists with a skin may not notice: NaN has not moved further than the skin.
    later = subject.crystal()
    later.calc = subject.factory()
    later.get_forces()
    later.positions[3, 1] = value
    accepted = _acceptance(lambda: (Subject.energy_of(later), later.get_forces()))
    if accepted is None:
        return Measured(figure, note)
    late = f"accepted after a good calculation: {accepted}"
    return Measured(figure + 1, f"{note}; {late}" if figure else late)


def _refusals(subject: Subject, structures: list[tuple[str, Atoms]]) -> Measured:
    """Count the structures that a fresh calculator accepts."""
    notes = []
    for name, atoms in structures:
        calculator = subject.factory()
        accepted = _acceptance(lambda a=atoms, c=calculator: (subject.energy(a, calculator=c),))
        if accepted is not None:
            notes.append(f"accepted {name}: {accepted}")
    return Measured(len(notes), "; ".join(notes) if notes else "all refused")


def _acceptance(compute: Callable[[], tuple]) -> str | None:
    """Return what came back for a bad structure, None if it was refused."""
    try:
        with quiet():
            energy = compute()[0]
    except Exception:
        return None
    return f"energy {energy:.6g} eV"


SOFTWARE_LAWS = (
    Law("pickling", pickling, "eV, Å", 1e-10, 1e-4),
    Law("spawned workers", spawned_workers, "eV, Å", 1e-10, 1e-4, depth="full"),
    Law("deepcopy", deep_copy, "eV, Å", 1e-10, 1e-4),
    Law("changes in place", changes_in_place, "eV, Å", 1e-10, 1e-4),
    Law("structure left untouched", structure_untouched, "fields", 0, 0),
    Law("free_energy published", free_energy_published, "eV", 1e-10, 1e-5),
    Law("NaN refused", nan_refused, "accepted", 0, 0),
    Law("inf refused", inf_refused, "accepted", 0, 0),
    Law("empty structure refused", empty_refused, "accepted", 0, 0),
    Law("unknown element refused", unknown_element_refused, "accepted", 0, 0),
    Law("pbc without a cell refused", flat_cell_refused, "accepted", 0, 0),
    Law("overlapping atoms", overlapping_atoms, "accepted", 0, 0),
)
