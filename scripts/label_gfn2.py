"""Label molecules with GFN2-xTB: energy, forces, dipole and polarizability, for examples.

``.venv/bin/python scripts/label_gfn2.py ${ATOMEQ_DATA}/qm7/qm7.extxyz.gz
${ATOMEQ_DATA}/gfn2_qm7.extxyz`` labels 7,101 molecules in some ten minutes of one core; it needs
``pip install tblite==0.4.0``. Method: Bannwarth, Ehlert and Grimme, J. Chem. Theory Comput.
15, 1652 (2019).
"""

import argparse
import contextlib
import io
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import iread, write
from ase.io.formats import string2index
from ase.units import Bohr, Hartree
from numpy.typing import NDArray

from atomeq.files import write_atomically

_FIELD = 1e-3  # atomic units; the polarizability is a central difference of dipoles


def results_of(atoms: Atoms, field: NDArray[np.float64] | None = None) -> dict[str, Any]:
    """Return energy, gradient and dipole in atomic units, in a field in atomic units."""
    from tblite.interface import Calculator
    from tblite.library import ffi

    calculator = Calculator("GFN2-xTB", atoms.numbers, atoms.positions / Bohr)
    calculator.set("verbosity", 0)
    calculator.set("accuracy", 0.01)
    if field is not None:  # version 0.4.0 takes a pointer, and no array
        calculator.add("electric-field", ffi.cast("double*", field.ctypes.data))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its dictionaries
        found = calculator.singlepoint()
        return {name: found.get(name) for name in ("energy", "gradient", "dipole")}


def label(atoms: Atoms) -> Atoms:
    """Return a molecule with its labels in eV, Å and e."""
    plain = results_of(atoms)
    rows = []
    for axis in np.eye(3):
        up, down = (results_of(atoms, sign * _FIELD * axis)["dipole"] for sign in (1, -1))
        rows.append((up - down) / (2 * _FIELD))
    polarizability = (np.array(rows) + np.array(rows).T) / 2
    labelled = Atoms(atoms.numbers, atoms.positions)
    labelled.info["dipole"] = plain["dipole"] * Bohr
    labelled.info["polarizability"] = polarizability * Bohr**2 / Hartree
    forces = -plain["gradient"] * (Hartree / Bohr)
    labelled.calc = SinglePointCalculator(labelled, energy=plain["energy"] * Hartree, forces=forces)
    return labelled


def main() -> None:
    """Label a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="any file that ASE reads")
    parser.add_argument("target", help="OUT.extxyz")
    parser.add_argument("--rattle", type=float, default=0.05, help="displace atoms, Å")
    parser.add_argument("--part", default="::", help="which structures, as START:STOP:STEP")
    options = parser.parse_args()
    part, labelled = string2index(options.part), []
    for number, atoms in enumerate(iread(options.source, index=part)):
        molecule = Atoms(atoms.numbers, atoms.positions)
        molecule.rattle(options.rattle, seed=(part.start or 0) + number * (part.step or 1))
        labelled.append(label(molecule))
    with write_atomically(options.target) as partial:
        write(partial, labelled, format="extxyz")
    print(f"{len(labelled)} structures in {options.target}")


if __name__ == "__main__":
    main()
