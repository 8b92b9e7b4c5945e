"""Data sets whose sources are in forms of their own become extended XYZ, as configs/data reads it.

mvl_snap: JSON lists of structures of pymatgen with VASP's results. QM7: one XYZ file a molecule in
an archive, and a table of atomization energies.
"""

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.extxyz import write_extxyz

from atomeq.data.ase_files import DataError
from atomeq.units import KCAL_PER_MOL, KILOBAR

_VASP_ORDER = (0, 1, 2, 4, 5, 3)  # xx yy zz xy yz zx becomes Voigt's xx yy zz yz xz xy


def convert_snap(sources: Sequence[Path], target: Path) -> None:
    """Write the structures of mvl_snap's JSON files as one extended XYZ file, in their order.

    VASP's pressures in kbar become stresses of ASE's sign in eV/Å³. ``tag`` is the kind of
    configuration, which the name of the file says: ``set=Elastic``.

    Args:
        sources: As :mod:`atomeq.data.download` leaves them.
        target: To write.

    Raises:
        DataError: A file is not in that form.
    """
    frames = []
    for source in sources:
        try:
            entries = json.loads(source.read_text(encoding="utf-8"))
            kind = source.name.removesuffix(".json").rpartition(".")[2]
            frames += [_atoms_of_entry(entry, f"set={kind}") for entry in entries]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f"{source} is not a list of mvl_snap's structures: {error}") from error
    ase.io.write(target, frames, format="extxyz")


def _atoms_of_entry(entry: dict[str, Any], tag: str) -> Atoms:
    structure, outputs = entry["structure"], entry["outputs"]
    sites = structure["sites"]
    atoms = Atoms(
        [site["species"][0]["element"] for site in sites],
        scaled_positions=[site["abc"] for site in sites],
        cell=structure["lattice"]["matrix"],
        pbc=True,
        info={"group": entry["group"], "tag": tag},
    )
    pressure = np.array(outputs["stress"])[list(_VASP_ORDER)]
    atoms.calc = SinglePointCalculator(
        atoms,
        energy=outputs["energy"],
        forces=np.array(outputs["forces"]).reshape(len(atoms), 3),
        stress=-KILOBAR * pressure,
    )
    return atoms


def convert_qm7(sources: Sequence[Path], target: Path) -> None:
    """Write the molecules of QM7's archive as one extended XYZ file, in the order of their names.

    Args:
        sources: The archive, with ``hof_qm7.txt``, whose lines are a file's name and its
            atomization energy in kcal/mol, and ``qm7/*.xyz``. Files that the other does not know
            are left out.
        target: To write.

    Raises:
        DataError: The archive is damaged, or holds no such files.
    """
    energies: dict[str, float] = {}
    molecules: dict[str, Atoms] = {}
    try:
        with tarfile.open(sources[0], "r:gz") as archive:
            for member in archive:
                path = Path(member.name)
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is not None and path.name == "hof_qm7.txt":
                    rows = [line.split() for line in stream.read().decode().splitlines()]
                    energies = {Path(row[0]).name: float(row[1]) for row in rows if row}
                elif stream is not None and path.parent.name == "qm7" and path.suffix == ".xyz":
                    molecules[path.name] = _atoms_of_xyz(stream.read().decode())
    except (tarfile.TarError, EOFError, OSError, ValueError, IndexError) as error:
        raise DataError(f"{sources[0]} cannot be read as the archive of QM7: {error}") from error
    known = sorted(set(molecules) & set(energies))
    if not known:
        raise DataError(f"{sources[0]} holds no molecule with an energy; it is not QM7's archive")
    with target.open("w", encoding="utf-8") as out:
        for name in known:
            atoms = molecules[name]
            atoms.info["qm7_file"] = name
            energy = round(energies[name] * KCAL_PER_MOL, 6)
            atoms.calc = SinglePointCalculator(atoms, energy=energy)
            write_extxyz(out, [atoms])


def _atoms_of_xyz(text: str) -> Atoms:
    lines = text.splitlines()
    rows = [line.split() for line in lines[2 : 2 + int(lines[0])]]
    return Atoms([row[0] for row in rows], [[float(x) for x in row[1:4]] for row in rows])
