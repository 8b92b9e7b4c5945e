"""Exports: results as an ASE database and as a dataset of the chemiscope viewer."""

import contextlib
import gzip
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.db
from ase.calculators.singlepoint import SinglePointCalculator

from atomeq.files import refuse_unwritable, write_atomically
from atomeq.screening.results import read_rows, read_run
from atomeq.screening.rows import NUMBERS, SCHEMA, Row, structure_of

_GROUP = 500  # rows in a transaction
_TEXTS = ("id", "hash", "locator", "space_group", "potential_sha256", "settings_hash")


def export_database(folder: Path, path: Path) -> int:
    """Write the rows that are done as an ASE database, with their numbers as key-value pairs.

    Returns:
        How many.
    """
    refuse_unwritable(path)
    growing = path.with_name(f".{path.stem}-{os.getpid()}.db")
    count = 0
    try:
        database: Any = ase.db.connect(growing, type="db")  # untyped: it has __enter__
        rows = _done(folder)
        while group := list(itertools.islice(rows, _GROUP)):
            with database:
                for row in group:
                    _write(database, row)
            count += len(group)
        os.replace(growing, path)
    finally:
        growing.unlink(missing_ok=True)
    return count


def export_chemiscope(folder: Path, path: Path) -> int:
    """Write the rows that are done as chemiscope's JSON; ``.gz`` compresses it.

    Returns:
        How many.
    """
    refuse_unwritable(path)
    rows = list(_done(folder))
    provenance = read_run(folder)["provenance"]
    properties: dict[str, Any] = {}
    for name in NUMBERS:
        values = [row[name] for row in rows]
        if rows and all(value is not None for value in values):
            properties[name] = {"target": "structure", "values": values}
    properties["locator"] = {"target": "structure", "values": [row["locator"] for row in rows]}
    document = {
        "meta": {
            "name": "atomeq screening",
            "description": f"potential {provenance['potential']['name']}, SHA-256 "
            f"{provenance['potential']['sha256']}",
        },
        "structures": [_chemiscope_structure(row) for row in rows],
        "properties": properties,
    }
    text = json.dumps(document, allow_nan=False)
    with write_atomically(path) as partial:
        data = text.encode()
        partial.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return len(rows)


def _done(folder: Path) -> Iterator[Row]:
    return (row for row in read_rows(folder) if row["status"] == "done")


def _write(database: Any, row: Row) -> None:
    atoms = structure_of(row)
    assert atoms is not None  # a row that is done has a structure
    pairs: dict[str, Any] = {
        name: row[name]
        for name in NUMBERS
        if row[name] is not None and name not in ("energy", "volume", "n_atoms")
    }
    chosen = row.keys() - set(SCHEMA.names)  # keys of the source
    texts = {name: row[name] for name in (*_TEXTS, *chosen) if row[name] is not None}
    for name, text in texts.items():
        pairs["screening_" + re.sub(r"\W", "_", name)] = _value(text)
    if row["energy"] is not None:
        atoms.calc = SinglePointCalculator(atoms, energy=row["energy"])
    database.write(atoms, key_value_pairs=pairs)


def _value(value: Any) -> Any:
    """Return a number for a text that reads as one, which ASE's database refuses."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value) if isinstance(value, str) else value
    return value


def _chemiscope_structure(row: Row) -> dict[str, Any]:
    atoms = structure_of(row)
    assert atoms is not None  # a row that is done has a structure
    x, y, z = atoms.positions.T.tolist()
    structure: dict[str, Any] = {
        "size": len(atoms),
        "names": atoms.get_chemical_symbols(),
        "x": x,
        "y": y,
        "z": z,
    }
    if atoms.cell.rank == 3:
        structure["cell"] = atoms.cell.array.ravel().tolist()
    return structure
