"""Rows: what a screening tells of one structure, as a dictionary and as a Parquet table.

Every table of a screening has the same columns, and after them those of the keys that were chosen;
what a run did not compute is null.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
from ase import Atoms

#: ``done`` went through all steps; ``failed`` is in quarantine, see reason; ``duplicate`` is a copy
#: of another row; ``filtered`` was computed and did not meet the filter.
Status: TypeAlias = Literal["done", "failed", "duplicate", "filtered"]
STATUSES: tuple[Status, ...] = ("done", "failed", "duplicate", "filtered")

Row: TypeAlias = dict[str, Any]

# Repeated in every row, and stored once per part.
_REPEATED = pa.dictionary(pa.int32(), pa.string())

SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # what the source calls it; null where it has no name
        ("hash", pa.string()),  # of the content, for a further copy of that and its place; unique
        ("locator", pa.string()),  # file#index
        ("formula", pa.string()),
        ("n_atoms", pa.int32()),
        ("status", pa.string()),
        ("stage", pa.string()),  # the step that ended it
        ("kind", pa.string()),  # the class of its reason: what failures are counted and retried by
        ("reason", pa.string()),
        ("duplicate_of", pa.string()),  # hash of the row it is a copy of
        ("energy", pa.float64()),  # eV
        ("energy_per_atom", pa.float64()),
        ("max_force", pa.float64()),  # eV/Å
        ("converged", pa.bool_()),
        ("n_steps", pa.int32()),
        ("cell_kept", pa.bool_()),  # cells were to relax, and this one cannot: see pbc
        ("energy_std", pa.float64()),  # eV per atom, over a committee
        ("force_std", pa.float64()),  # eV/Å, largest of an atom
        ("energy_uncertainty", pa.float64()),  # eV per atom, of a potential that was calibrated
        ("force_uncertainty", pa.float64()),  # eV/Å, largest of an atom
        ("volume", pa.float64()),  # Å³
        ("density", pa.float64()),  # g/cm³
        ("space_group", pa.string()),
        ("space_group_number", pa.int32()),
        ("formation_energy", pa.float64()),  # eV per atom
        ("energy_above_hull", pa.float64()),  # eV per atom
        ("adsorption_energy", pa.float64()),  # eV
        ("numbers", pa.list_(pa.int32())),
        ("positions", pa.list_(pa.float64())),  # flat, Å; of the structure as the last step left it
        ("cell", pa.list_(pa.float64(), 9)),
        ("pbc", pa.list_(pa.bool_(), 3)),
        ("settings_hash", _REPEATED),
        ("potential_sha256", _REPEATED),
        ("provenance", _REPEATED),  # JSON: potential, versions, dtype, device, settings
    ]
)

#: What filters and rankings may name.
NUMBERS = tuple(
    field.name for field in SCHEMA if pa.types.is_floating(field.type) or field.type == pa.int32()
)

_NUMBER = ":number"

METADATA_KEY = b"atomeq.screening"


def info_fields(info: Sequence[str]) -> list[pa.Field]:
    """Return the columns of chosen keys, each a text or with ``:number`` a number.

    Raises:
        ValueError: A key is empty or named twice, or rows have a column of its name.
    """
    names = [key.removesuffix(_NUMBER) for key in info]
    for name in names:
        if not name or name in SCHEMA.names or names.count(name) > 1:
            raise ValueError(
                f"{name!r} cannot be a column of its own: names must differ from each other and "
                f"from {', '.join(SCHEMA.names)}"
            )
    kinds = [pa.float64() if key.endswith(_NUMBER) else pa.string() for key in info]
    return [pa.field(name, kind) for name, kind in zip(names, kinds, strict=True)]


def schema_of(provenance: dict[str, Any]) -> pa.Schema:
    """Return the columns of a run: those of all runs, and the keys that were chosen."""
    chosen = info_fields(provenance["settings"].get("info", ()))
    return pa.schema([*SCHEMA, *chosen])


def structure_columns(atoms: Atoms) -> Row:
    """Return the columns that hold a structure, with its formula and size."""
    return {
        "formula": atoms.get_chemical_formula(),
        "n_atoms": len(atoms),
        "numbers": atoms.numbers.tolist(),
        "positions": atoms.positions.ravel().tolist(),
        "cell": atoms.cell.array.ravel().tolist(),
        "pbc": atoms.pbc.tolist(),
    }


def structure_of(row: Row) -> Atoms | None:
    """Return the structure of a row as ASE's Atoms; None where the row has none."""
    if not row.get("numbers"):
        return None
    return Atoms(
        numbers=row["numbers"],
        positions=np.reshape(row["positions"], (-1, 3)),
        cell=np.reshape(row["cell"], (3, 3)),
        pbc=row["pbc"],
    )


def as_table(rows: Sequence[Row], provenance: dict[str, Any]) -> pa.Table:
    """Make the table of a part.

    Args:
        rows: As steps made them, without provenance.
        provenance: Of the run, plain values with ``settings_hash`` and ``potential.sha256``; it
            goes into every row and into the metadata of the file.

    Raises:
        KeyError: A row has a column that tables do not have.
    """
    schema = schema_of(provenance)
    unknown = {name for row in rows for name in row} - set(schema.names)
    if unknown:
        raise KeyError(f"rows have no column {', '.join(sorted(unknown))}")
    document = json.dumps(provenance, sort_keys=True)
    same = {
        "settings_hash": provenance["settings_hash"],
        "potential_sha256": provenance["potential"]["sha256"],
        "provenance": document,
    }
    table = pa.Table.from_pylist([{**row, **same} for row in rows], schema=schema)
    return table.replace_schema_metadata({METADATA_KEY: document.encode()})
