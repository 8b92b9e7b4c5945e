"""Laws of nature any interatomic potential must keep, measured on an ASE calculator."""

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from ase import Atoms, units
from ase.data import covalent_radii
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet

from atomeq.check.laws import (
    Evaluation,
    Law,
    Measured,
    NotApplicable,
    Subject,
    cubic_cell,
    largest,
    random_rotation,
)

#: Central difference of fourth order: error h⁴ f⁽⁵⁾/30, far below what rounding leaves.
_STENCIL = ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12))
_DISPLACEMENT = 5e-4  # Å
_STRAIN = 2e-4
_SINGLE_PRECISION_STEP = 20  # times larger: float32 noise of the energy would drown the difference
#: Published potentials whose switch has a jump in its second derivative are smooth enough, but for
#: differences across it; what is no derivative differs at the smaller step too.
_FINER = 1 / 8

_PUSH = 1e-4  # Å; the energy of springs of 30 eV/Å² would change by 1e-7 eV

_FAR_APART = 60.0  # Å; beyond any cutoff in use
_SCAN_STEP = 0.02  # Å
_SOFT = 0.01  # eV/Å; below this force the misfit counts as it is, above relative to the force
_HARD = 20.0  # eV; a dimer squeezed further says nothing about the cutoff

_PICOSECONDS = 5.0  # of dynamics
_SECONDS = 60.0  # of the CPU that dynamics may cost where nobody says how long it is to be
_FEWEST_STEPS = 250


def force_error(subject: Subject) -> Measured:
    """Compare forces with finite differences of the energy, per component and collectively."""
    step = _DISPLACEMENT * (_SINGLE_PRECISION_STEP if subject.single_precision else 1)
    random = subject.random("force directions")
    errors = [0.0]
    for atoms in subject.samples():
        forces = subject.evaluate(atoms).forces
        directions = _directions(len(atoms), random)
        work = np.array([np.sum(forces * direction) for direction in directions])
        move = partial(_moved, atoms)
        errors.append(_misfit(subject, move, directions, -work, step))
    return Measured(float(np.max(errors)), f"central differences, h = {step:g} Å")


def stress_error(subject: Subject) -> Measured:
    """Compare all nine components of the stress with finite differences of the energy."""
    _require_stress(subject)
    step = _STRAIN * (_SINGLE_PRECISION_STEP if subject.single_precision else 1)
    atoms = subject.crystal()
    stress = subject.evaluate(atoms).stress
    if stress is None:
        raise NotApplicable("no stress for a periodic crystal")
    components = list(itertools.combinations_with_replacement(range(3), 2))
    strains = [np.eye(3)[[a]].T * np.eye(3)[[b]] for a, b in components]
    strains = [(strain + strain.T) / 2 for strain in strains]
    virials = np.array([np.sum(stress * strain) for strain in strains]) * atoms.get_volume()
    misfit = _misfit(subject, partial(_strained, atoms), strains, virials, step)
    antisymmetric = largest(stress - stress.T)
    return Measured(max(misfit / atoms.get_volume(), antisymmetric), f"strain ±{step:g}")


def stress_asymmetry(subject: Subject) -> Measured:
    """Measure the antisymmetric part of the virial of a cluster, its net torque, and the form."""
    cluster = subject.cluster()
    virial = cluster.positions.T @ subject.evaluate(cluster).forces  # (3, 3), eV
    figure = largest(virial - virial.T) / len(cluster)
    if not subject.has_stress:
        return Measured(figure, "net torque per atom of a cluster; no stress")
    crystal = subject.crystal()
    crystal.calc = subject.calculator
    raw = np.asarray(subject.calculator.get_property("stress", crystal))
    if raw.shape not in ((6,), (3, 3)):
        return Measured(figure, f"stress has shape {raw.shape}", broken=True)
    if raw.shape == (3, 3):
        figure = max(figure, largest(raw - raw.T))
    return Measured(figure, "net torque per atom of a cluster; stress has its 6 numbers")


def rotation(subject: Subject) -> Measured:
    """Rotate structure and cell: energy stays, forces and stress rotate along."""
    random = subject.random("rotation")
    return _orthogonal(subject, [random_rotation(random) for _ in range(3)])


def reflection(subject: Subject) -> Measured:
    """Invert and mirror the structure."""
    random = subject.random("reflection")
    mirror = np.diag([1.0, 1.0, -1.0]) @ random_rotation(random)
    return _orthogonal(subject, [-np.eye(3), mirror])


def translation(subject: Subject) -> Measured:
    """Move everything by one vector."""
    random = subject.random("translation")
    worst = 0.0
    for atoms in subject.samples():
        moved = [_moved(atoms, random.uniform(-20, 20, 3)) for _ in range(2)]
        reference, *found = subject.evaluate_all([atoms, *moved])
        worst = max(worst, *(reference.distance(each) for each in found))
    return Measured(worst)


def permutation(subject: Subject) -> Measured:
    """Change the order of the atoms."""
    random = subject.random("permutation")
    worst = 0.0
    for atoms in subject.samples():
        order = random.permutation(len(atoms))
        reference = subject.evaluate(atoms)
        expected = reference._replace(forces=reference.forces[order])
        worst = max(worst, expected.distance(subject.evaluate(atoms[order])))
    return Measured(worst)


def wrapping(subject: Subject) -> Measured:
    """Move atoms by lattice vectors, far outside of the cell."""
    random = subject.random("wrapping")
    atoms = subject.periodic()
    moved = _moved(atoms, random.integers(-3, 4, (len(atoms), 3)) @ atoms.cell.array)
    return Measured(subject.evaluate(atoms).distance(subject.evaluate(moved)))


def supercell(subject: Subject) -> Measured:
    """Repeat the cell: energy per atom and stress stay, forces repeat."""
    atoms = subject.periodic()
    reference = subject.evaluate(atoms)
    worst = 0.0
    for repeats in ((2, 1, 1), (1, 1, 3)):
        copies = int(np.prod(repeats))
        expected = Evaluation(
            copies * reference.energy, np.tile(reference.forces, (copies, 1)), reference.stress
        )
        worst = max(worst, expected.distance(subject.evaluate(atoms.repeat(repeats))))
    return Measured(worst)


def skewed_cell(subject: Subject) -> Measured:
    """Describe the same crystal by other lattice vectors, strongly skewed."""
    atoms = subject.periodic()
    reference = subject.evaluate(atoms)
    worst = 0.0
    for change in ([[1, 1, 0], [0, 1, 0], [0, 0, 1]], [[1, 2, -1], [0, 1, 1], [0, 0, 1]]):
        skewed = atoms.copy()
        skewed.set_cell(np.array(change) @ atoms.cell.array, scale_atoms=False)
        worst = max(worst, reference.distance(subject.evaluate(skewed)))
    return Measured(worst, "unimodular changes of the lattice vectors")


def fragments(subject: Subject) -> Measured:
    """Put two clusters far apart: energies add, forces are those of each alone."""
    first, second = subject.cluster(), subject.cluster("second cluster")[:-3]
    second = _moved(second, np.array([_FAR_APART, 0.3 * _FAR_APART, 0.0]))
    one, other = subject.evaluate(first), subject.evaluate(second)
    expected = Evaluation(one.energy + other.energy, np.vstack([one.forces, other.forces]), None)
    return Measured(expected.distance(subject.evaluate(first + second)), f"{_FAR_APART:g} Å apart")


def cutoff_force_jump(subject: Subject) -> Measured:
    """Pull a dimer apart, find where energy and forces fit worst, and zoom in on the step there.

    Simpson's rule over the force equals the energy difference to h⁵ where the potential is smooth.
    """
    dimer = _dimer(subject)
    start = 1.6 * float(covalent_radii[dimer.numbers].sum()) / 2
    distances = np.arange(start, subject.reach, _SCAN_STEP / 2)
    distances = distances[: 2 * ((len(distances) - 1) // 2) + 1]
    energies, forces = _pull(subject, dimer, distances).T
    work = _SCAN_STEP / 6 * (forces[:-2:2] + 4 * forces[1:-1:2] + forces[2::2])
    mismatch = np.abs(energies[2::2] - energies[:-2:2] + work) / (_SOFT + np.abs(forces[2::2]))
    mismatch[np.abs(energies[2::2] - energies[-1]) > _HARD] = 0.0
    worst = int(np.argmax(mismatch))
    low, high = float(distances[2 * worst]), float(distances[2 * worst + 2])
    jump_in_force, jump_in_energy = _zoom(subject, dimer, low, high)
    note = f"largest at {low:.3f} Å; energy steps by {jump_in_energy:.1e} eV there"
    noise = 1e-4 if subject.single_precision else 1e-7
    return Measured(jump_in_force, note, broken=not jump_in_energy <= noise)


def single_atom(subject: Subject) -> Measured:
    """Compute one atom alone and one alone in a large periodic cell: no force, same energy."""
    alone = Atoms(subject.elements[0], positions=[[0.3, 0.2, 0.1]])
    boxed = Atoms(alone, cell=[30.0, 31.0, 32.0], pbc=True)
    free = subject.evaluate(alone)
    periodic = free if subject.molecules_only else subject.evaluate(boxed)
    figure = max(largest(free.forces), largest(periodic.forces), abs(free.energy - periodic.energy))
    return Measured(figure, f"E = {free.energy:.6f} eV")


def energy_drift(subject: Subject) -> Measured:
    """Integrate Newton's equations and fit a line to the total energy per atom.

    The structure starts with twice the kinetic energy of the temperature, half of which goes into
    the potential energy of the vibrations.
    """
    atoms, n_steps = _affordable(subject)
    atoms.calc = subject.factory()
    random = subject.random("velocities")
    thermalize_momenta(atoms, 2 * subject.temperature, exact_temperature=True, rng=random)
    Stationary(atoms)
    dynamics = VelocityVerlet(atoms, timestep=subject.timestep * units.fs)
    times, energies, temperatures = [], [], []
    for _ in dynamics.irun(n_steps):
        subject.on_step(dynamics.nsteps, n_steps)
        times.append(dynamics.get_time() / (1000 * units.fs))
        energies.append(Subject.energy_of(atoms) + atoms.get_kinetic_energy())
        temperatures.append(atoms.get_temperature())
    per_atom = 1000 * (np.array(energies) - energies[0]) / len(atoms)  # meV
    slope = np.polyfit(times, per_atom, 1)[0]
    note = (
        f"{len(atoms)} atoms, {times[-1]:g} ps in steps of {subject.timestep:g} fs, mean "
        f"{np.mean(temperatures):.0f} K, spread {np.std(per_atom):.1e} meV/atom"
    )
    return Measured(abs(float(slope)), note)


def _affordable(subject: Subject) -> tuple[Atoms, int]:
    """Return the start of the dynamics and its number of steps.

    What nobody asked for in numbers is cut down where the calculator is slow: first the structure,
    to 16 to 32 atoms, then the steps.
    """
    atoms = subject.hundred_atoms()
    if subject.dynamics_steps is not None:
        return atoms, subject.dynamics_steps
    n_steps = round(1000 * _PICOSECONDS / subject.timestep)
    fewer = None
    if subject.dynamics_structure is None and not subject.molecules_only:
        fewer = cubic_cell(subject.elements[0])
        fewer = fewer.repeat((2, 2, 2) if len(fewer) <= 4 else (2, 1, 1))
    affordable = _SECONDS / _seconds_of(subject, atoms)
    if affordable < n_steps and fewer is not None:
        atoms, affordable = fewer, _SECONDS / _seconds_of(subject, fewer)
    return atoms, max(min(n_steps, _FEWEST_STEPS), min(n_steps, int(affordable)))


def _seconds_of(subject: Subject, atoms: Atoms) -> float:
    """Return what an evaluation costs, once everything is warm, in seconds of the CPU."""
    subject.evaluate(atoms)
    start = time.process_time()
    subject.evaluate(_moved(atoms, np.full(3, 0.1)))
    return max(time.process_time() - start, 1e-6)


def _orthogonal(subject: Subject, matrices: list[np.ndarray]) -> Measured:
    worst = 0.0
    for atoms in subject.samples():
        reference, *found = subject.evaluate_all([atoms, *(turned(atoms, m) for m in matrices)])
        pairs = zip(matrices, found, strict=True)
        worst = max(worst, *(reference.turned(m).distance(each) for m, each in pairs))
    return Measured(worst)


def turned(atoms: Atoms, matrix: np.ndarray) -> Atoms:
    """Return a structure turned, cell and all, by an orthogonal matrix (3, 3)."""
    other = atoms.copy()
    other.set_cell(atoms.cell.array @ matrix.T)
    other.positions = atoms.positions @ matrix.T
    return other


def _misfit(
    subject: Subject,
    move: Callable[[np.ndarray], Atoms],
    directions: Sequence[np.ndarray],
    expected: np.ndarray,
    step: float,
) -> float:
    """Return the largest difference of derivatives along directions from differences, eV.

    Of two steps the one that fits better counts, for each direction.
    """
    misfits = []
    for h in (step, step * (1 if subject.single_precision else _FINER)):
        moved = [move(k * h * direction) for direction in directions for k, _ in _STENCIL]
        energies = subject.energies(moved).reshape(-1, len(_STENCIL))
        misfits.append(np.abs(energies @ [weight for _, weight in _STENCIL] / h - expected))
    return largest(np.minimum(*misfits))


def _directions(n_atoms: int, random: np.random.Generator) -> list[np.ndarray]:
    """Return unit displacements (n_atoms, 3): single components, then all atoms together."""
    directions = []
    for atom in random.choice(n_atoms, size=min(3, n_atoms), replace=False):
        for axis in range(3):
            direction = np.zeros((n_atoms, 3))
            direction[atom, axis] = 1.0
            directions.append(direction)
    for _ in range(3):
        direction = random.normal(size=(n_atoms, 3))
        directions.append(direction / np.linalg.norm(direction))
    return directions


def _moved(atoms: Atoms, displacement: np.ndarray) -> Atoms:
    moved = atoms.copy()
    moved.positions = atoms.positions + displacement
    return moved


def symmetry_jump(subject: Subject) -> Measured:
    """Push the atoms of a perfect crystal a little: without forces the energy hardly changes."""
    if subject.molecules_only:
        raise NotApplicable("the calculator takes molecules only")
    perfect = cubic_cell(subject.elements[0])
    push = subject.random("push").normal(size=perfect.positions.shape)
    pushed = _moved(perfect, _PUSH * push / np.linalg.norm(push))
    step = abs(subject.energy(pushed) - subject.energy(perfect))
    return Measured(step / len(perfect), f"per atom, {_PUSH:g} Å from the perfect crystal")


def _strained(atoms: Atoms, strain: np.ndarray) -> Atoms:
    strained = atoms.copy()
    strained.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return strained


_OFF_THE_AXES = np.array([1.0, 2.0, 2.0]) / 3  # frames are special on them


def _dimer(subject: Subject) -> Atoms:
    symbols = [subject.elements[0], subject.elements[-1]]
    return Atoms(symbols, positions=[np.zeros(3), _OFF_THE_AXES])


def _pull(subject: Subject, dimer: Atoms, distances: np.ndarray) -> np.ndarray:
    """Return energy and force along the bond at each distance, (n_distances, 2), eV and eV/Å."""
    positions = [np.array([np.zeros(3), distance * _OFF_THE_AXES]) for distance in distances]
    found = subject.along(dimer, positions)
    return np.array([(each.energy, each.forces[1] @ _OFF_THE_AXES) for each in found])


def _zoom(subject: Subject, dimer: Atoms, low: float, high: float) -> tuple[float, float]:
    """Bisect towards the steepest change; return the steps of force (eV/Å) and energy (eV) left."""
    at_low, at_high = _pull(subject, dimer, np.array([low, high]))
    while high - low > 1e-8:
        middle = 0.5 * (low + high)
        (at_middle,) = _pull(subject, dimer, np.array([middle]))
        below, above = np.abs(at_middle - at_low).max(), np.abs(at_high - at_middle).max()
        if below > above:
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    energy_step, force_step = np.abs(at_high - at_low)
    smooth = abs(at_high[1]) * (high - low)  # what a smooth potential does over the last interval
    return float(force_step), float(max(energy_step - smooth, 0.0))


def _require_stress(subject: Subject) -> None:
    if not subject.has_stress:
        raise NotApplicable("the calculator computes no stress")


PHYSICAL_LAWS = (
    Law("forces are -dE/dx", force_error, "eV/Å", 1e-7, 2e-2),
    Law("stress is dE/dε / V", stress_error, "eV/Å³", 1e-8, 1e-3),
    Law("stress is symmetric", stress_asymmetry, "eV", 1e-10, 1e-4),
    Law("rotation", rotation, "eV, Å", 1e-10, 1e-4),
    Law("reflection", reflection, "eV, Å", 1e-10, 1e-4),
    Law("translation", translation, "eV, Å", 1e-10, 1e-4),
    Law("permutation", permutation, "eV, Å", 1e-10, 1e-4),
    Law("wrapping", wrapping, "eV, Å", 1e-10, 1e-4),
    Law("supercell extensivity", supercell, "eV, Å", 1e-10, 1e-4),
    Law("skew-equivalent cell", skewed_cell, "eV, Å", 1e-10, 1e-4),
    Law("separated fragments add", fragments, "eV, Å", 1e-10, 1e-4),
    Law("smooth at the cutoff", cutoff_force_jump, "eV/Å", 1e-4, 1e-3),
    Law("continuous at symmetry", symmetry_jump, "eV", 1e-6, 1e-4),
    Law("single atom", single_atom, "eV, Å", 1e-10, 1e-5),
    Law(
        *("NVE drift", energy_drift, "meV/atom/ps", 0.05, 0.5),
        depth="default",
        along_with="continuous at symmetry",
    ),
)
