"""All structures of a file relaxed together; a run that is killed goes on where it was.

While it computes, the folder OUT.relax holds what :mod:`atomeq.dynamics.trajectory` writes, frames
of every structure and the checkpoint of the running batch, and a journal of the structures that
have ended.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from jsonargparse import Namespace

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli.plots import Panel, plot_lines
from atomeq.cli.restart import Journal, identity
from atomeq.cli.terminal import Meter
from atomeq.dynamics.cell import FrechetCell
from atomeq.dynamics.in_flight import Outcome
from atomeq.dynamics.optimizers import OptimizerState
from atomeq.dynamics.run import relax
from atomeq.dynamics.trajectory import CHECKPOINT_FILE
from atomeq.units import GPA

_JOURNAL = "ended.jsonl"
_FRAME_INTERVAL = 5  # steps between the points that are drawn
_MOST_LINES = 20  # structures whose path is drawn


class RelaxationRun:
    """Relaxes structures and remembers those that have ended.

    Args:
        structures: What to relax; not modified.
        calculator: Its potential is used.
        options: Of ``atomeq relax``.

    Raises:
        ValueError: What is to be continued is another run.
    """

    def __init__(
        self, structures: Sequence[Atoms], calculator: AtomeqCalculator, options: Namespace
    ) -> None:
        self.structures, self.options = structures, options
        self.potential = calculator.potential
        self.folder = Path(options.out).with_suffix(".relax")
        if not options.restart:
            self.remove()
        about = identity(options, calculator, free=("checkpoint_interval",))
        self._journal = Journal(self.folder / _JOURNAL, about, restart=options.restart)

    def run(self) -> list[dict[str, Any]]:
        """Relax; return for each structure its status, reason, steps, positions and cell."""
        ended = {entry["index"]: entry for entry in self._journal.entries}
        meter = Meter("relax", len(self.structures), unit="structures", done=len(ended))
        n_steps = 0

        def observe(_: OptimizerState, indices: list[int]) -> None:
            nonlocal n_steps
            n_steps += len(indices)
            meter.advance(0, note=f"{n_steps / meter.seconds:.1f} steps/s")

        with meter.running():
            for outcome in self._outcomes(observe):
                if outcome.index not in ended:
                    ended[outcome.index] = self._entry(outcome)
                    self._journal.append(ended[outcome.index])
                    meter.advance()
        return [ended[k] for k in range(len(self.structures))]

    def draw(self) -> Path:
        """Draw how the largest force and the energy fell, from the frames; return the picture."""
        forces, energies = [], []
        for k in range(min(_MOST_LINES, len(self.structures))):
            path = self.folder / f"{k:06d}.extxyz"
            frames = list(ase.io.iread(path, index=":")) if path.exists() else []
            steps = [float(atoms.info["step"]) for atoms in frames]
            each = [atoms.get_potential_energy() / len(atoms) for atoms in frames]
            forces.append((steps, [_largest_force(atoms) for atoms in frames]))
            energies.append((steps, [energy - min(each) for energy in each]))
        return plot_lines(
            self.options.out,
            [
                Panel("step", "largest force / eV/Å", forces, log=True),
                Panel("step", "energy above the lowest / eV per atom", energies),
            ],
        )

    def remove(self) -> None:
        """Remove what a restart would need, and nothing else that is in the folder."""
        if not self.folder.exists():
            return
        for pattern in ("[0-9]" * 6 + ".extxyz", CHECKPOINT_FILE, _JOURNAL):
            for path in self.folder.glob(pattern):
                path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _outcomes(self, observe: Callable[[OptimizerState, list[int]], None]) -> Iterator[Outcome]:
        options = self.options
        cell = FrechetCell(pressure=options.pressure * GPA) if options.cell else False
        return relax(
            self.structures,
            self.potential,
            optimizer=options.optimizer,
            cell=cell,
            fmax=options.fmax,
            max_steps=options.max_steps,
            folder=self.folder,
            interval=_FRAME_INTERVAL,
            checkpoint_interval=options.checkpoint_interval,
            restart=True,  # the folder is what the constructor left of it
            observe=observe,
        )

    def _entry(self, outcome: Outcome) -> dict[str, Any]:
        graph, start = outcome.graph, self.structures[outcome.index]
        if graph is None:
            positions, cell = start.positions, start.cell.array
        else:
            positions, cell = graph.pos.cpu().numpy(), graph.cell[0].cpu().numpy()
        return {
            "index": outcome.index,
            "status": outcome.status,
            "reason": outcome.reason,
            "steps": outcome.n_steps,
            "positions": positions.tolist(),
            "cell": cell.tolist(),
        }


def _largest_force(atoms: Atoms) -> float:
    return float(np.linalg.norm(atoms.get_forces(), axis=1).max())
