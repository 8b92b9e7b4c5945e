"""Lattice thermal conductivity by phono3py, from the forces on supercells with two displacements.

The Boltzmann equation of phonons in the relaxation-time approximation: three-phonon scattering from
the third derivatives of the energy, and scattering from isotopes of natural abundance.
"""

from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.properties.phonons import (
    IMAGINARY,
    fitting_supercell,
    structure_from_phonopy,
    structure_to_phonopy,
)
from atomeq.properties.single_points import Report, computed, refuse_no_crystal, untold

#: Places of phono3py's xx, yy, zz, yz, xz, xy in a tensor.
VOIGT = np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])


@dataclass(frozen=True)
class ThermalConductivity:
    """Lattice thermal conductivity of a crystal.

    Attributes:
        phonon3: phono3py's object, with the force constants of second and third order.
        supercells: The displaced ones, with energy (eV) and forces.
        temperatures: (n_temperatures,), K.
        kappa: (n_temperatures, 3, 3), W/(m K), in the axes of the structure.
        mesh: Numbers of wave vectors.
    """

    phonon3: Any
    supercells: list[Atoms]
    temperatures: NDArray[np.float64]
    kappa: NDArray[np.float64]
    mesh: tuple[int, int, int]

    @property
    def average(self) -> NDArray[np.float64]:
        """A third of the trace at each temperature, W/(m K)."""
        return np.trace(self.kappa, axis1=1, axis2=2) / 3


def phono3py_class() -> Any:
    """Return the class ``Phono3py``.

    Raises:
        ImportError: phono3py is not installed.
    """
    try:
        from phono3py import Phono3py  # pyright: ignore[reportMissingImports]  # of an extra
    except ImportError as error:
        raise ImportError(
            f"thermal conductivity needs phono3py ({error}): pip install 'atomeq[kappa]'"
        ) from error
    return Phono3py


def thermal_conductivity(
    atoms: Atoms,
    calculator: AtomeqCalculator,
    *,
    supercell: Sequence[int] | float = 10.0,
    displacement: float = 0.03,
    mesh: float | Sequence[int] = 50.0,
    temperatures: Sequence[float] = (300.0,),
    isotopes: bool = True,
    results: MutableSequence[dict[str, Any]] | None = None,
    report: Report = untold,
) -> ThermalConductivity:
    """Compute the lattice thermal conductivity by finite displacements of a supercell.

    Args:
        atoms: A relaxed crystal, see :func:`~atomeq.properties.relaxation.relaxed`.
        calculator: Gives forces; float64 is what second differences of them ask for.
        supercell: How often to repeat the cell in each direction, or the least distance between
            opposite faces, Å. With two repeats of a primitive cell an atom and its image pull in
            opposite directions, and third derivatives cancel: take three, or a longer cell.
        displacement: Å.
        mesh: Numbers of wave vectors, or their density, phonopy's length, Å; converge it.
        temperatures: K.
        isotopes: Whether isotopes of natural abundance scatter too.
        results: Of supercells that were computed before, in their order; new ones are appended.
        report: Told of progress.

    Returns:
        Conductivities by temperature, with phono3py's object.

    Raises:
        ImportError: phono3py is not installed.
        ValueError: No crystal, an argument that cannot be used, or imaginary modes on the mesh.

    Example:
        >>> found = thermal_conductivity(silicon, calculator, mesh=80)  # doctest: +SKIP
        >>> found.average  # doctest: +SKIP
    """
    phono3py = phono3py_class()
    refuse_no_crystal(atoms, calculator, "thermal conductivity")
    if isinstance(supercell, float | int):
        supercell = fitting_supercell(atoms, supercell)
    if min(supercell) < 1 or displacement <= 0 or min(temperatures, default=0) <= 0:
        raise ValueError(
            "supercell, displacement and temperatures must be positive; got "
            f"{list(supercell)}, {displacement:g}, {list(temperatures)}"
        )
    phonon3 = phono3py(
        structure_to_phonopy(atoms), supercell_matrix=np.diag(supercell), primitive_matrix="auto"
    )
    phonon3.generate_displacements(distance=displacement)
    found = computed(
        [structure_from_phonopy(cell) for cell in phonon3.supercells_with_displacements],
        calculator,
        ("energy", "forces"),
        stage="displacements",
        results=results,
        report=report,
    )
    phonon3.forces = np.array([one.get_forces() for one in found])
    phonon3.produce_fc3()
    phonon3.symmetrize_fc3()  # sum rules, of the second order too
    phonon3.symmetrize_fc2()
    return _solve(phonon3, found, mesh, temperatures, isotopes)


def _solve(
    phonon3: Any,
    supercells: list[Atoms],
    mesh: float | Sequence[int],
    temperatures: Sequence[float],
    isotopes: bool,
) -> ThermalConductivity:
    phonon3.mesh_numbers = mesh
    phonon3.init_phph_interaction()
    phonon3.run_phonon_solver()
    lowest = float(phonon3.get_phonon_data()[0].min())
    if lowest < -IMAGINARY:
        raise ValueError(
            f"modes are imaginary, down to {lowest:.2f} THz: the structure is not at a minimum and "
            "has no phonons that could carry heat; relax it, or displace it along the mode"
        )
    phonon3.run_thermal_conductivity(temperatures=list(temperatures), is_isotope=isotopes)
    solved = phonon3.thermal_conductivity
    return ThermalConductivity(
        phonon3=phonon3,
        supercells=supercells,
        temperatures=np.array(solved.temperatures),
        kappa=np.array(solved.kappa[0])[:, VOIGT],  # of the tetrahedron method, the only one asked
        mesh=tuple(np.asarray(phonon3.mesh_numbers).tolist()),
    )
