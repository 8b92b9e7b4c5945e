"""Matbench Discovery: its initial structures through a screening, its prediction files out of it.

What the project publishes and reads, as its repository said at commit 466bdd8 and after
(``data-files.yml``, ``contributing.md``, ``discovery.py``): initial structures as ``.extxyz.zip``
or ``.jsonl.gz`` with a ``material_id`` each; computed structure entries, whose parameters and
oxidation states the MP2020 corrections ask for; elemental reference entries. It reads formation
energies from ``<date>-discovery.csv.gz`` and relaxed structures from ``<date>-geo-opt.jsonl.gz``.
The data files themselves were not at hand: names, columns and units are those of that code.
Deliberate difference: relaxations are batched, by our FIRE with the same measure of convergence.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from ase.data import chemical_symbols
from pymatgen.core import Composition, Lattice, Structure
from pymatgen.entries.compatibility import MaterialsProject2020Compatibility
from pymatgen.entries.computed_entries import ComputedStructureEntry

from atomeq.files import dated, write_gzip
from atomeq.potential.potential import Potential
from atomeq.screening.readers import open_text
from atomeq.screening.results import read_part, result_files
from atomeq.screening.rows import Row
from atomeq.screening.run import Summary, screen
from atomeq.screening.sources import Found, read_sources

ID = "material_id"
#: Columns of the discovery file; energies in eV.
COLUMNS: tuple[str, ...] = (
    ID,
    "energy",
    "corrected_energy",
    "e_form_per_atom",
    "converged",
    "n_steps",
    "error",
)

_USED = ("id", "energy", "converged", "n_steps", "reason", "numbers", "positions", "cell")
_OF_AN_ENTRY = ("oxide_type", "sulfide_type", "oxidation_states")  # of data, what corrections read
_DECIMALS = 4  # of energies, as the project writes them

Entry = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Predictions:
    """What a run has come to.

    Attributes:
        summary: Of the screening.
        missing: Structures that have no row yet, because other shards compute them.
        failed: Structures without an energy; their reasons stand in the discovery file.
        discovery: The file with formation energies; None while structures are missing.
        geometry: The file with relaxed structures; None while structures are missing.
    """

    summary: Summary
    missing: int
    failed: int = 0
    discovery: Path | None = None
    geometry: Path | None = None


def predict_matbench_discovery(
    structures: str | Path,
    potential: str | Path | Potential,
    *,
    out: str | Path,
    entries: str | Path,
    references: str | Path,
    fmax: float = 0.05,
    max_steps: int = 500,
    **screening: Any,
) -> Predictions:
    """Relax the initial structures of Matbench Discovery and write its prediction files.

    Called again with the same folder it goes on where it was ended, and writes the same files.

    Args:
        structures: Initial structures, ``*-wbm-initial-atoms.extxyz.zip`` or
            ``*-wbm-init-structs.jsonl.gz``, or a part of them in any format that is read.
        potential: Name or folder, or a potential; its energies are those of the Materials Project
            before corrections.
        out: Folder of the screening and of the two files.
        entries: ``*-wbm-computed-structure-entries.jsonl.gz``.
        references: ``*-mp-elemental-reference-entries.json.gz``.
        fmax: eV/Å, as ASE's FrechetCellFilter counts.
        max_steps: After which a structure is left as it is, ``converged`` false.
        **screening: As :func:`~atomeq.screening.run.screen` takes them: engine, workers, shard ...

    Returns:
        Where the files are, and how many structures have predictions.

    Raises:
        ValueError: A file is not what it should be, a structure has no or another's id, or the
            folder holds results of other structures or settings.

    Example:
        >>> predict_matbench_discovery(  # doctest: +SKIP
        ...     "wbm-initial-atoms.extxyz.zip", "mp-pbe", out="mbd",
        ...     entries="wbm-computed-structure-entries.jsonl.gz",
        ...     references="mp-elemental-reference-entries.json.gz",
        ... )
    """
    energies = read_reference_energies(references)
    given: dict[str, None] = {}  # ids in their order
    folder = Path(out)
    summary = screen(
        _identified(read_sources([structures]), given),
        potential,
        out=folder,
        steps=["validate", {"relax": {"cell": True, "fmax": fmax, "max_steps": max_steps}}],
        id_key=ID,
        **screening,
    )
    rows = _rows_in_order(folder, list(given))
    if missing := len(given) - len(rows):
        return Predictions(summary, missing)
    kept = read_entries(entries, {row["id"] for row in _each(rows) if row["energy"] is not None})
    discovery = dated(folder, "discovery.csv.gz")
    geometry = dated(folder, "geo-opt.jsonl.gz")
    failed = 0
    with write_gzip(discovery) as table, write_gzip(geometry) as lines:
        writer = csv.DictWriter(table, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for row in _each(rows):
            prediction, relaxed = _predict(row, kept, energies)
            writer.writerow(prediction)
            failed += relaxed is None
            if relaxed is not None:
                lines.write(json.dumps(relaxed, allow_nan=False) + "\n")
    return Predictions(summary, 0, failed, discovery, geometry)


def read_reference_energies(path: str | Path) -> dict[str, float]:
    """Return the energy per atom of each element's reference, eV.

    Args:
        path: JSON of computed entries by symbol, as the project publishes it.

    Raises:
        ValueError: It is something else.
    """
    try:
        with open_text(Path(path)) as stream:
            document = json.load(stream)
        # As the project rounds them; corrected energies, which differ for no element so far.
        return {
            symbol: round(
                (entry["energy"] + entry.get("correction", 0.0))
                / Composition(entry["composition"]).num_atoms,
                _DECIMALS,
            )
            for symbol, entry in document.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no elemental reference entries by symbol ({error}); give "
            "mp-elemental-reference-entries.json.gz"
        ) from error


def read_entries(path: str | Path, ids: set[str]) -> Entry:
    """Return what corrections ask of computed entries, by id, as plain values.

    Args:
        path: JSON lines with ``material_id`` and ``computed_structure_entry``.
        ids: Which.

    Raises:
        ValueError: It is something else, or has no entry of an id.
    """
    found: Entry = {}
    with open_text(Path(path)) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                document = json.loads(line)
                entry = document["computed_structure_entry"]
                if document[ID] in ids:
                    data = {key: entry["data"][key] for key in _OF_AN_ENTRY if key in entry["data"]}
                    found[document[ID]] = {"parameters": entry["parameters"], "data": data}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} is no computed structure entry ({error!r}); give "
                    "wbm-computed-structure-entries.jsonl.gz"
                ) from error
    if absent := sorted(ids - found.keys()):
        raise ValueError(
            f"{path} has no entry of {len(absent)} structures, such as {absent[0]}; give the file "
            "that belongs to the structures"
        )
    return found


def _identified(found: Iterable[Found], given: dict[str, None]) -> Iterator[Found]:
    """Pass structures on and take down their ids, each of which stands once."""
    for item in found:
        identifier = item.about.get(ID)
        if identifier is None:
            raise ValueError(
                f"{item.locator} has no {ID}{': ' + item.error if item.error else ''}; give a file "
                "of the project, or a part of one"
            )
        if str(identifier) in given:
            raise ValueError(f"{item.locator}: {ID} {identifier} stands twice; leave one out")
        given[str(identifier)] = None
        yield item


def _rows_in_order(folder: Path, given: list[str]) -> pa.Table:
    """Return the rows of the given ids in their order; those that are not there yet are left out.

    Raises:
        ValueError: There are rows of other ids, or two of one.
    """
    parts = [read_part(path, list(_USED)) for path in result_files(folder)]
    table = pa.concat_tables(parts) if parts else pa.table({name: [] for name in _USED})
    places: dict[str, int] = {}
    for place, identifier in enumerate(table["id"].to_pylist()):
        if identifier in places:
            raise ValueError(
                f"{folder} holds two rows of {identifier}: its structures came from two different "
                "files; name another folder"
            )
        places[identifier] = place
    if foreign := sorted(map(str, places.keys() - set(given))):
        raise ValueError(
            f"{folder} holds {len(foreign)} structures that were not given now, such as "
            f"{foreign[0]}; give the same file again, or name another folder"
        )
    order = [places[identifier] for identifier in given if identifier in places]
    return table.take(pa.array(order, pa.int64()))


def _each(table: pa.Table) -> Iterator[Row]:
    for batch in table.to_batches(max_chunksize=1000):
        yield from batch.to_pylist()


def _predict(
    row: Row, entries: Entry, references: dict[str, float]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the lines of a row in the two files; the second is None where it has no energy."""
    identifier, energy = row["id"], row["energy"]
    relaxation = {"converged": bool(row["converged"]), "n_steps": row["n_steps"] or 0}
    if energy is None:
        return {ID: identifier, **relaxation, "error": row["reason"]}, None
    structure = Structure(
        Lattice(row["cell"]),
        [chemical_symbols[number] for number in row["numbers"]],
        [row["positions"][k : k + 3] for k in range(0, len(row["positions"]), 3)],
        coords_are_cartesian=True,
    )
    corrected = _corrected(identifier, structure, energy, entries[identifier])
    composition = structure.composition.get_el_amt_dict()
    if unknown := sorted(composition.keys() - references.keys()):
        raise ValueError(
            f"{identifier}: there is no elemental reference of {', '.join(unknown)}; give the "
            "whole mp-elemental-reference-entries.json.gz"
        )
    formation = corrected - sum(n * references[symbol] for symbol, n in composition.items())
    prediction = {
        ID: identifier,
        "energy": round(energy, _DECIMALS),
        "corrected_energy": round(corrected, _DECIMALS),
        "e_form_per_atom": round(formation / len(structure), _DECIMALS),
        **relaxation,
    }
    relaxed = {ID: identifier, "structure": structure.as_dict(), "energy": energy, **relaxation}
    return prediction, relaxed


def _corrected(identifier: str, structure: Structure, energy: float, entry: dict) -> float:
    """Return the energy after the Materials Project's corrections of 2020, eV."""
    computed = ComputedStructureEntry(structure, energy, entry_id=identifier, **entry)
    processed = _scheme().process_entries([computed], clean=True)
    if not processed:
        raise ValueError(
            f"{identifier}: the MP2020 corrections refuse its computed structure entry; take it "
            "from the project's file as it is"
        )
    return float(processed[0].energy)


@cache
def _scheme() -> MaterialsProject2020Compatibility:
    return MaterialsProject2020Compatibility()  # reads its numbers from a file
