"""What a molecular dynamics run looked like: temperature, energy, distances, displacements."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from atomeq.calculators.ase import has_volume
from atomeq.cli.plots import Panel, plot_lines
from atomeq.files import write_atomically
from atomeq.graph.neighbors import neighbor_list_with_lengths

_CUTOFF = 6.0  # Å
_BINS = 120


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

    def state(self) -> dict[str, Any]:
        """Return what was collected, ready for JSON; :meth:`restored` takes it up."""
        start = self._start
        return {
            "histogram": self._histogram.tolist(),
            "density": self._density,
            "frames": self._frames,
            "displacements": self._displacements,
            "start": None
            if start is None
            else [start.positions.tolist(), start.cell.array.tolist()],
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], atoms: Atoms) -> "TrajectoryReport":
        """Return the report of an interrupted run.

        Args:
            state: From :meth:`state`.
            atoms: The structure, wherever it is by now.
        """
        report = cls()
        report._histogram = np.array(state["histogram"])
        report._density, report._frames = state["density"], state["frames"]
        report._displacements = list(state["displacements"])
        if state["start"] is not None:
            report._start = atoms.copy()
            report._start.positions, cell = state["start"]
            report._start.set_cell(cell)
        return report

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
    def mean_squared_displacement(self) -> list[float]:
        """Of each frame against the first, Å²."""
        return list(self._displacements)

    def write(self, out: str | Path, log: Sequence[Mapping[str, float]]) -> list[Path]:
        """Write OUT.report.json and OUT.png beside the trajectory.

        Args:
            out: The trajectory.
            log: The lines of its log, one for each frame.

        Returns:
            The two paths.
        """
        times = [line["time_fs"] for line in log]
        energies = [line["total_energy_eV"] for line in log]
        temperatures = [line["temperature_K"] for line in log]
        middles, values = self.distances
        name = "g" if self._density else "neighbours_per_A"
        document = {
            "time_fs": times,
            "temperature_K": temperatures,
            "total_energy_eV": energies,
            "mean_squared_displacement_A2": self.mean_squared_displacement,
            "radial_distribution": {"r_A": middles.tolist(), name: values.tolist()},
        }
        path = Path(out).with_suffix(".report.json")
        with write_atomically(path) as partial:
            partial.write_text(json.dumps(document) + "\n", encoding="utf-8")
        per_atom = 1e3 / len(self._start) if self._start is not None else 1.0
        change = [(energy - energies[0]) * per_atom for energy in energies]
        density = "g(r)" if self._density else "neighbours per Å"
        picture = plot_lines(
            out,
            [
                Panel("time / fs", "temperature / K", [(times, temperatures)]),
                Panel("time / fs", "change of total energy / meV per atom", [(times, change)]),
                Panel("r / Å", density, [(middles.tolist(), values.tolist())]),
                Panel(
                    "time / fs", "mean squared displacement / Å²", [(times, self._displacements)]
                ),
            ],
        )
        return [path, picture]


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
