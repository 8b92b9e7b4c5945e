"""The report: one HTML file that needs no network, with plots, the best structures and failures.

All names come from files of strangers: they are data in the page, set as text by its script, and
the page forbids itself to load or send anything. What is drawn is in report.html beside this file.
"""

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from ase.data.colors import jmol_colors
from numpy.typing import NDArray

from atomeq.files import write_atomically
from atomeq.screening.plots import UNITS, plots, words
from atomeq.screening.ranking import best_rows
from atomeq.screening.results import read_rows, read_run
from atomeq.screening.rows import STATUSES, Row, structure_of
from atomeq.screening.steps import Rank, parse_steps

_LARGEST = 2000  # atoms that the viewer draws
_COUNTED = ["status", "kind", "stage", "locator", "reason", "converged", "cell_kept"]
_EXAMPLES = 3  # of every kind of failure
_EDGE = (
    1e-3  # of a lattice vector; atoms so near a face of the cell are drawn on the opposite one too
)

#: Columns of the table, with the digits after the point; None for whole numbers and texts.
_SHOWN: dict[str, int | None] = {
    "id": None,
    "formula": None,
    "n_atoms": None,
    "energy_per_atom": 4,
    "energy_above_hull": 4,
    "formation_energy": 4,
    "adsorption_energy": 4,
    "max_force": 4,
    "converged": None,
    "n_steps": None,
    "energy_std": 4,
    "force_std": 4,
    "energy_uncertainty": 4,
    "force_uncertainty": 4,
    "volume": 2,
    "density": 3,
    "space_group": None,
    "locator": None,
}
_TEXTS = ("id", "formula", "space_group", "locator")


def write_report(folder: Path, best: list[Row] | None = None) -> Path:
    """Write ``report.html`` of the run in a folder, from its results alone.

    Args:
        folder: Of the run.
        best: The first rows of its ranking, where they are known already.

    Returns:
        The file.
    """
    run = read_run(folder)
    steps = parse_steps(run["provenance"]["settings"]["steps"])
    best = best_rows(folder, steps) if best is None else best
    rank = next((step for step in steps if isinstance(step, Rank)), Rank())
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    text = json.dumps(_document(folder, run["provenance"], rank, best), allow_nan=False)
    # Nothing in a name may end the script element that holds it.
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    path = folder / "report.html"
    with write_atomically(path) as partial:
        partial.write_text(template.replace("@DATA@", text), encoding="utf-8")
    return path


def _document(
    folder: Path, provenance: dict[str, Any], rank: Rank, best: list[Row]
) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    failures: dict[tuple[str, str], dict[str, Any]] = {}
    for row in read_rows(folder, _COUNTED):
        counts[row["status"]] += 1
        counts["cell kept"] += row["status"] == "done" and row["cell_kept"] is True
        counts["not converged"] += row["status"] == "done" and row["converged"] is False
        if row["status"] == "failed":
            kind, stage = row["kind"] or "", row["stage"] or ""
            new = {"kind": kind, "stage": stage, "count": 0, "examples": []}
            failure = failures.setdefault((kind, stage), new)
            failure["count"] += 1
            if failure["count"] <= _EXAMPLES:
                failure["examples"].append((row["locator"], row["reason"]))
    columns = [name for name in _SHOWN if any(row[name] is not None for row in best)]
    if best and all(row["id"] for row in best):
        columns.remove("locator")  # the viewer names it, and two long names have no room here
    direction = "largest" if rank.descending else "smallest"
    title = f"Best {len(best)} by {words(rank.by)}, {direction} first"
    if not best:
        title = f"Nothing to rank: no structure that is done has a value of {words(rank.by)}"
    total = sum(counts[status] for status in STATUSES)
    kinds = ",".join(dict.fromkeys(kind for kind, _ in failures if kind))
    return {
        "lead": f"{total:,} structures with {provenance['potential']['name']}, "
        f"{provenance['dtype']} on {provenance['device']}",
        "counts": [
            *((status, counts[status], status == "failed") for status in STATUSES),
            ("done, but not converged", counts["not converged"], True),
            *([("done, cell kept", counts["cell kept"], True)] if counts["cell kept"] else []),
        ],
        "plots": list(plots(folder, rank.by)),
        "best_title": title,
        "columns": [
            {
                "name": name,
                "unit": UNITS.get(name, ""),
                "digits": _SHOWN[name],
                "text": name in _TEXTS,
            }
            for name in columns
        ],
        "best": [_entry(row, columns) for row in best],
        "failures": sorted(failures.values(), key=lambda failure: -failure["count"]),
        "retry": f"atomeq screen --out {shlex.quote(folder.name)} --resume --retry {kinds}",
        "provenance": list(_provenance(provenance)),
        "settings": provenance,
    }


def _provenance(provenance: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what the numbers depend on, a name and a text each."""
    yield "potential", f"{provenance['potential']['name']}"
    yield "its SHA-256", provenance["potential"]["sha256"]
    yield "computed in", f"{provenance['dtype']} on {provenance['device']}"
    for step in provenance["settings"]["steps"]:
        ((name, options),) = step.items()
        given = ", ".join(
            f"{option.replace('_', ' ')} {_plain(value)}"
            for option, value in options.items()
            if value not in (None, {}, [])
        )
        yield f"step {name.replace('_', ' ')}", given or "no options"
    yield "versions", ", ".join(f"{name} {text}" for name, text in provenance["versions"].items())
    yield "settings hash", provenance["settings_hash"]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value)


def _entry(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    shown = {name: _finite(row[name]) for name in (*columns, "id", "formula", "locator")}
    return {**shown, "view": _view(row)}


def _view(row: Row) -> dict[str, Any]:
    """Return what the viewer draws: atoms in the cell, the colours and radii of elements."""
    atoms = structure_of(row)
    assert atoms is not None  # a row that is done has a structure
    numbers, positions = _closed(atoms) if atoms.pbc.any() else (atoms.numbers, atoms.positions)
    numbers = numbers[:_LARGEST].tolist()
    elements = {
        chemical_symbols[z]: {
            "color": "#" + "".join(f"{round(255 * part):02x}" for part in jmol_colors[z]),
            "radius": float(covalent_radii[z]),
        }
        for z in sorted(set(numbers))
    }
    return {
        "positions": np.round(positions[:_LARGEST], 3).tolist(),
        "kinds": [chemical_symbols[z] for z in numbers],
        "elements": elements,
        "cell": np.round(atoms.cell.array, 3).tolist() if atoms.cell.rank == 3 else None,
    }


def _closed(atoms: Atoms) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return numbers and positions in the cell, of atoms on its faces on the opposite ones too."""
    atoms.wrap(eps=_EDGE)
    numbers, positions = atoms.numbers, atoms.positions
    scaled = atoms.get_scaled_positions(wrap=False)
    for axis in np.flatnonzero(atoms.pbc):
        images = np.flatnonzero(np.abs(scaled[:, axis]) < _EDGE)
        numbers = np.concatenate((numbers, numbers[images]))
        positions = np.concatenate((positions, positions[images] + atoms.cell.array[axis]))
        scaled = np.concatenate((scaled, scaled[images] + np.eye(3)[axis]))
    return numbers, positions


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
