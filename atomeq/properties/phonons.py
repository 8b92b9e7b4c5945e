"""Harmonic phonons by phonopy, from the forces on displaced supercells."""

import itertools
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from ase import Atoms
from ase.dft.kpoints import parse_path_string
from numpy.typing import NDArray
from phonopy import Phonopy
from phonopy.structure.atoms import PhonopyAtoms

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.properties.single_points import Report, computed, refuse_no_crystal, untold

#: THz; acoustic modes at Γ are zero up to the noise of the forces, so less is not imaginary.
IMAGINARY = 0.05
_POINTS = 41  # of a leg of the path
_T = TypeVar("_T")


@dataclass(frozen=True)
class BandPath:
    """Legs through the Brillouin zone.

    Attributes:
        legs: Wave vectors of each leg in the primitive cell's reciprocal lattice, (n_points, 3).
        ends: Names of the two ends of each leg.
    """

    legs: list[NDArray[np.float64]]
    ends: list[tuple[str, str]]

    @property
    def connected(self) -> list[bool]:
        """Whether each leg ends where the next one begins."""
        pairs = itertools.pairwise(self.ends)
        return [*(one[1] == other[0] for one, other in pairs), False]

    @property
    def labels(self) -> list[str]:
        """Names as phonopy takes them: ends of connected legs once."""
        names = [self.ends[0][0]]
        for (_, stop), joined, following in zip(
            self.ends, self.connected, [*self.ends[1:], None], strict=True
        ):
            names.append(stop)
            if not joined and following is not None:
                names.append(following[0])
        return names


@dataclass(frozen=True)
class Phonons:
    """Harmonic phonons of a crystal.

    Attributes:
        phonon: phonopy's object, with the force constants.
        supercells: The displaced ones, with energy (eV) and forces.
        path: Through the Brillouin zone of the primitive cell.
        bands: Frequencies of each leg of the path, (n_points, n_modes), THz.
        mesh: Frequencies of a mesh of wave vectors, (n_q, n_modes), THz.
        weights: Of the wave vectors, (n_q,); they sum to one.
        dos: Frequencies (n_points,), THz, and the density of states per THz and primitive cell.
        thermal: Of each temperature what :func:`thermal_properties` gives.
    """

    phonon: Phonopy
    supercells: list[Atoms]
    path: BandPath
    bands: list[NDArray[np.float64]]
    mesh: NDArray[np.float64]
    weights: NDArray[np.float64]
    dos: tuple[NDArray[np.float64], NDArray[np.float64]]
    thermal: list[dict[str, float]]

    @property
    def lowest(self) -> float:
        """The lowest frequency of bands and mesh, THz; imaginary ones are negative."""
        return min(float(self.mesh.min()), *(float(leg.min()) for leg in self.bands))

    @property
    def highest(self) -> float:
        """The highest frequency of the bands, THz."""
        return max(float(leg.max()) for leg in self.bands)

    @property
    def imaginary_fraction(self) -> float:
        """Share of the mesh's modes that are imaginary."""
        return float(self.weights @ (self.mesh < -IMAGINARY).mean(axis=1))


def phonons(
    atoms: Atoms,
    calculator: AtomeqCalculator,
    *,
    supercell: Sequence[int] | float = 10.0,
    displacement: float = 0.01,
    path: str | None = None,
    mesh: float = 60.0,
    temperatures: Sequence[float] = (300.0,),
    results: MutableSequence[dict[str, Any]] | None = None,
    report: Report = untold,
) -> Phonons:
    """Compute harmonic phonons by finite displacements of a supercell.

    Args:
        atoms: A relaxed crystal, see :func:`~atomeq.properties.relaxation.relaxed`.
        calculator: Gives forces; float64 is what differences of them ask for.
        supercell: How often to repeat the cell in each direction, or the least distance between
            opposite faces, Å.
        displacement: Å.
        path: Special points such as ``"GXWKG,LU"``; by default all that the lattice has.
        mesh: Density of wave vectors, phonopy's length, Å.
        temperatures: Of the thermal properties, K.
        results: Of supercells that were computed before, in their order; new ones are appended.
        report: Told of progress.

    Returns:
        Bands, density of states and thermal properties, with phonopy's object.

    Raises:
        ValueError: No crystal, or an argument that cannot be used.

    Example:
        >>> found = phonons(copper, AtomeqCalculator("cu-pbe"))  # doctest: +SKIP
        >>> found.thermal[0]["heat_capacity_J_per_K_mol"]  # doctest: +SKIP
    """
    refuse_no_crystal(atoms, calculator, "phonons")
    repeats = (
        fitting_supercell(atoms, supercell) if isinstance(supercell, float | int) else supercell
    )
    phonon, cells = displaced_supercells(atoms, supercell=repeats, displacement=displacement)
    legs = band_path(phonon, path)  # before the forces: it may be wrong
    stage = "displacements"
    found = computed(
        cells, calculator, ("energy", "forces"), stage=stage, results=results, report=report
    )
    set_forces(phonon, [one.get_forces() for one in found])
    bands = band_frequencies(phonon, legs)
    frequencies, weights = mesh_frequencies(phonon, mesh)
    return Phonons(
        phonon=phonon,
        supercells=found,
        path=legs,
        bands=bands,
        mesh=frequencies,
        weights=weights,
        dos=density_of_states(phonon),
        thermal=thermal_properties(phonon, temperatures),
    )


def fitting_supercell(atoms: Atoms, min_length: float) -> tuple[int, int, int]:
    """Return how often to repeat a cell so that opposite faces are so far apart (Å)."""
    heights = 1 / np.linalg.norm(np.linalg.inv(atoms.cell.array), axis=0)
    repeats = np.maximum(1, np.ceil(min_length / heights - 1e-6)).astype(int)
    return tuple(repeats.tolist())


def displaced_supercells(
    atoms: Atoms, *, supercell: Sequence[int], displacement: float
) -> tuple[Phonopy, list[Atoms]]:
    """Return phonopy's object and the supercells whose forces it needs.

    Args:
        atoms: A relaxed structure with a volume.
        supercell: How often to repeat it in each direction.
        displacement: Å.

    Raises:
        ValueError: An argument is not positive.
    """
    if min(supercell) < 1 or displacement <= 0:
        raise ValueError(
            f"supercell and displacement must be positive; got {list(supercell)}, {displacement:g}"
        )
    phonon = Phonopy(
        structure_to_phonopy(atoms),
        supercell_matrix=np.diag(supercell),
        primitive_matrix="auto",
    )
    phonon.generate_displacements(distance=displacement)
    cells = phonon.supercells_with_displacements or []
    return phonon, [structure_from_phonopy(cell) for cell in cells]


def set_forces(phonon: Phonopy, forces: Sequence[NDArray[np.float64]]) -> None:
    """Give phonopy the forces on its supercells; force constants keep the sum rules after it."""
    phonon.forces = np.asarray(forces)
    phonon.produce_force_constants(show_drift=False)
    phonon.symmetrize_force_constants(show_drift=False)


def band_path(phonon: Phonopy, path: str | None = None) -> BandPath:
    """Return the path through the Brillouin zone of the primitive cell.

    Args:
        phonon: Names the primitive cell.
        path: Special points such as ``"GXWKG,LU"``; by default all that the lattice has.

    Raises:
        ValueError: A point is not one of the lattice's.
    """
    cell = structure_from_phonopy(phonon.primitive).cell
    points = cell.bandpath(npoints=0).special_points
    chosen = path if path is not None else cell.bandpath(npoints=0).path
    legs, ends = [], []
    for piece in parse_path_string(chosen):
        unknown = [name for name in piece if name not in points]
        if unknown or len(piece) < 2:
            raise ValueError(
                f"path {chosen!r}: a piece needs at least two of {', '.join(sorted(points))}, and "
                f"one is {''.join(piece)}"
            )
        for start, stop in itertools.pairwise(piece):
            legs.append(np.linspace(points[start], points[stop], _POINTS))
            ends.append((start, stop))
    return BandPath(legs, ends)


def frequencies_at_ends(phonon: Phonopy, path: BandPath) -> dict[str, list[float]]:
    """Return the frequencies at the named points of a path, THz, ascending."""
    found: dict[str, list[float]] = {}
    for leg, names in zip(path.legs, path.ends, strict=True):
        for name, wave_vector in zip(names, (leg[0], leg[-1]), strict=True):
            if name not in found:
                phonon.run_qpoints([wave_vector])
                found[name] = np.sort(_present(phonon.qpoints).frequencies[0]).tolist()
    return found


def lengths(phonon: Phonopy, path: BandPath) -> list[float]:
    """Return the length of each leg of a path, 1/Å without 2π."""
    reciprocal = np.linalg.inv(phonon.primitive.cell).T
    return [float(np.linalg.norm((leg[-1] - leg[0]) @ reciprocal)) for leg in path.legs]


def band_frequencies(phonon: Phonopy, path: BandPath) -> list[NDArray[np.float64]]:
    """Return the frequencies of each leg of a band structure, (n_points, n_modes), THz.

    Args:
        phonon: With force constants.
        path: As :func:`band_path` gives it.
    """
    phonon.run_band_structure(path.legs, path_connections=path.connected, labels=path.labels)
    return [np.asarray(leg) for leg in _present(phonon.band_structure).frequencies]


def mesh_frequencies(
    phonon: Phonopy, mesh: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Run a mesh of wave vectors.

    Args:
        phonon: With forces.
        mesh: Density, phonopy's length, Å.

    Returns:
        Frequencies, (n_q, n_modes), THz, and the weights of the wave vectors, which sum to one.
    """
    result = phonon.run_mesh(mesh, is_gamma_center=True)
    weights = np.asarray(result.weights, dtype=np.float64)
    return np.asarray(result.frequencies), weights / weights.sum()


def density_of_states(phonon: Phonopy) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return frequencies (THz) and density of states (per THz and primitive cell) of the mesh.

    Args:
        phonon: After :func:`mesh_frequencies`.
    """
    phonon.run_total_dos()
    dos = _present(phonon.total_dos)
    return np.asarray(dos.frequency_points), np.asarray(dos.dos)


def thermal_properties(phonon: Phonopy, temperatures: Sequence[float]) -> list[dict[str, float]]:
    """Return free energy, entropy and heat capacity per mole of primitive cells, from the mesh.

    Args:
        phonon: After :func:`mesh_frequencies`.
        temperatures: K.
    """
    # At Γ the three acoustic modes are zero, and their free energy is not a number.
    phonon.run_thermal_properties(temperatures=list(temperatures), exclude_gamma_acoustic=True)
    thermal = _present(phonon.thermal_properties)
    columns = {
        "temperature_K": thermal.temperatures,
        "free_energy_kJ_per_mol": thermal.free_energy,
        "entropy_J_per_K_mol": thermal.entropy,
        "heat_capacity_J_per_K_mol": thermal.heat_capacity,
    }
    rows = zip(*(np.asarray(values).tolist() for values in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def structure_to_phonopy(atoms: Atoms) -> PhonopyAtoms:
    """Return a crystal as phonopy takes it, with its masses."""
    return PhonopyAtoms(
        numbers=atoms.numbers,
        cell=atoms.cell.array,
        scaled_positions=atoms.get_scaled_positions(),
        masses=atoms.get_masses(),
    )


def structure_from_phonopy(cell: PhonopyAtoms) -> Atoms:
    """Return a crystal of phonopy as ASE's Atoms."""
    return Atoms(
        numbers=cell.numbers, scaled_positions=cell.scaled_positions, cell=cell.cell, pbc=True
    )


def _present(value: _T | None) -> _T:
    assert value is not None  # it was run on the line before
    return value
