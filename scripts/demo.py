"""Copper and the other elements that ship, then five crystals, beside experiment and PBE.

Run it as ``bash scripts/demo.sh``. Everything about copper, with the shipped cu-pbe, is plain ASE;
atomeq enters in one line, ``AtomeqCalculator("cu-pbe")``. The five crystals (demo_crystals.py) are
of a universal potential that is installed by its name where the package index can be reached, or
with ``--wheel FILE``. Tables go to the terminal, figures to demo_out/demo.png and crystals.png.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import demo_crystals
import matplotlib
import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.collections import dcdft
from ase.eos import EquationOfState
from ase.filters import FrechetCellFilter
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from atomeq import AtomeqCalculator

matplotlib.use("Agg")  # a PNG needs no display
from matplotlib import pyplot as plt

# Lattice constant and bulk modulus: Lejaeghere et al., Science 351, aad3000 (2016), WIEN2k, and the
# experiments of its set, corrected for temperature and zero-point motion; both are in
# ``ase.collections.dcdft``. The vacancy, from memory: Lysogorskiy et al., npj Computational
# Materials 7, 97 (2021), table 1.
EXPERIMENT = {"a0": 3.598, "bulk_modulus": 144.0, "vacancy": 1.27}
PBE = {"a0": 3.629, "bulk_modulus": 141.0, "vacancy": 1.07}

#: The other crystals of one element that ship, by the potential that has them.
OTHERS = {"Li": "li-pbe", "Si": "si-pbe", "Ge": "ge-pbe", "Mo": "mo-pbe"}
OTHERS |= dict.fromkeys(("Nb", "Ta", "W"), "nbmotaw-pbe")

TEMPERATURE = 300.0  # K
TIMESTEP = 5.0  # fs; copper's fastest phonon takes 140 fs
STEPS = 400  # 2 ps
SAMPLE_EVERY = 5  # steps

console = Console()


@dataclass
class Relaxed:
    """The relaxed lattice and vacancy."""

    a0: float  # Å
    max_forces: list[float]  # eV/Å, one per step of the vacancy's relaxation


@dataclass
class Trajectory:
    """What was sampled along the dynamics, one entry per sample."""

    times: np.ndarray  # ps
    temperatures: np.ndarray  # K
    drifts: np.ndarray  # meV/atom, total energy against its first value


def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table: names to the left, numbers to the right."""
    result = Table()
    for k, column in enumerate(columns):
        result.add_column(column, justify="right" if k else "left")
    for row in rows:
        result.add_row(*row)
    console.print(f"[bold]{title}[/bold]", result, "", sep="\n")


def beside(name: str, value: float, key: str, *, digits: int) -> tuple[str, ...]:
    """Return a table row: our value, that of PBE and that of experiment."""
    return (name, *(f"{number:.{digits}f}" for number in (value, PBE[key], EXPERIMENT[key])))


def max_force(atoms: Atoms) -> float:
    """Return the length of the largest force, eV/Å."""
    return float(np.linalg.norm(atoms.get_forces(), axis=1).max())


def single_point(calculator: Calculator) -> None:
    """Energy, forces and stress of one perturbed cell of 32 atoms."""
    atoms = bulk("Cu", "fcc", a=EXPERIMENT["a0"], cubic=True).repeat(2)
    atoms.rattle(stdev=0.05, seed=0)
    atoms.calc = calculator
    start = time.perf_counter()
    energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    seconds = time.perf_counter() - start
    table(
        "1  Single point: 32 atoms, rattled by 0.05 Å",
        ("quantity", "value"),
        [
            ("energy", f"{energy / len(atoms):.4f} eV/atom"),
            ("largest force", f"{max_force(atoms):.3f} eV/Å"),
            ("sum of forces, largest component", f"{np.abs(forces.sum(axis=0)).max():.1e} eV/Å"),
            ("pressure", f"{-stress[:3].mean() / units.GPa:.2f} GPa"),
            ("time, the first call included", f"{seconds:.2f} s"),
        ],
    )


def relaxation(calculator: Calculator) -> Relaxed:
    """Relax the lattice by its stress, then a vacancy in 32 sites by its forces."""
    cell = bulk("Cu", "fcc", a=EXPERIMENT["a0"])
    cell.calc = calculator
    with BFGS(FrechetCellFilter(cell, hydrostatic_strain=True), logfile=None) as optimizer:
        optimizer.run(fmax=1e-3, steps=100)
    a0 = float((4 * cell.get_volume()) ** (1 / 3))

    vacancy = bulk("Cu", "fcc", a=a0, cubic=True).repeat(2)
    del vacancy[0]
    vacancy.calc = calculator
    forces: list[float] = []
    with BFGS(vacancy, logfile=None) as optimizer:
        optimizer.attach(lambda: forces.append(max_force(vacancy)))
        unrelaxed = vacancy.get_potential_energy()
        optimizer.run(fmax=0.01, steps=100)
    relaxed = vacancy.get_potential_energy()
    formation = relaxed - len(vacancy) * cell.get_potential_energy()

    table(
        f"2  Relaxation: lattice, then a vacancy in 32 sites ({len(forces) - 1} steps of BFGS)",
        ("quantity", "cu-pbe", "PBE", "experiment"),
        [
            beside("lattice constant, Å", a0, "a0", digits=3),
            beside("vacancy formation energy, eV", formation, "vacancy", digits=2),
            ("    of it gained by relaxing, eV", f"{unrelaxed - relaxed:.3f}", "", ""),
            ("largest force left, eV/Å", f"{forces[-1]:.4f}", "", ""),
        ],
    )
    return Relaxed(a0, forces)


def equation_of_state(calculator: Calculator, a0: float) -> tuple[EquationOfState, float]:
    """Fit Birch-Murnaghan to nine volumes; return the fit and its lattice constant in Å."""
    volumes, energies = [], []
    for scale in np.linspace(0.97, 1.03, 9):
        atoms = bulk("Cu", "fcc", a=a0 * scale)
        atoms.calc = calculator
        volumes.append(atoms.get_volume())
        energies.append(atoms.get_potential_energy())
    eos = EquationOfState(volumes, energies, eos="birchmurnaghan")
    volume, energy, modulus = eos.fit()
    lattice = float((4 * volume) ** (1 / 3))
    table(
        "3  Equation of state: Birch-Murnaghan through nine volumes, a0 ± 3 %",
        ("quantity", "cu-pbe", "PBE", "experiment"),
        [
            beside("lattice constant, Å", lattice, "a0", digits=3),
            beside("bulk modulus, GPa", modulus / units.GPa, "bulk_modulus", digits=0),
            ("energy at the minimum, eV/atom", f"{energy:.4f}", "", ""),
        ],
    )
    return eos, lattice


def dynamics(calculator: Calculator, a0: float) -> Trajectory:
    """Run 2 ps of constant-energy dynamics on 108 atoms."""
    atoms = bulk("Cu", "fcc", a=a0, cubic=True).repeat(3)
    atoms.calc = calculator
    # From a perfect lattice half of the kinetic energy goes into the springs: start twice as hot.
    momentum_spread = np.sqrt(atoms.get_masses() * 2 * TEMPERATURE * units.kB)
    momenta = np.random.default_rng(0).normal(size=(len(atoms), 3)) * momentum_spread[:, None]
    atoms.set_momenta(momenta - momenta.mean(axis=0))
    samples: list[tuple[float, float, float]] = []
    start = time.perf_counter()
    with (
        VelocityVerlet(atoms, timestep=TIMESTEP * units.fs) as md,
        Progress(
            TextColumn("molecular dynamics  {task.fields[state]}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        ) as progress,
    ):
        task = progress.add_task("", total=STEPS, state="")
        for _ in md.irun(STEPS):
            if md.nsteps % SAMPLE_EVERY == 0:
                samples.append((md.get_time(), atoms.get_temperature(), atoms.get_total_energy()))
                progress.update(task, completed=md.nsteps, state=f"{samples[-1][1]:4.0f} K")
    seconds = time.perf_counter() - start

    times, temperatures, energies = np.array(samples).T
    times = times / (1e3 * units.fs)
    drifts = 1e3 * (energies - energies[0]) / len(atoms)
    settled = times >= 0.5  # the first 0.5 ps share the kinetic energy out
    slope = np.polyfit(times[settled], drifts[settled], 1)[0]
    table(
        f"4  Molecular dynamics: {len(atoms)} atoms, NVE, {STEPS * TIMESTEP / 1e3:g} ps in steps "
        f"of {TIMESTEP:g} fs",
        ("quantity", "value"),
        [
            ("mean temperature after 0.5 ps", f"{temperatures[settled].mean():.0f} K"),
            ("its standard deviation", f"{temperatures[settled].std():.0f} K"),
            ("drift of the total energy", f"{slope:.4f} meV/atom/ps"),
            ("largest excursion of the total energy", f"{np.abs(drifts).max():.3f} meV/atom"),
            ("time", f"{seconds:.0f} s, {1e3 * seconds / STEPS:.0f} ms/step"),
        ],
    )
    return Trajectory(times, temperatures, drifts)


def others() -> None:
    """Fit the equation of state of each other element that ships."""
    rows = []
    for symbol, name in OTHERS.items():
        volumes, energies = [], []
        calculator = AtomeqCalculator(name)
        published = dcdft.data[symbol]
        for scale in np.linspace(0.97, 1.03, 9):
            atoms = bulk(symbol)
            stretch = scale * (published["wien2k_volume"] * len(atoms) / atoms.get_volume()) ** (
                1 / 3
            )
            atoms.set_cell(stretch * atoms.cell, scale_atoms=True)
            atoms.calc = calculator
            volumes.append(atoms.get_volume() / len(atoms))
            energies.append(atoms.get_potential_energy() / len(atoms))
        volume, _, modulus = EquationOfState(volumes, energies, eos="birchmurnaghan").fit()
        numbers = [
            f"{v:.2f}" for v in (volume, published["wien2k_volume"], published["exp_volume"])
        ]
        moduli = (modulus / units.GPa, published["wien2k_B"], published["exp_B"])
        rows.append((f"{symbol}, {name}", *numbers, *(f"{value:.0f}" for value in moduli)))
    table(
        "5  Other elements that ship: Å³ per atom and bulk modulus, GPa",
        ("", "volume", "PBE", "experiment", "modulus", "PBE", "experiment"),
        rows,
    )


def plot(eos: EquationOfState, relaxed: Relaxed, trajectory: Trajectory, path: Path) -> None:
    """Draw equation of state, relaxation and dynamics side by side."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    _, minimum, _, _, curve_volumes, curve_energies, volumes, energies = eos.getplotdata()
    left.plot(curve_volumes, 1e3 * (curve_energies - minimum), color="C1")
    left.plot(volumes, 1e3 * (energies - minimum), "o", color="C0")
    left.set(xlabel="volume, Å³/atom", ylabel="energy above the minimum, meV/atom")
    left.set_title("Equation of state")

    middle.semilogy(relaxed.max_forces, "o-", color="C0")
    middle.set(xlabel="step of BFGS", ylabel="largest force, eV/Å", title="Relaxation of a vacancy")

    right.plot(trajectory.times, trajectory.temperatures, color="C3")
    right.set(xlabel="time, ps", ylabel="temperature, K", title="Dynamics at constant energy")
    energy_axis = right.twinx()
    energy_axis.plot(trajectory.times, trajectory.drifts, color="C0")
    energy_axis.set_ylabel("total energy − start, meV/atom", color="C0")
    energy_axis.set_ylim(-2, 2)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the parts and write the figures."""
    parser = argparse.ArgumentParser(
        description="Copper and others, then five crystals, in minutes."
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the figures")
    parser.add_argument("--wheel", type=Path, help="of sevenn 0.13.0, where there is no index")
    options = parser.parse_args()
    out: Path = options.out

    start = time.perf_counter()
    calculator = AtomeqCalculator("cu-pbe")
    single_point(calculator)
    relaxed = relaxation(calculator)
    eos, a0 = equation_of_state(calculator, relaxed.a0)
    trajectory = dynamics(calculator, a0)
    others()
    plot(eos, relaxed, trajectory, out / "demo.png")
    figures = [out / "demo.png"]
    if demo_crystals.install(demo_crystals.wheel_at_hand(options.wheel)):
        figures.append(demo_crystals.show(out))
    names = ", ".join(map(str, figures))
    console.print(f"Figures: {names}   ({time.perf_counter() - start:.0f} s in all)")


if __name__ == "__main__":
    main()
