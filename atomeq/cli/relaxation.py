"""All structures of a file relaxed together; a run that is killed goes on where it was."""

from collections.abc import Sequence
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from jsonargparse import Namespace

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli.plots import Panel, plot_lines
from atomeq.cli.restart import RunFolder
from atomeq.cli.terminal import Meter
from atomeq.dynamics.cell import FrechetCell
from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.in_flight import Outcome
from atomeq.dynamics.optimizers import OptimizerState
from atomeq.dynamics.run import relax
from atomeq.units import GPA

_FRAME_INTERVAL = 5  # steps between the points that are drawn
_MOST_LINES = 20  # structures whose path is drawn


def relaxed_in(
    folder: RunFolder,
    structures: Sequence[Atoms],
    calculator: AtomeqCalculator,
    options: Namespace,
) -> list[Outcome]:
    """Relax structures; return what became of each, in their order.

    Args:
        folder: Keeps the run while it computes.
        structures: What to relax; not modified.
        calculator: Its potential is used.
        options: Of ``atomeq relax``.
    """
    meter = Meter("relax", len(structures), unit="structures")
    n_steps = 0

    def observe(_: OptimizerState, indices: list[int]) -> None:
        nonlocal n_steps
        n_steps += len(indices)
        meter.advance(0, note=f"{n_steps / meter.seconds:.1f} steps/s")

    outcomes: dict[int, Outcome] = {}
    with folder.kept(), meter.running():
        for outcome in relax(
            structures,
            Evaluator(calculator.potential, max_uncertainty=options.max_uncertainty),
            optimizer=options.optimizer,
            cell=FrechetCell(pressure=options.pressure * GPA) if options.cell else False,
            fmax=options.fmax,
            max_steps=options.max_steps,
            folder=folder.path,
            interval=_FRAME_INTERVAL,
            checkpoint_interval=options.checkpoint_interval,
            restart=True,  # the folder is what is left of the run, if anything
            observe=observe,
        ):
            outcomes[outcome.index] = outcome
            meter.advance()
    return [outcomes[k] for k in range(len(structures))]


def draw_relaxation(out: str, folder: RunFolder, n_structures: int) -> Path:
    """Draw how the largest force and the energy fell, from the frames; return the picture.

    Args:
        out: The output that the picture stands beside.
        folder: Of the run.
        n_structures: That were relaxed.
    """
    forces, energies = [], []
    for path in map(folder.frames, range(min(_MOST_LINES, n_structures))):
        frames = list(ase.io.iread(path, index=":")) if path.exists() else []
        steps = [float(atoms.info["step"]) for atoms in frames]
        each = [atoms.get_potential_energy() / len(atoms) for atoms in frames]
        forces.append((steps, [_largest_force(atoms) for atoms in frames]))
        energies.append((steps, [energy - min(each) for energy in each]))
    return plot_lines(
        out,
        [
            Panel("step", "largest force / eV/Å", forces, log=True),
            Panel("step", "energy above the lowest / eV per atom", energies),
        ],
    )


def _largest_force(atoms: Atoms) -> float:
    return float(np.linalg.norm(atoms.get_forces(), axis=1).max())
