"""What direct forces do to dynamics and phonons: drift at constant energy, and frequencies.

Run it as ``python scripts/drift_and_phonons.py POTENTIAL ... --reference sevennet-0``. Crystals of
rock salt and fluorite structure are relaxed with the reference; each potential moves them at
constant energy and computes their harmonic phonons at the same lattice, where all forces vanish by
symmetry. The phonon error is the mean absolute difference of the frequencies on a mesh.
"""

import argparse
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.spacegroup import crystal
from rich.console import Console
from rich.table import Table

from atomeq import AtomeqCalculator
from atomeq.dynamics.integrators import MDState, VelocityVerlet
from atomeq.dynamics.kinetics import kinetic_energy
from atomeq.dynamics.run import simulate
from atomeq.properties.phonons import displaced_supercells, mesh_frequencies, set_forces
from atomeq.properties.relaxation import relaxed

TEMPERATURE = 600.0  # K, of which half goes into the springs
TIMESTEP = 1.0  # fs
MESH = 20.0  # Å, phonopy's length
DISPLACEMENT = 0.01  # Å


def crystals() -> dict[str, Atoms]:
    """Return the cells that are relaxed; alkali and alkaline earth, as in the data."""
    fluorite = [("Ca", "F"), [(0, 0, 0), (0.25, 0.25, 0.25)]]
    caf2 = crystal(*fluorite, spacegroup=225, cellpar=3 * [5.5] + 3 * [90], primitive_cell=True)
    salts = {"MgO": 4.25, "CaO": 4.83, "NaCl": 5.69, "KF": 5.4}
    return {"CaF2": caf2, **{name: bulk(name, "rocksalt", a=a) for name, a in salts.items()}}


def frequencies(atoms: Atoms, calculator: AtomeqCalculator) -> np.ndarray:
    """Return the harmonic frequencies on a mesh, THz, imaginary ones negative."""
    phonon, cells = displaced_supercells(atoms, supercell=(3, 3, 3), displacement=DISPLACEMENT)
    set_forces(phonon, [one["forces"] for one in calculator.evaluate(cells, ("forces",))])
    return np.sort(mesh_frequencies(phonon, MESH)[0], axis=1)


def drift(atoms: Atoms, calculator: AtomeqCalculator, n_steps: int) -> tuple[float, float]:
    """Return the slope of the total energy, meV/atom/ps, and its largest excursion, meV/atom."""
    totals: list[float] = []

    def observe(state: MDState, indices: list[int]) -> None:
        total = float(state.graph.energy[0]) + float(kinetic_energy(state.graph)[0])
        totals.append(1e3 * total / len(supercell))

    supercell = atoms.repeat(2)
    verlet = VelocityVerlet(timestep=TIMESTEP, temperature=TEMPERATURE)
    (outcome,) = simulate(
        [supercell], calculator.potential, verlet, n_steps=n_steps, observe=observe
    )
    if not outcome.converged:
        return float("nan"), float("nan")
    times = TIMESTEP / 1e3 * np.arange(len(totals))
    slope = np.polyfit(times, totals, 1)[0]
    return float(slope), float(np.abs(np.array(totals) - totals[0]).max())


@dataclass
class Found:
    """Errors of a potential on a crystal."""

    slope: float  # meV/atom/ps
    excursion: float  # meV/atom
    phonons: float  # THz
    imaginary: float  # share of the modes


def measured(name: str, reference: str, n_steps: int) -> dict[str, Found]:
    """Measure a potential on all crystals."""
    calculators = {key: AtomeqCalculator(key, dtype="float64") for key in (name, reference)}
    structures = crystals()
    cells = relaxed(
        list(structures.values()), calculators[reference], cell=True, fmax=1e-3, max_steps=200
    )
    found = {}
    for key, atoms in zip(structures, cells, strict=True):
        ours, expected = (frequencies(atoms, calculators[one]) for one in (name, reference))
        error = float(np.abs(ours - expected).mean())
        found[key] = Found(*drift(atoms, calculators[name], n_steps), error, (ours < -0.05).mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Drift and phonons of potentials.")
    parser.add_argument("potentials", nargs="+", help="names or folders")
    parser.add_argument("--reference", required=True, help="whose lattices and phonons count")
    parser.add_argument("--steps", type=int, default=1000, help="of dynamics, fs")
    options = parser.parse_args()
    columns = ("crystal", "drift, meV/atom/ps", "excursion, meV/atom", "phonons, THz", "imaginary")
    for name in options.potentials:
        table = Table(*columns, title=name)
        rows = measured(name, options.reference, options.steps)
        for key, one in rows.items():
            numbers = (f"{one.slope:+.2f}", f"{one.excursion:.2f}", f"{one.phonons:.2f}")
            table.add_row(key, *numbers, f"{one.imaginary:.0%}")
        mean = np.mean([[abs(o.slope), o.excursion, o.phonons] for o in rows.values()], axis=0)
        table.add_row("mean of sizes", *(f"{value:.2f}" for value in mean), "")
        Console().print(table)


if __name__ == "__main__":
    main()
