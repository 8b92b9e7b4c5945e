"""Five real crystals in a minute: what SevenNet-0, a published universal potential, says of them.

Second part of ``bash scripts/demo.sh``, and ``python scripts/demo_crystals.py`` alone. The
potential is installed by its name, from the package index or a wheel at hand; the crystals are
relaxed with their cells, compressed and stretched, screened against other structures of the same
composition, and run at 300 K.
"""

import argparse
import os
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from ase import Atoms
from ase.build import bulk, make_supercell
from ase.spacegroup import crystal
from rich.console import Console
from rich.table import Table

from atomeq import AtomeqCalculator
from atomeq.dynamics.integrators import MDState, VelocityVerlet
from atomeq.dynamics.kinetics import kinetic_energy
from atomeq.dynamics.run import relax, simulate
from atomeq.potential.catalogue import InstallError, install_potential
from atomeq.potential.folders import installed_potentials
from atomeq.properties.equation_of_state import (
    EquationOfState,
    fit_equation_of_state,
    scaled_volumes,
)
from atomeq.screening.run import screen
from atomeq.screening.sources import Found
from atomeq.units import BOLTZMANN

matplotlib.use("Agg")  # a PNG needs no display
from matplotlib import pyplot as plt

NAME = "sevennet-0"
TEMPERATURE = 300.0  # K
TIMESTEP = 2.0  # fs
STEPS = 100
VOLUMES = 7  # of the equation of state, ± 6 %


@dataclass(frozen=True)
class Literature:
    """Published numbers, not of this program: Å and GPa, empty where none is known to us.

    PBE: Si of Lejaeghere et al., Science 351, aad3000 (2016), WIEN2k, as in ``ase.collections``;
    MgO of Bosoni et al., Nat. Rev. Phys. 6, 45 (2024), mean of two all-electron codes; NaCl of
    Harl, Schimka and Kresse, Phys. Rev. B 81, 115126 (2010); TiO2 of M. Sharma, bragitoff.com
    (2017), Quantum ESPRESSO. Experiment, corrected for zero-point motion: lattices as in Harl et
    al., moduli as collected by Hao et al., Phys. Rev. B 85, 014111 (2012).
    In brackets stands what was written from memory and not compared with a source.
    """

    pbe: str
    pbe_modulus: str
    experiment: str
    experiment_modulus: str


LITERATURE = {
    "MgO": Literature("4.254", "149", "4.189", "165"),
    "Si": Literature("5.469", "89", "5.421", "99"),
    "NaCl": Literature("5.697", "(24)", "5.569", "27"),
    "LiCoO2": Literature("", "", "(2.816, 14.05)", "(149)"),
    "TiO2": Literature("4.644, 2.969", "", "(4.594, 2.959)", "(211)"),
}

console = Console()


def crystals() -> dict[str, Atoms]:
    """Return the cells that the relaxations start from, all some percent too large or small."""
    oxide = crystal(
        ["Li", "Co", "O"],
        [(0, 0, 0.5), (0, 0, 0), (0, 0, 0.26)],
        spacegroup=166,
        cellpar=[2.90, 2.90, 14.3, 90, 90, 120],
        primitive_cell=True,
    )
    rutile = crystal(
        ["Ti", "O"],
        [(0, 0, 0), (0.31, 0.31, 0)],
        spacegroup=136,
        cellpar=[4.7, 4.7, 3.0] + [90] * 3,
    )
    return {
        "MgO": bulk("MgO", "rocksalt", a=4.1),
        "Si": bulk("Si", a=5.6),
        "NaCl": bulk("NaCl", "rocksalt", a=5.5),
        "LiCoO2": oxide,
        "TiO2": rutile,
    }


def rivals() -> dict[str, Atoms]:
    """Return other structures of the same composition, which nature does not choose."""
    anatase = crystal(
        ["Ti", "O"],
        [(0, 0, 0), (0, 0, 0.21)],
        spacegroup=141,
        cellpar=[3.8, 3.8, 9.7, 90, 90, 90],
        primitive_cell=True,
    )
    return {
        "MgO, CsCl type": bulk("MgO", "cesiumchloride", a=2.6),
        "MgO, zincblende": bulk("MgO", "zincblende", a=4.6),
        "Si, fcc": bulk("Si", "fcc", a=3.9),
        "Si, simple cubic": bulk("Si", "sc", a=2.5),
        "NaCl, CsCl type": bulk("NaCl", "cesiumchloride", a=3.5),
        "NaCl, zincblende": bulk("NaCl", "zincblende", a=6.1),
        "TiO2, anatase": anatase,
    }


def install(wheel: Path | None) -> bool:
    """Install the potential where it is not there yet; say so where it cannot be had."""
    if NAME in installed_potentials():
        return True
    start = time.perf_counter()
    try:
        folder = install_potential(NAME, file=wheel)
    except InstallError as error:
        console.print(f"{NAME} is not here: {error}. What follows is copper alone.", style="yellow")
        return False
    console.print(f"installed {NAME} in {folder} ({time.perf_counter() - start:.0f} s)")
    return True


def relaxed_cells(calculator: AtomeqCalculator) -> dict[str, Atoms]:
    """Relax the crystals with their cells, in one batch."""
    structures = crystals()
    found = dict(structures)
    names = list(structures)
    for outcome in relax(
        structures.values(), calculator.potential, cell=True, fmax=0.005, optimizer="lbfgs"
    ):
        assert outcome.graph is not None
        if not outcome.converged:
            console.print(f"{names[outcome.index]}: {outcome.reason}", style="yellow")
        atoms = structures[names[outcome.index]].copy()
        atoms.set_cell(outcome.graph.cell[0].cpu().numpy())
        atoms.positions = outcome.graph.pos.cpu().numpy()
        found[names[outcome.index]] = atoms
    return found


def lattice(name: str, atoms: Atoms) -> str:
    """Return lattice constants as they are published, Å."""
    if name in ("MgO", "Si", "NaCl"):
        return f"{(4 * atoms.get_volume()) ** (1 / 3):.3f}"
    if name == "TiO2":
        return f"{atoms.cell.lengths()[0]:.3f}, {atoms.cell.lengths()[2]:.3f}"
    vectors = atoms.cell.array  # of the rhombohedral cell; differences span the hexagonal plane
    height = np.linalg.norm(vectors.sum(axis=0))
    return f"{np.linalg.norm(vectors[0] - vectors[1]):.3f}, {height:.2f}"


def equations_of_state(
    calculator: AtomeqCalculator, cells: dict[str, Atoms]
) -> dict[str, tuple[list[float], list[float], EquationOfState]]:
    """Fit Birch-Murnaghan to volumes at the shape and the fractional coordinates of the cell."""
    found = {}
    for name, atoms in cells.items():
        scaled = scaled_volumes(atoms, 0.06, VOLUMES)
        volumes = [one.get_volume() / len(one) for one in scaled]
        results = calculator.evaluate(scaled, ("energy",))
        energies = [one["energy"] / len(atoms) for one in results]
        found[name] = volumes, energies, fit_equation_of_state(volumes, energies)
    return found


def show_crystals(cells: dict[str, Atoms], moduli: dict[str, float]) -> None:
    """Print lattice constants and bulk moduli beside published ones."""
    table = Table()
    for column in ("crystal", NAME, "PBE", "experiment", "B", "B, PBE", "B, experiment"):
        table.add_column(column, justify="left" if column == "crystal" else "right")
    for name, atoms in cells.items():
        known = LITERATURE[name]
        ours = lattice(name, atoms)
        row = (ours, known.pbe, known.experiment, f"{moduli[name]:.0f}")
        table.add_row(name, *row, known.pbe_modulus, known.experiment_modulus)
    console.print(
        "[bold]6  Five crystals: lattice constants in Å, bulk moduli in GPa[/bold]", table
    )
    console.print(
        "PBE and experiment are published numbers, in brackets from memory. B is at the shape of "
        "the relaxed cell, which makes layers (LiCoO2) too stiff; of oxides of cobalt the data are "
        "PBE+U.\n"
    )


def screening(cells: dict[str, Atoms], folder: Path) -> dict[str, dict[str, float]]:
    """Screen crystals and rivals: relax them with their cells; return meV/atom above the best."""
    structures = {f"{name}, as in nature": atoms for name, atoms in cells.items()} | rivals()
    shutil.rmtree(folder, ignore_errors=True)
    stream = [Found(f"{name}#0", atoms) for name, atoms in structures.items()]
    steps = [
        "validate",
        {"relax": {"cell": True, "optimizer": "lbfgs"}},
        {"rank": {"by": "energy_per_atom"}},
    ]
    summary = screen(stream, NAME, out=folder, steps=steps)
    energies: dict[str, dict[str, float]] = defaultdict(dict)
    for row in summary.best:
        formula, _, kind = str(row["locator"]).partition("#")[0].partition(", ")
        energies[formula][kind] = row["energy_per_atom"]
    return {
        formula: {kind: 1e3 * (energy - min(kinds.values())) for kind, energy in kinds.items()}
        for formula, kinds in energies.items()
    }


def show_screening(above: dict[str, dict[str, float]]) -> None:
    """Print what the screening found."""
    table = Table("composition", "structures by energy, meV/atom above the best")
    for formula, kinds in above.items():
        ranked = sorted(kinds.items(), key=lambda item: item[1])
        table.add_row(formula, ", ".join(f"{kind} {energy:.0f}" for kind, energy in ranked))
    console.print("[bold]7  Screening of twelve structures[/bold]", table, "", sep="\n")


def dynamics(calculator: AtomeqCalculator, cells: dict[str, Atoms]) -> dict[str, np.ndarray]:
    """Run all crystals at constant energy, in one batch; return times, temperatures and drifts."""
    supercells = {
        name: make_supercell(atoms, np.diag([2, 2, 2] if len(atoms) < 6 else [2, 2, 1]))
        for name, atoms in cells.items()
    }
    sizes = [len(atoms) for atoms in supercells.values()]
    samples: list[list[tuple[float, float, float]]] = [[] for _ in sizes]

    def observe(state: MDState, indices: list[int]) -> None:
        kinetic = kinetic_energy(state.graph)
        for k, index in enumerate(indices):
            n_atoms, one = sizes[index], float(kinetic[k])
            temperature = 2 * one / (3 * (n_atoms - 1) * BOLTZMANN)
            total = 1e3 * (float(state.graph.energy[k]) + one) / n_atoms
            samples[index].append((TIMESTEP * (len(samples[index]) + 1) / 1e3, temperature, total))

    # From a perfect lattice half of the kinetic energy goes into the springs: start twice as hot.
    verlet = VelocityVerlet(timestep=TIMESTEP, temperature=2 * TEMPERATURE)
    start = time.perf_counter()
    structures = supercells.values()
    outcomes = list(
        simulate(structures, calculator.potential, verlet, n_steps=STEPS, observe=observe)
    )
    seconds = time.perf_counter() - start
    assert all(outcome.converged for outcome in outcomes)
    table = Table(
        "crystal", "atoms", "mean temperature, K", "total energy: largest excursion, meV/atom"
    )
    found = {}
    for name, size, rows in zip(supercells, sizes, samples, strict=True):
        times, temperatures, totals = np.array(rows).T
        found[name] = np.array([times, temperatures, totals - totals[0]])
        late = temperatures[len(temperatures) // 2 :].mean()
        table.add_row(name, str(size), f"{late:.0f}", f"{np.abs(totals - totals[0]).max():.3f}")
    console.print(
        f"[bold]8  Molecular dynamics: {STEPS * TIMESTEP / 1e3:g} ps of all five in one batch, "
        f"{seconds:.0f} s[/bold]",
        *(table, ""),
        sep="\n",
    )
    return found


def plot(
    equations: dict[str, tuple[list[float], list[float], EquationOfState]],
    above: dict[str, dict[str, float]],
    motion: dict[str, np.ndarray],
    path: Path,
) -> None:
    """Draw equations of state, the screening and the dynamics side by side."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for k, (name, (volumes, energies, fit)) in enumerate(equations.items()):
        fine = np.linspace(min(volumes), max(volumes), 60)
        left.plot(fine / fit.volume, 1e3 * (fit.energies(fine) - fit.energy), color=f"C{k}")
        shifted = 1e3 * (np.array(energies) - fit.energy)
        left.plot(np.array(volumes) / fit.volume, shifted, "o", color=f"C{k}", label=name)
        times, temperatures, _ = motion[name]
        right.plot(times, temperatures, color=f"C{k}", label=name)
    left.set(xlabel="volume / equilibrium volume", ylabel="energy above the minimum, meV/atom")
    left.set_title("Equations of state")
    left.legend()
    bars = [
        (f"{formula}, {kind}", energy, f"C{list(equations).index(formula)}")
        for formula, kinds in above.items()
        for kind, energy in sorted(kinds.items(), key=lambda item: item[1])
    ][::-1]
    labels, values, colours = zip(*bars, strict=True)
    middle.barh(labels, values, color=colours)
    middle.set(xlabel="energy above the best, meV/atom", title="Screening")
    middle.tick_params(axis="y", labelsize=8)
    right.axhline(TEMPERATURE, color="grey", linewidth=0.8)
    right.set(xlabel="time, ps", ylabel="temperature, K", title="Dynamics at constant energy")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def show(out: Path) -> Path:
    """Compute, print and draw it all; return the picture."""
    calculator = AtomeqCalculator(NAME)
    cells = relaxed_cells(calculator)
    equations = equations_of_state(calculator, cells)
    show_crystals(cells, {name: fit.bulk_modulus for name, (_, _, fit) in equations.items()})
    above = screening(cells, out / "screening")
    show_screening(above)
    motion = dynamics(calculator, cells)
    plot(equations, above, motion, out / "crystals.png")
    return out / "crystals.png"


def wheel_at_hand(given: Path | None) -> Path | None:
    """Return the wheel that was given, or that ATOMEQ_SEVENNET_WHEEL names."""
    named = os.environ.get("ATOMEQ_SEVENNET_WHEEL")
    return given or (Path(named) if named else None)


def main() -> None:
    parser = argparse.ArgumentParser(description="Five crystals with the potential sevennet-0.")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the figure")
    parser.add_argument(
        "--wheel", type=Path, default=None, help="of sevenn, where there is no index"
    )
    options = parser.parse_args()
    if install(wheel_at_hand(options.wheel)):
        console.print(f"Figure: {show(options.out)}")


if __name__ == "__main__":
    main()
