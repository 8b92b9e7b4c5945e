"""What a law is: how it is measured, on which structures, and its verdict.

The laws of any calculator are in ``physical_laws``, ``thread_laws``, ``software_laws`` and
``degenerate_structures``, and ``calculator`` runs them; ``model`` runs those of physics on a model.
"""

import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, PropertyNotImplementedError
from ase.data import atomic_numbers, chemical_symbols, covalent_radii, reference_states

from atomeq.calculators.ase import has_volume

CalculatorFactory = Callable[[], Calculator]

#: How much is checked: what takes seconds; minutes of dynamics as well; every law there is.
Depth = Literal["quick", "default", "full"]

#: Supercell of the cubic cell that has about a hundred atoms, by atoms in the cubic cell.
_REPEATS = {1: 5, 2: 4, 4: 3, 8: 2}

#: Tried in this order on calculators of molecules, by what elements they know.
_MOLECULES = ("CH3CONH2", "CH3CH2OH", "C2H6", "NH3", "H2O", "H2", "P2", "Cl2", "N2", "O2")


@dataclass(frozen=True)
class LawResult:
    """Verdict on one law.

    Attributes:
        name: The law.
        figure: What was measured; smaller is better. Infinite where the calculator raised.
        unit: Unit of figure and tolerance.
        tolerance: The largest figure that passes.
        passed: None where the law does not apply (no stress, one element only), or is broken by a
            method that is exempt from it.
        note: What else there is to know, in a few words.
        exempt: Why the method cannot keep the law, where it breaks it and says so.
    """

    name: str
    figure: float
    unit: str
    tolerance: float
    passed: bool | None
    note: str = ""
    exempt: str = ""


class Measured(NamedTuple):
    """A figure, a note, and whether something happened that no figure can excuse."""

    figure: float
    note: str = ""
    broken: bool = False


class NotApplicable(Exception):
    """The law says nothing about this calculator."""


@dataclass(frozen=True)
class Law:
    """A law: how to measure the distance from it, and how much is allowed.

    Attributes:
        name: The law in a few words.
        measure: Takes the subject, of the kind that the law is about, returns the figure.
        unit: Unit of the figure.
        tolerance: Allowed of a float64 calculator.
        single: Allowed of a float32 calculator.
        depth: The least depth of a check that measures it.
        along_with: Another law, whose exemption is one from this law too.
    """

    name: str
    measure: "Callable[[Any], Measured]"
    unit: str
    tolerance: float
    single: float
    depth: Depth = "quick"
    along_with: str = ""

    def judge(self, subject: "Subject") -> LawResult:
        """Measure and compare with the tolerance; whatever the calculator raises is a failure.

        A method that says why it cannot keep the law is exempt from it, but not from computing.
        """
        tolerance = self.single if subject.single_precision else self.tolerance
        try:
            measured = self.measure(subject)
        except (NotApplicable, PropertyNotImplementedError) as reason:
            return LawResult(self.name, math.nan, self.unit, tolerance, None, f"skipped: {reason}")
        except Exception as error:  # a check must survive any fault of what it checks
            measured = Measured(math.inf, f"raised {describe(error)}")
        passed = not measured.broken and bool(measured.figure <= tolerance)  # NaN fails
        exempt = subject.exempt_laws
        reason = exempt.get(self.name) or exempt.get(self.along_with, "")
        if reason and not passed and math.isfinite(measured.figure):
            note = f"exempt: {reason}"
            return LawResult(self.name, measured.figure, self.unit, tolerance, None, note, reason)
        return LawResult(self.name, measured.figure, self.unit, tolerance, passed, measured.note)


@dataclass
class Subject:
    """A calculator under test with structures it can be tested on.

    Attributes:
        factory: Makes a new calculator on each call.
        elements: Chemical symbols the calculator knows, at least one.
        single_precision: The calculator computes in float32.
        dynamics_structure: The structure of the NVE law; by default about a hundred atoms of bulk.
        dynamics_steps: Number of steps of the NVE law; by default 5 ps, fewer of what is slow.
        timestep: Of the NVE law, fs.
        temperature: Of the NVE law, K.
        seed: Of every random displacement and velocity.
        on_step: Called with the number of the step and of all steps while the NVE law runs.
    """

    factory: CalculatorFactory
    elements: Sequence[str]
    single_precision: bool = False
    dynamics_structure: Atoms | None = None
    dynamics_steps: int | None = None
    timestep: float = 2.0
    temperature: float = 300.0
    seed: int = 0
    on_step: Callable[[int, int], object] = field(default=lambda step, steps: None)

    #: Of the cubic cell of few atoms that becomes the crystal.
    repeats = (2, 2, 2)
    #: How far apart the atoms of a dimer are pulled, Å; beyond the cutoff of what is known.
    reach = 12.5

    @cached_property
    def calculator(self) -> Calculator:
        """One calculator for all laws that do not ask for a fresh one."""
        return self.factory()

    @cached_property
    def exempt_laws(self) -> Mapping[str, str]:
        """Laws that the calculator's method cannot keep by construction, and why."""
        return getattr(self.calculator, "exempt_laws", {})

    @cached_property
    def has_stress(self) -> bool:
        """Whether the calculator says it computes stress."""
        return "stress" in self.calculator.implemented_properties and not self.molecules_only

    @cached_property
    def molecules_only(self) -> bool:
        """Whether the calculator says that it takes no periodic structures."""
        return bool(getattr(self.calculator, "molecules_only", False))

    def random(self, purpose: str) -> np.random.Generator:
        """Return a generator of its own for each purpose, so that laws do not depend on order."""
        return np.random.default_rng([self.seed, zlib.crc32(purpose.encode())])

    def crystal(self, purpose: str = "crystal") -> Atoms:
        """Return a periodic, triclinic, rattled cell: 16 to 32 atoms for the common lattices.

        A calculator of molecules gets a rattled molecule.
        """
        random = self.random(purpose)
        if self.molecules_only:
            return rattled(self._molecule(), random)
        atoms = cubic_cell(self.elements[0])
        atoms = atoms.repeat(self.repeats if len(atoms) <= 4 else (2, 1, 1))
        self._alloy(atoms)
        strain = np.eye(3) + random.uniform(-0.03, 0.03, (3, 3))
        atoms.set_cell(atoms.cell @ strain, scale_atoms=True)
        return rattled(atoms, random)

    def periodic(self) -> Atoms:
        """Return the crystal of laws that are about periodicity.

        Raises:
            NotApplicable: The calculator takes molecules only.
        """
        if self.molecules_only:
            raise NotApplicable("the calculator takes molecules only")
        return self.crystal()

    def cluster(self, purpose: str = "cluster") -> Atoms:
        """Return about a dozen atoms of the lattice without periodicity, rattled."""
        random = self.random(purpose)
        if self.molecules_only:
            return rattled(self._molecule(), random)
        atoms = cubic_cell(self.elements[0]).repeat(3)
        centre = atoms.positions.mean(axis=0) + 0.1
        nearest = np.argsort(np.linalg.norm(atoms.positions - centre, axis=1))[:13]
        atoms = atoms[np.sort(nearest)]
        self._alloy(atoms)
        atoms.set_cell(None)
        atoms.pbc = False
        return rattled(atoms, random)

    def samples(self) -> list[Atoms]:
        """Return a structure of each kind, for laws of any structure."""
        return [self.crystal(), self.cluster()]

    def hundred_atoms(self) -> Atoms:
        """Return the structure of the NVE law."""
        if self.dynamics_structure is not None:
            return self.dynamics_structure.copy()
        if self.molecules_only:
            return self._molecule()
        atoms = cubic_cell(self.elements[0])
        return atoms.repeat(_REPEATS.get(len(atoms), 2))

    def evaluate(self, atoms: Atoms, *, calculator: Calculator | None = None) -> "Evaluation":
        """Compute energy, forces and, where there is a volume, the stress of a copy of atoms."""
        atoms = atoms.copy()
        atoms.calc = self.calculator if calculator is None else calculator
        stress = None
        if self.has_stress and has_volume(atoms):
            stress = atoms.get_stress(voigt=False)
        return Evaluation(self.energy_of(atoms), atoms.get_forces(apply_constraint=False), stress)

    def energy(self, atoms: Atoms, *, calculator: Calculator | None = None) -> float:
        """Compute the energy of a copy of a structure."""
        atoms = atoms.copy()
        atoms.calc = self.calculator if calculator is None else calculator
        return self.energy_of(atoms)

    def evaluate_all(self, structures: Sequence[Atoms]) -> list["Evaluation"]:
        """Compute many structures, as :meth:`evaluate` does one."""
        return [self.evaluate(atoms) for atoms in structures]

    def energies(self, structures: Sequence[Atoms]) -> np.ndarray:
        """Compute the energies of many structures, (n_structures,) eV."""
        return np.array([self.energy(atoms) for atoms in structures])

    def along(self, atoms: Atoms, positions: Sequence[np.ndarray]) -> list["Evaluation"]:
        """Compute one object at each of many positions, where it keeps what it is; no stress."""
        atoms = atoms.copy()
        atoms.calc = self.calculator
        found = []
        for each in positions:
            atoms.positions = each
            found.append(Evaluation(self.energy_of(atoms), atoms.get_forces(), None))
        return found

    @staticmethod
    def energy_of(atoms: Atoms) -> float:
        """Return the energy consistent with the forces, where the calculator publishes one."""
        consistent = "free_energy" in getattr(atoms.calc, "implemented_properties", ())
        return float(atoms.get_potential_energy(force_consistent=consistent))

    def _molecule(self) -> Atoms:
        for name in _MOLECULES:
            atoms = molecule(name)
            if set(atoms.symbols) <= set(self.elements):
                return atoms
        raise NotApplicable(f"no molecule of {', '.join(self.elements)} is known here")

    def _alloy(self, atoms: Atoms) -> None:
        """Put every known element in, cycling over the atoms but leaving the first in majority."""
        for index, symbol in enumerate(self.elements[1:4]):
            atoms.symbols[2 * index + 1 :: 8] = symbol


class Evaluation(NamedTuple):
    """Energy (eV), forces (n_atoms, 3) eV/Å and stress (3, 3) eV/Å³ or None."""

    energy: float
    forces: np.ndarray
    stress: np.ndarray | None

    def turned(self, matrix: np.ndarray) -> "Evaluation":
        """Return what an orthogonal matrix (3, 3) makes of it."""
        stress = None if self.stress is None else matrix @ self.stress @ matrix.T
        return Evaluation(self.energy, self.forces @ matrix.T, stress)

    def distance(self, other: "Evaluation") -> float:
        """Return the largest difference of energy per atom, force component or stress component."""
        differences = [
            abs(self.energy - other.energy) / max(len(self.forces), 1),
            largest(self.forces - other.forces),
        ]
        if self.stress is not None and other.stress is not None:
            differences.append(largest(self.stress - other.stress))
        return float(np.max(differences))  # np.max hands NaN on, max() may hide it


def largest(array: np.ndarray) -> float:
    """Return the largest magnitude, NaN if there is one, 0 for an empty array."""
    return float(np.max(np.abs(array))) if array.size else 0.0


def describe(error: BaseException) -> str:
    """Return an exception on one line of moderate length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 160 else text[:159] + "…"


def unknown_element(subject: Subject) -> str:
    """Return the heaviest element that the calculator does not know.

    Raises:
        NotApplicable: It knows every element.
    """
    stated = [chemical_symbols[z] for z in getattr(subject.calculator, "elements", None) or ()]
    for symbol in reversed(chemical_symbols[1:]):
        if symbol not in (stated or subject.elements):
            return symbol
    raise NotApplicable("the calculator knows every element")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings about a bad structure to ourselves."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def cubic_cell(symbol: str) -> Atoms:
    """Return the cubic cell of the element's own lattice, or an fcc one of touching atoms."""
    state = reference_states[atomic_numbers[symbol]]
    if state is not None and state["symmetry"] in ("fcc", "bcc", "diamond", "sc"):
        return bulk(symbol, cubic=True)
    contact = 2.2 * float(covalent_radii[atomic_numbers[symbol]])
    return bulk(symbol, "fcc", a=contact * math.sqrt(2), cubic=True)


def rattled(atoms: Atoms, random: np.random.Generator, *, width: float = 0.05) -> Atoms:
    """Displace every atom by normal noise of ``width`` Å, in place, and return the structure."""
    atoms.positions += random.normal(scale=width, size=atoms.positions.shape)
    return atoms


def random_rotation(random: np.random.Generator) -> np.ndarray:
    """Return a rotation matrix (3, 3) drawn uniformly."""
    q, r = np.linalg.qr(random.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))
