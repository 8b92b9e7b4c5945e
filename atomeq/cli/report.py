"""What a molecular dynamics run looked like: temperature, energy, distances, displacements."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from atomeq.calculators.ase import has_volume
from atomeq.cli.plots import Panel, plot_lines
from atomeq.files import write_atomically
from atomeq.graph.neighbors import neighbor_list_with_lengths

_CUTOFF = 6.0  # Å
_BINS = 120
_MOST_LINES = 20  # structures whose motion is drawn


class TrajectoryReport:
    """Collects frames of one structure in motion.

    The radial distribution g(r) of a structure with a volume is relative to its mean density; of
    any other it is the number of neighbours per atom and Å. Displacements are those of atoms
    against their centre of mass and, where the cell moves, within it.
    """

    def __init__(self) -> None:
        self._histogram = np.zeros(_BINS)
        self._edges = np.linspace(0.0, _CUTOFF, _BINS + 1)
        self._density = 0.0
        self._frames = 0
        self._start: Atoms | None = None
        self._displacements: list[float] = []

    def add(self, atoms: Atoms) -> None:
        """Take up a frame."""
        if self._start is None:
            self._start = atoms.copy()
        _, lengths = neighbor_list_with_lengths(
            atoms.positions, atoms.cell.array, atoms.pbc, _CUTOFF
        )
        counts, _ = np.histogram(lengths, self._edges)
        self._histogram += counts / len(atoms)
        self._frames += 1
        if has_volume(atoms):
            self._density += len(atoms) / atoms.get_volume()
        moved = _displacements(self._start, atoms)
        self._displacements.append(float((moved**2).sum(axis=1).mean()))

    @property
    def distances(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Middles of bins (Å), and g(r) or neighbours per Å."""
        middles = (self._edges[1:] + self._edges[:-1]) / 2
        frames = max(self._frames, 1)
        counts = self._histogram / frames
        if not self._density:
            return middles, counts / np.diff(self._edges)
        shells = 4 / 3 * np.pi * np.diff(self._edges**3)
        return middles, counts / (shells * self._density / frames)

    @property
    def has_density(self) -> bool:
        """Whether the structure has a volume."""
        return bool(self._density)

    @property
    def mean_squared_displacement(self) -> list[float]:
        """Of each frame against the first, Å²."""
        return list(self._displacements)


class Run(NamedTuple):
    """One structure's motion.

    Attributes:
        lines: Of its log, one for each frame.
        report: What was collected of its frames.
        n_atoms: Of the structure.
    """

    lines: list[dict[str, float]]
    report: TrajectoryReport
    n_atoms: int

    def column(self, name: str) -> list[float]:
        """Return a column of the log."""
        return [line[name] for line in self.lines]

    def write(self, out: Path) -> Path:
        """Write OUT.report.json beside the trajectory; return its path."""
        middles, values = self.report.distances
        name = "g" if self.report.has_density else "neighbours_per_A"
        document = {
            "time_fs": self.column("time_fs"),
            "temperature_K": self.column("temperature_K"),
            "total_energy_eV": self.column("total_energy_eV"),
            "mean_squared_displacement_A2": self.report.mean_squared_displacement,
            "radial_distribution": {"r_A": middles.tolist(), name: values.tolist()},
        }
        path = out.with_suffix(".report.json")
        with write_atomically(path) as partial:
            partial.write_text(json.dumps(document) + "\n", encoding="utf-8")
        return path


def draw_runs(out: str | Path, runs: Sequence[Run]) -> Path:
    """Draw the motion of the first structures; return the path of the picture."""
    drawn = runs[:_MOST_LINES]
    temperatures, energies, distances, displacements = [], [], [], []
    for run in drawn:
        times, energy = run.column("time_fs"), run.column("total_energy_eV")
        temperatures.append((times, run.column("temperature_K")))
        energies.append((times, [1e3 * (value - energy[0]) / run.n_atoms for value in energy]))
        distances.append(tuple(values.tolist() for values in run.report.distances))
        displacements.append((times, run.report.mean_squared_displacement))
    density = "g(r)" if all(run.report.has_density for run in drawn) else "neighbours per Å"
    return plot_lines(
        out,
        [
            Panel("time / fs", "temperature / K", temperatures),
            Panel("time / fs", "change of energy / meV/atom", energies),
            Panel("r / Å", density, distances, ends=False),
            Panel("time / fs", "mean squared displ. / Å²", displacements),
        ],
    )


def _displacements(start: Atoms, end: Atoms) -> NDArray[np.float64]:
    """Return how far atoms moved, (n_atoms, 3), Å, without the centre of mass and the cell."""
    if has_volume(start):
        fractions = end.cell.scaled_positions(end.positions)
        moved = start.cell.cartesian_positions(
            fractions - start.cell.scaled_positions(start.positions)
        )
    else:
        moved = end.positions - start.positions
    masses = start.get_masses()[:, None]
    return moved - (masses * moved).sum(axis=0) / masses.sum()
