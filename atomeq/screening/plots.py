"""Plots of the report, as numbers: part by part, so that millions of rows need no memory.

What is drawn of them is in report.html beside this file.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from atomeq.screening.results import read_part, result_files

UNITS = {
    "energy": "eV",
    "energy_per_atom": "eV per atom",
    "energy_above_hull": "eV per atom",
    "formation_energy": "eV per atom",
    "adsorption_energy": "eV",
    "energy_std": "eV per atom",
    "max_force": "eV/Å",
    "force_std": "eV/Å",
    "energy_uncertainty": "eV per atom",
    "force_uncertainty": "eV/Å",
    "volume": "Å³",
    "density": "g/cm³",
}

_HISTOGRAMS = ("n_steps", "energy_per_atom", "volume")  # beside the column that ranks, the first
_BINS = 40
_POINTS = 1500  # of a scatter plot; more would only be black
_GROUPS = 6  # formulas with a colour of their own; people tell no more colours apart


def plots(folder: Path, by: str) -> Iterator[dict[str, Any]]:
    """Yield what the report plots of the rows that are done.

    Args:
        folder: Of the run.
        by: The column that ranks.
    """
    limits = _limits(folder, list(dict.fromkeys([by, *_HISTOGRAMS, "energy_above_hull"])))
    names = dict.fromkeys(name for name in (by, *_HISTOGRAMS) if name in limits)
    for name in itertools.islice(names, 2):
        yield _histogram(folder, name, *limits[name])
    height = "energy_above_hull" if "energy_above_hull" in limits else "energy_per_atom"
    yield from _scatter(folder, height)


def words(name: str) -> str:
    """Return the name of a column as it is read."""
    return (
        "number of steps"
        if name == "n_steps"
        else name.replace("_", " ").replace("n atoms", "atoms")
    )


def _done(folder: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    for path in result_files(folder):
        table = read_part(path, ["status", *columns])
        yield table.filter(pc.field("status") == "done")


def _numbers(table: pa.Table, name: str) -> NDArray[np.float64]:
    """Return a column; NaN where it has no value."""
    return table[name].cast(pa.float64()).to_numpy()


def _limits(folder: Path, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return the smallest and largest value of each column that has any."""
    limits: dict[str, tuple[float, float]] = {}
    for table in _done(folder, names):
        for name in names:
            values = _numbers(table, name)
            values = values[np.isfinite(values)]
            if len(values):
                low, high = limits.get(name, (np.inf, -np.inf))
                limits[name] = (min(low, float(values.min())), max(high, float(values.max())))
    return limits


def _histogram(folder: Path, name: str, low: float, high: float) -> dict[str, Any]:
    whole = name in ("n_steps", "n_atoms", "space_group_number")
    n_bins = _BINS
    if whole:
        # Bins of whole numbers, as wide as it takes to have no more than there is room for.
        width = -int(-(high - low + 1) // _BINS)
        n_bins = -int(-(high - low + 1) // width)
        low, high = low - 0.5, low - 0.5 + n_bins * width
    elif high - low < 1e-6 * max(1.0, abs(low)):
        margin = 1e-6 * max(1.0, abs(low))
        low, high = low - margin, high + margin
    counts = np.zeros(n_bins, dtype=np.int64)
    for table in _done(folder, [name]):
        values = _numbers(table, name)
        counts += np.histogram(values[np.isfinite(values)], bins=n_bins, range=(low, high))[0]
    return {
        "caption": f"Structures by {words(name)}",
        "label": f"{words(name)} / {UNITS[name]}" if name in UNITS else words(name),
        "ylabel": "structures",
        "counts": counts.tolist(),
        "low": low,
        "high": high,
        "whole": whole,
    }


def _scatter(folder: Path, height: str) -> Iterator[dict[str, Any]]:
    """Yield energy over volume per atom, coloured by formula."""
    every = max(1, sum(table.num_rows for table in _done(folder, [])) // _POINTS)
    points: list[tuple[float, float, str]] = []
    seen = 0
    for table in _done(folder, ["formula", "n_atoms", "volume", height]):
        chosen = table.take(np.arange(-seen % every, table.num_rows, every))
        seen += table.num_rows
        volume = _numbers(chosen, "volume") / _numbers(chosen, "n_atoms")
        energy = _numbers(chosen, height)
        finite = np.isfinite(volume) & np.isfinite(energy)
        formulas = chosen["formula"].to_pylist()
        points += [(volume[k], energy[k], formulas[k]) for k in np.flatnonzero(finite)]
    if len(points) < 2:
        return
    groups = _groups([name for _, _, name in points])
    yield {
        "caption": f"{words(height).capitalize()} over volume per atom",
        "label": "volume per atom / Å³",
        "ylabel": f"{words(height)} / {UNITS[height]}",
        "groups": groups,
        "points": [
            [round(x, 5), round(y, 6), groups.index(name if name in groups else None)]
            for x, y, name in points
        ],
    }


def _groups(formulas: Sequence[str]) -> list[str | None]:
    """Return the formulas that get a colour, and None if there are others beside them.

    Where the frequent ones are but a small part of many, colours would say nothing: none has one.
    """
    counts = Counter(formulas).most_common(_GROUPS)
    named = sum(count for _, count in counts)
    if 2 * named < len(formulas):
        return [None]
    return [*sorted(name for name, _ in counts), *([None] if named < len(formulas) else [])]
