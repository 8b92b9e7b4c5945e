"""Molecules as RDKit knows them become Atoms: from SDF files, and from tables of SMILES.

Hyperedges are those of the sanitised molecule and stand in ``atoms.info``, so nothing is perceived
from coordinates where bonds are given. All numbers of a table are labels, named by their column.
"""

import csv
import gzip
import io
import logging
import math
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from ase import Atoms

from atomeq.data.ase_files import DataError
from atomeq.graph.hyperedges import INFO_KEY, hyperedges_of
from atomeq.graph.perception import import_chem

logger = logging.getLogger(__name__)

#: Å between the atoms of a molecule without coordinates: beyond the cutoff of any model.
NO_GEOMETRY = 100.0
_SMILES = ("smiles", "smile")
_BLOCK = "mol"
#: What published tables call a property that has another name here.
_NAMES = {"homolumogap": "gap"}


def atoms_of_molecule(molecule: Any, labels: Mapping[str, float], *, name: str) -> Atoms:
    """Return the atoms, hydrogen included, of an RDKit molecule with its hyperedges and labels.

    Args:
        molecule: ``rdkit.Chem.Mol``, sanitised. Without a conformer its atoms stand 100 Å apart, so
            that no model sees a geometry which nobody computed.
        labels: For ``atoms.info``.
        name: Of the molecule, for messages.

    Raises:
        DataError: It has no atoms, or RDKit cannot find its hyperedges.
    """
    if molecule is None or not molecule.GetNumAtoms():
        raise DataError(f"{name}: RDKit makes no molecule of it")
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    if molecule.GetNumConformers():
        positions = np.asarray(molecule.GetConformer().GetPositions())
    else:
        positions = np.arange(len(numbers))[:, None] * np.array([NO_GEOMETRY, 0.0, 0.0])
    try:
        found = hyperedges_of(molecule)
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error
    hyperedges = {"members": [list(m) for m in found.members], "types": list(found.types)}
    return Atoms(numbers, positions, info={**labels, INFO_KEY: hyperedges})


def atoms_of_block(block: str, labels: Mapping[str, float], *, name: str) -> Atoms:
    """Return the atoms of a MOL block with coordinates, hydrogen explicit.

    Bonds that make no chemical sense, as some in QM9's SDF do, are left out, and graphs perceive
    the hyperedges from the coordinates.

    Raises:
        DataError: RDKit cannot read it.
    """
    molecule = import_chem().MolFromMolBlock(block, sanitize=False, removeHs=False)
    try:
        return atoms_of_molecule(_sanitised(molecule, name), labels, name=name)
    except DataError as error:
        if molecule is None or not molecule.GetNumAtoms():
            raise
        logger.info("%s; its hyperedges are perceived from the coordinates", error)
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    return Atoms(numbers, molecule.GetConformer().GetPositions(), info=dict(labels))


def molecule_of_smiles(smiles: str, *, name: str) -> Any:
    """Return the molecule of SMILES with all its hydrogen.

    Raises:
        DataError: RDKit cannot read it, or it makes no chemical sense.
    """
    chem = import_chem()
    return chem.AddHs(_sanitised(chem.MolFromSmiles(smiles, sanitize=False), name))


def read_table(path: Path) -> Iterator[Atoms]:
    """Yield the molecules of a table of comma-separated values.

    One column holds SMILES (``smiles``, ``smile``) or MOL blocks with coordinates (``mol``), which
    are preferred; every column of numbers is a label. An empty cell is a label nobody knows.

    Raises:
        DataError: There is no such column, or a molecule makes no sense.
    """
    for k, row in enumerate(rows_of(path)):
        name = f"{path}, row {k}"
        block = row.pop(_BLOCK, None)
        given = [row.pop(key) for key in _SMILES if key in row]
        if block:
            yield atoms_of_block(block, numbers_in(row), name=name)
        elif given:
            molecule = molecule_of_smiles(given[0], name=name)
            yield atoms_of_molecule(molecule, numbers_in(row), name=name)
        else:
            raise DataError(f"{path} has neither a column {_SMILES[0]!r} nor {_BLOCK!r}")


def rows_of(path: Path) -> Iterator[dict[str, str]]:
    """Yield the rows of a table by the names of its columns; it may be compressed.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with text_of(path) as stream:
            yield from csv.DictReader(stream)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a table: {error}") from error


def numbers_in(row: Mapping[str, str | None]) -> dict[str, float]:
    """Return the finite numbers of a row by name; empty cells and words are left out."""
    labels = {}
    for column, text in row.items():
        try:
            value = float(text or "nan")
        except ValueError:
            continue
        if column and math.isfinite(value):
            labels[_NAMES.get(column, column)] = value
    return labels


def read_sdf(path: Path) -> Iterator[tuple[str, str]]:
    """Yield title and MOL block of each molecule of an SDF file, plain, .gz or .tar.gz.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with text_of(path) as stream:
            lines: list[str] = []
            for line in stream:
                if line.startswith("$$$$"):
                    yield lines[0].strip() if lines else "", "".join(lines)
                    lines = []
                else:
                    lines.append(line)
            if "".join(lines).strip():
                raise DataError(f"{path} ends within a molecule: it was cut short")
    except (OSError, EOFError, UnicodeDecodeError, tarfile.TarError) as error:
        raise DataError(f"{path} cannot be read as SDF: {error}") from error


@contextmanager
def text_of(path: Path) -> Iterator[IO[str]]:
    """Open a text file: plain, .gz, or the only file of a .tar.gz."""
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path, "r:gz") as archive:
            member = archive.next()
            raw = archive.extractfile(member) if member is not None else None
            if raw is None:
                raise DataError(f"{path} does not begin with a file")
            yield io.TextIOWrapper(raw, encoding="utf-8")
    elif path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8", newline="") as stream:
            yield stream
    else:
        with path.open(encoding="utf-8", newline="") as stream:
            yield stream


def _sanitised(molecule: Any, name: str) -> Any:
    if molecule is None:
        raise DataError(f"{name}: RDKit cannot read the molecule")
    try:
        import_chem().SanitizeMol(molecule)
    except ValueError as error:  # RDKit's own errors are ValueErrors
        raise DataError(f"{name}: the molecule makes no chemical sense: {error}") from error
    return molecule
