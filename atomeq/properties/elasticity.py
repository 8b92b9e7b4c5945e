"""The elastic tensor from stresses of strained structures, by pymatgen's fit and symmetry."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from numpy.typing import NDArray
from pymatgen.core.elasticity.elastic import ElasticTensor
from pymatgen.core.elasticity.strain import Strain
from pymatgen.core.elasticity.stress import Stress
from pymatgen.io.ase import AseAtomsAdaptor

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.properties.relaxation import relaxed
from atomeq.properties.single_points import Report, computed, refuse_no_crystal, untold
from atomeq.units import GPA

_MODES = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
_AMOUNTS = (-1.0, -0.5, 0.5, 1.0)  # symmetric: terms of second order cancel
_LARGEST = 0.1


@dataclass(frozen=True)
class Elasticity:
    """Elastic constants and what follows from them.

    Attributes:
        stiffness: C_ij in Voigt's order, (6, 6), GPa, in the axes of the structure.
        asymmetry: Largest change that the crystal's symmetry asked of a measured C_ij, GPa.
        bulk: Bulk modulus by Voigt, Reuss and Hill, GPa.
        shear: Shear modulus by Voigt, Reuss and Hill, GPa.
        young: Young's modulus of the isotropic average, GPa.
        poisson: Poisson's ratio of the isotropic average.
        anisotropy: Universal anisotropy, 0 where isotropic.
        stable: Whether every strain costs energy, Born's criterion.
    """

    stiffness: NDArray[np.float64]
    asymmetry: float
    bulk: tuple[float, float, float]
    shear: tuple[float, float, float]
    young: float
    poisson: float
    anisotropy: float
    stable: bool


def elastic_tensor(
    atoms: Atoms,
    calculator: AtomeqCalculator,
    *,
    strain: float = 0.005,
    relax: bool = True,
    fmax: float = 1e-3,
    max_steps: int = 500,
    report: Report = untold,
) -> tuple[Elasticity, list[Atoms]]:
    """Compute the elastic constants of a crystal from the stress of strained structures.

    Args:
        atoms: A crystal.
        calculator: Gives stresses; float64 is what differences of them ask for.
        strain: The largest.
        relax: Relax atoms and cell first, and the atoms of each strained structure.
        fmax: Of relaxations, eV/Å.
        max_steps: Of relaxations.
        report: Told of progress.

    Returns:
        The constants, and the strained structures with energy (eV), forces and stress.

    Raises:
        ValueError: No crystal, or a strain that cannot be used.

    Example:
        >>> fit, _ = elastic_tensor(copper, AtomeqCalculator("cu-pbe"))  # doctest: +SKIP
        >>> fit.stiffness[0, 0]  # C_11 in GPa  # doctest: +SKIP
    """
    refuse_no_crystal(atoms, calculator, "an elastic tensor")
    structures, strains = strained_structures(atoms, strain)
    if relax:
        settle = partial(relaxed, fmax=fmax, max_steps=max_steps, report=report)
        (atoms,) = settle([atoms], calculator, cell=True, what="crystal")
        structures, strains = strained_structures(atoms, strain)
        structures = settle(structures, calculator, cell=False, what="strained cell")
    properties = ("energy", "forces", "stress")
    found = computed(structures, calculator, properties, stage="strains", report=report)
    stresses = [voigt_6_to_full_3x3_stress(one.get_stress()) for one in found]
    return fit_elasticity(atoms, strains, stresses), found


def strained_structures(atoms: Atoms, magnitude: float) -> tuple[list[Atoms], list[Strain]]:
    """Return a structure strained along the six modes, and the strains.

    Args:
        atoms: A structure with a volume, free of stress.
        magnitude: Of the largest strain; a shear changes ε_xy and ε_yx by it.

    Raises:
        ValueError: The magnitude is not between 0 and 0.1.
    """
    if not 0 < magnitude <= _LARGEST:
        raise ValueError(f"strains must be between 0 and {_LARGEST}, not {magnitude:g}")
    structures, strains = [], []
    for mode in _MODES:
        for amount in _AMOUNTS:
            strain = Strain.from_index_amount(mode, amount * magnitude)
            deformation = np.asarray(strain.get_deformation_matrix(shape="symmetric"))
            structure = atoms.copy()
            structure.set_cell(atoms.cell.array @ deformation.T, scale_atoms=True)
            structures.append(structure)
            strains.append(strain)
    return structures, strains


def fit_elasticity(
    atoms: Atoms, strains: Sequence[Strain], stresses: Sequence[NDArray[np.float64]]
) -> Elasticity:
    """Fit the elastic tensor and give it the symmetry of the crystal.

    Args:
        atoms: The unstrained structure.
        strains: As :func:`strained_structures` returns them.
        stresses: Of the strained structures, each (3, 3), eV/Å³, ASE's sign.

    Returns:
        Elastic constants and moduli.
    """
    measured = [Stress(stress / GPA) for stress in stresses]
    # Strains come in pairs of both signs, so a stress at rest, whatever it is, changes no slope.
    tensor = ElasticTensor.from_independent_strains(
        list(strains), measured, eq_stress=np.zeros((3, 3))
    )
    bare: Any = _bare(atoms)  # pymatgen names the class by another path
    structure = AseAtomsAdaptor.get_structure(bare)
    symmetric: Any = tensor.voigt_symmetrized.fit_to_structure(structure, symprec=1e-3)
    stiffness = np.asarray(symmetric.voigt, dtype=np.float64)
    fitted = ElasticTensor.from_voigt(stiffness)
    return Elasticity(
        stiffness=stiffness,
        asymmetry=float(np.abs(np.asarray(tensor.voigt) - stiffness).max()),
        bulk=(float(fitted.k_voigt), float(fitted.k_reuss), float(fitted.k_vrh)),
        shear=(float(fitted.g_voigt), float(fitted.g_reuss), float(fitted.g_vrh)),
        young=float(fitted.y_mod) / 1e9,  # pymatgen's is in Pa
        poisson=float(fitted.homogeneous_poisson),
        anisotropy=float(fitted.universal_anisotropy),
        stable=bool(np.linalg.eigvalsh(stiffness).min() > 0),
    )


def _bare(atoms: Atoms) -> Atoms:
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
