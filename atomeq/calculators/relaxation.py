"""Relaxes OC20's initial structures with a calculator: the IS2RE and IS2RS tasks by relaxation."""

import os
from dataclasses import dataclass

import numpy as np
from ase.calculators.calculator import Calculator
from ase.optimize import LBFGS
from numpy.typing import NDArray

from atomeq.data.oc20_frame import OC20Frame

# The optimizer of the published evaluations: small, damped steps that no direct force can blow up.
_MAX_STEP = 0.04  # Å
_MEMORY = 50
_ALPHA = 70.0  # eV/Å², the first guess of the Hessian


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
