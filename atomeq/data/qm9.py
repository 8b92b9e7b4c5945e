"""QM9 as it is published: the archive of xyz files, MoleculeNet's SDF and table, PyG's files.

Ramakrishnan, Dral, Rupp and von Lilienfeld, Sci. Data 1, 140022 (2014). Labels leave in the units
of :data:`~atomeq.data.targets.TARGETS`: energies in eV where the files have Hartree. Molecules that
the authors could not characterise, 3,054 of 133,885, are left out where a file still holds them.
"""

import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from torch_geometric.data import Data

from atomeq.data.ase_files import DataError
from atomeq.data.molecules import atoms_of_block, read_sdf, rows_of
from atomeq.units import HARTREE

UNCHARACTERIZED = "uncharacterized.txt"
#: The twelve targets, in PyG's order.
TARGET_NAMES = (
    "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "U0", "U", "H", "G", "Cv"
)  # fmt: skip
_IN_HARTREE = {"homo", "lumo", "gap", "zpve", "U0", "U", "H", "G"}
# The second line of a raw file: "gdb", the number of the molecule, then these.
_RAW_NAMES: tuple[str, ...] = ("A", "B", "C", *TARGET_NAMES[:5], "r2", *TARGET_NAMES[6:])
_TABLE_NAMES = {"u0": "U0", "u298": "U", "h298": "H", "g298": "G", "cv": "Cv"}


def read_raw(path: Path) -> Iterator[Atoms]:
    """Yield the molecules of ``dsgdb9nsd.xyz.tar.bz2``, or of one file out of it.

    Args:
        path: Of the archive or of a file of it.

    Raises:
        DataError: A file is damaged, or ``uncharacterized.txt`` is missing beside the archive.
    """
    if path.suffix == ".xyz":
        yield parse_raw(path.read_text(encoding="utf-8"), name=str(path))[1]
        return
    excluded = read_excluded(path.parent)
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is None:
                    continue
                name = f"{path}, {member.name}"
                number, atoms = parse_raw(stream.read().decode("utf-8"), name=name)
                if number not in excluded:
                    yield atoms
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as an archive of QM9: {error}") from error


def parse_raw(text: str, *, name: str) -> tuple[int, Atoms]:
    """Return the number of a molecule and its atoms with labels, from the text of its raw file.

    Raises:
        DataError: It is not in QM9's form.
    """
    lines = text.splitlines()
    try:
        n_atoms = int(lines[0])
        _, number, *values = lines[1].split()
        labels = dict(zip(_RAW_NAMES, map(_number, values), strict=True))
        rows = [line.split() for line in lines[2 : 2 + n_atoms]]
        symbols = [row[0] for row in rows]
        positions = np.array([[_number(x) for x in row[1:4]] for row in rows])
        if len(rows) != n_atoms or positions.shape != (n_atoms, 3):
            raise ValueError(f"{n_atoms} atoms are announced")
        atoms = Atoms(symbols, positions, info=_in_our_units(labels))
        return int(number), atoms
    except (ValueError, IndexError, KeyError) as error:
        raise DataError(f"{name} is not in the form of QM9: {error}") from error


def read_moleculenet(path: Path) -> Iterator[Atoms]:
    """Yield the molecules of ``gdb9.sdf``, whose labels are in ``gdb9.sdf.csv`` beside it.

    Args:
        path: Of the SDF.

    Raises:
        DataError: The table or ``uncharacterized.txt`` is missing, or does not fit.
    """
    excluded = read_excluded(path.parent)
    table = rows_of(path.with_name(f"{path.name}.csv"))
    for k, (title, block) in enumerate(read_sdf(path)):
        row = next(table, None)
        if row is None or row.get("mol_id") != title:
            found = "nothing" if row is None else row.get("mol_id")
            raise DataError(f"{path}, molecule {k} is {title!r}, but its table has {found!r}")
        if k + 1 in excluded:
            continue
        values = {_TABLE_NAMES.get(key, key): text for key, text in row.items()}
        labels = _in_our_units({key: float(values[key]) for key in _RAW_NAMES})
        name = f"{path}, {title}"
        yield atoms_of_block(block, labels, name=name)


def read_pyg(path: Path) -> Iterator[Atoms]:
    """Yield the molecules of PyG's ``qm9_v3.pt`` or of its processed ``data_v3.pt``.

    Nothing in the file is executed. PyG keeps labels in float32, in which the total energies U0 to
    G are exact to 1 meV only; the raw files have them in full.

    Args:
        path: Of the ``.pt`` file.

    Raises:
        DataError: The file is damaged or of another form.
    """
    try:
        with torch.serialization.safe_globals([Data]):  # the processed file names its class
            content = torch.load(path, map_location="cpu", weights_only=True)
        for z, pos, y in _pyg_molecules(content):
            labels = dict(zip(TARGET_NAMES, y.flatten().tolist(), strict=False))
            yield Atoms(z.numpy(), pos.to(torch.float64).numpy(), info=labels)
    except (UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a file of PyG's QM9: {error}") from error


def read_excluded(folder: Path) -> frozenset[int]:
    """Return the numbers, from 1, of the molecules that ``uncharacterized.txt`` lists.

    Raises:
        DataError: There is no such file, or it does not hold as many as it says.
    """
    path = folder / UNCHARACTERIZED
    if not path.is_file():
        raise DataError(
            f"{path} is missing, the list of molecules to leave out; fetch it with "
            "`atomeq data download qm9`"
        )
    rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    listed = [int(row[0]) for row in rows if len(row) > 2 and row[0].isdigit()]
    counts = [int(row[0]) for row in rows if len(row) == 2 and row[1] == "compounds"]
    if not listed or (counts and counts[0] != len(listed)):
        raise DataError(f"{path} lists {len(listed)} molecules and announces {counts}")
    return frozenset(listed)


def _pyg_molecules(content: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    if isinstance(content, Sequence) and not isinstance(content, tuple):
        for molecule in content:
            z = molecule.get("z")
            # The sixth column of the features is the element.
            z = molecule["x"][:, 5].to(torch.int64) if z is None else z
            yield z, molecule["pos"], molecule["y"]
        return
    fields, slices, *_ = content
    for k in range(len(slices["z"]) - 1):
        z, pos, y = (fields[key][slices[key][k] : slices[key][k + 1]] for key in ("z", "pos", "y"))
        yield z, pos, y


def _in_our_units(labels: dict[str, float]) -> dict[str, float]:
    return {key: value * (HARTREE if key in _IN_HARTREE else 1.0) for key, value in labels.items()}


def _number(text: str) -> float:
    # Mathematica wrote some of them: 1.5*^-6.
    return float(text.replace("*^", "e"))
