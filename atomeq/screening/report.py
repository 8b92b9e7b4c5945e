"""The report: one HTML file that needs no network, with plots, the best structures and failures.

All names come from files of strangers: they are data in the page, set as text by its script, and
the page forbids itself to load or send anything. What is drawn is in report.html beside this file.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols, covalent_radii
from ase.data.colors import jmol_colors

from atomeq.files import write_atomically
from atomeq.screening.ranking import best_rows
from atomeq.screening.results import read_rows, read_run
from atomeq.screening.rows import STATUSES, Row, structure_of
from atomeq.screening.steps import Rank, parse_steps

_BINS = 40
_POINTS = 1500  # of a scatter plot; more would only be black
_LARGEST = 2000  # atoms that the viewer draws
_SHOWN = (
    "formula",
    "n_atoms",
    "energy_per_atom",
    "energy_above_hull",
    "formation_energy",
    "adsorption_energy",
    "max_force",
    "converged",
    "n_steps",
    "energy_std",
    "force_std",
    "volume",
    "density",
    "space_group",
    "locator",
)
_UNITS = {
    "energy": "eV",
    "energy_per_atom": "eV per atom",
    "energy_above_hull": "eV per atom",
    "formation_energy": "eV per atom",
    "adsorption_energy": "eV",
    "max_force": "eV/Å",
    "volume": "Å³",
    "density": "g/cm³",
}


def write_report(folder: Path) -> Path:
    """Write ``report.html`` of the run in a folder, from its results alone.

    Returns:
        The file.
    """
    run = read_run(folder)
    steps = parse_steps(run["provenance"]["settings"]["steps"])
    rank = next((step for step in steps if isinstance(step, Rank)), Rank())
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    text = json.dumps(_document(folder, run["provenance"], rank), allow_nan=False)
    # Nothing in a name may end the script element that holds it.
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    path = folder / "report.html"
    with write_atomically(path) as partial:
        partial.write_text(template.replace("@DATA@", text), encoding="utf-8")
    return path


def _document(folder: Path, provenance: dict[str, Any], rank: Rank) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    failures: dict[tuple[str, str], list[Any]] = {}
    for row in read_rows(folder, ["status", "kind", "stage", "locator", "reason"]):
        counts[row["status"]] += 1
        if row["status"] == "failed":
            key = (row["kind"] or "", row["stage"] or "")
            failures.setdefault(key, [0, row["locator"], row["reason"]])[0] += 1
    best = best_rows(folder, rank)
    columns = [name for name in _SHOWN if any(row[name] is not None for row in best)]
    direction = "largest" if rank.descending else "smallest"
    return {
        "lead": f"{counts.total():,} structures with {provenance['potential']['name']}, "
        f"{provenance['dtype']} on {provenance['device']}; settings {provenance['settings_hash']}",
        "counts": [(status, counts[status]) for status in STATUSES],
        "plots": list(_plots(folder, rank.by)),
        "best_title": f"Best {len(best)} by {rank.by.replace('_', ' ')}, {direction} first",
        "columns": columns,
        "best": [_entry(row, columns) for row in best],
        "failures": [
            [kind, stage, number, locator, reason]
            for (kind, stage), (number, locator, reason) in sorted(
                failures.items(), key=lambda item: -item[1][0]
            )
        ],
        "provenance": provenance,
    }


def _plots(folder: Path, by: str) -> Iterator[dict[str, Any]]:
    names = list(dict.fromkeys([by, "energy_per_atom", "max_force", "n_steps", "volume"]))
    rows = read_rows(folder, ["status", "n_atoms", *names])
    done = [
        [math.nan if row[name] is None else float(row[name]) for name in (*names, "n_atoms")]
        for row in rows
        if row["status"] == "done"
    ]
    table = np.array(done, dtype=np.float64).reshape(-1, len(names) + 1)
    for name in dict.fromkeys([by, "energy_per_atom", "n_steps"]):
        yield from _histogram(name, table[:, names.index(name)])
    per_atom = table[:, names.index("volume")] / table[:, -1]
    points = np.stack([per_atom, table[:, names.index("energy_per_atom")]], axis=1)
    points = points[np.isfinite(points).all(axis=1)]
    if len(points) > 1:
        chosen = points[:: max(1, len(points) // _POINTS)]
        yield {
            "caption": "Energy per atom (eV) over volume per atom",
            "label": "Å³ per atom",
            "points": [[round(float(x), 5), round(float(y), 5)] for x, y in chosen],
        }


def _histogram(name: str, values: np.ndarray) -> Iterator[dict[str, Any]]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return
    low, high = float(finite.min()), float(finite.max())
    margin = max(1e-6, 1e-6 * abs(low)) if high - low < 1e-6 * max(1.0, abs(low)) else 0.0
    counts, edges = np.histogram(finite, bins=_BINS, range=(low - margin, high + margin))
    words = name.replace("_", " ")
    yield {
        "caption": f"Structures by {words}",
        "label": f"{words} / {_UNITS[name]}" if name in _UNITS else words,
        "counts": counts.tolist(),
        "low": float(edges[0]),
        "high": float(edges[-1]),
    }


def _entry(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    shown = {name: _finite(row[name]) for name in (*columns, "formula", "locator")}
    return {**shown, "view": _view(row)}


def _view(row: Row) -> dict[str, Any]:
    """Return what the viewer draws: atoms in the cell, the colours and radii of elements."""
    atoms = structure_of(row)
    assert atoms is not None  # a row that is done has a structure
    if atoms.pbc.any():
        atoms.wrap(eps=1e-6)
    numbers = atoms.numbers[:_LARGEST].tolist()
    elements = {
        chemical_symbols[z]: {
            "color": "#" + "".join(f"{round(255 * part):02x}" for part in jmol_colors[z]),
            "radius": float(covalent_radii[z]),
        }
        for z in set(numbers)
    }
    return {
        "positions": np.round(atoms.positions[:_LARGEST], 3).tolist(),
        "kinds": [chemical_symbols[z] for z in numbers],
        "elements": elements,
        "cell": np.round(atoms.cell.array, 3).tolist() if atoms.cell.rank == 3 else None,
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
