"""Relaxations on the way to a property: before it is computed, or as OC20's IS2RE and IS2RS ask."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.optimize import LBFGS
from numpy.typing import NDArray

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.data.oc20_frame import OC20Frame
from atomeq.dynamics.in_flight import Outcome
from atomeq.dynamics.run import relax
from atomeq.properties.single_points import Report, untold

# The optimizer of the published evaluations: small, damped steps that no direct force can blow up.
_MAX_STEP = 0.04  # Å
_MEMORY = 50
_ALPHA = 70.0  # eV/Å², the first guess of the Hessian


def relaxed(
    structures: Sequence[Atoms],
    calculator: AtomeqCalculator,
    *,
    cell: bool,
    fmax: float,
    max_steps: int,
    what: str = "structure",
    report: Report = untold,
) -> list[Atoms]:
    """Relax structures together; return copies in the same order, without calculators.

    Args:
        structures: What to relax.
        calculator: Its potential is used.
        cell: Relax the cells as well.
        fmax: Largest force left, eV/Å.
        max_steps: Steps after which one has failed.
        what: Names them in errors and progress.
        report: Told of progress.

    Returns:
        The relaxed structures.

    Raises:
        ValueError: A structure does not relax.
    """
    outcomes: dict[int, Outcome] = {}
    stage = f"relaxing {what}"
    report(stage, 0, len(structures))
    for outcome in relax(
        structures, calculator.potential, cell=cell, fmax=fmax, max_steps=max_steps
    ):
        outcomes[outcome.index] = outcome
        report(stage, len(outcomes), len(structures))
    found = []
    for index, start in enumerate(structures):
        outcome = outcomes[index]
        if outcome.atoms is None or not outcome.converged:
            reason = outcome.reason or f"largest force above {fmax:g} eV/Å after {max_steps} steps"
            raise ValueError(
                f"{what} {index} does not relax: {reason}; raise max_steps or fmax, or take it as "
                "it is, without relax"
            )
        end = start.copy()
        end.set_cell(outcome.atoms.cell)
        end.positions = outcome.atoms.positions
        found.append(end)
    return found


@dataclass(frozen=True)
class RelaxedSystem:
    """Where a relaxation ended.

    Attributes:
        energy: eV, of the calculator.
        positions: (n_atoms, 3), Å.
        n_steps: Steps taken.
        converged: Whether the largest force on a free atom fell below the threshold.
    """

    energy: float
    positions: NDArray[np.float64]
    n_steps: int
    converged: bool


def relax_frame(
    frame: OC20Frame, calculator: Calculator, *, fmax: float = 0.02, max_steps: int = 300
) -> RelaxedSystem:
    """Relax the free atoms of a frame.

    Args:
        frame: An initial structure.
        calculator: Any ASE calculator; for energies like OC20's labels one trained on them.
        fmax: Force at which a relaxation has converged, eV/Å.
        max_steps: Steps after which it ends anyhow, as the published evaluations do.

    Returns:
        Where it ended, and whether that is a minimum.
    """
    atoms = frame.to_atoms()
    atoms.calc = calculator
    optimizer = LBFGS(
        atoms, logfile=os.devnull, maxstep=_MAX_STEP, memory=_MEMORY, damping=1.0, alpha=_ALPHA
    )
    converged = bool(optimizer.run(fmax=fmax, steps=max_steps))
    return RelaxedSystem(
        energy=float(atoms.get_potential_energy()),
        positions=atoms.get_positions(),
        n_steps=optimizer.nsteps,
        converged=converged,
    )
