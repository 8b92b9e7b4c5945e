"""MD17, rMD17 and MD22 as they are published: NumPy archives of one molecule's frames.

sGDML's archives (MD17, MD22) call elements, positions, energies and forces ``z``, ``R``, ``E`` and
``F``, those of rMD17 ``nuclear_charges``, ``coords``, ``energies`` and ``forces``; all are in
kcal/mol and Å. Nothing pickled is read.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from atomeq.data.ase_files import DataError
from atomeq.units import KCAL_PER_MOL

_NAMES = (("z", "R", "E", "F"), ("nuclear_charges", "coords", "energies", "forces"))
_UNITS = {"e_unit": ("kcal/mol",), "r_unit": ("Ang", "Angstrom", "A")}


def read_md_archive(path: Path) -> Iterator[Atoms]:
    """Yield the frames of an archive with energy, eV, and forces, eV/Å.

    Raises:
        DataError: It is no such archive, its arrays do not fit each other, or it says other units.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            names = next((each for each in _NAMES if set(each) <= set(archive.files)), None)
            if names is None:
                raise DataError(
                    f"{path} has {', '.join(archive.files)}, but neither {', '.join(_NAMES[0])} "
                    f"(MD17, MD22) nor {', '.join(_NAMES[1])} (rMD17)"
                )
            for key, known in _UNITS.items():
                if key in archive.files and str(archive[key][()]) not in known:
                    raise DataError(f"{path} says {key} {archive[key][()]}, and {known[0]} is read")
            numbers, positions, energies, forces = (archive[name] for name in names)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged or no NumPy archive: {error}") from error
    shape = (len(positions), len(numbers), 3)
    if positions.shape != shape or forces.shape != shape or energies.size != shape[0]:
        raise DataError(
            f"{path}: positions {positions.shape}, forces {forces.shape} and energies "
            f"{energies.shape} are not of the same frames of {len(numbers)} atoms"
        )
    for place, energy, force in zip(positions, energies.reshape(-1), forces, strict=True):
        atoms = Atoms(numbers.astype(int), place)
        labels = {"energy": float(energy) * KCAL_PER_MOL, "forces": force * KCAL_PER_MOL}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        yield atoms
