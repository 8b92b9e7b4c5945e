"""Motion in LAMMPS beside ASE's: drift of the energy, and what a step costs beside the potential.

The same copper crystal with the same velocities moves at constant energy by ``cu-pbe``, in LAMMPS
through ``fix external`` and in ASE by VelocityVerlet. The two take turns, a few steps each, whose
CPU times are compared; what LAMMPS spends outside of the call for forces is told apart. LAMMPS gets
the virial at each step, so ASE asks for the stress too.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet
from rich.console import Console

from atomeq import AtomeqCalculator
from atomeq.calculators.lammps import LammpsForces, lammps
from benchmarks.judged import Judged, table_of
from benchmarks.record import RESULTS, machine, write

TIMESTEP = 2.0  # fs
TEMPERATURE = 600.0  # K, of which half goes into the springs


def copper(repeat: int) -> Atoms:
    """Return a cube of copper in motion."""
    atoms = bulk("Cu", cubic=True, a=3.64).repeat(repeat)
    thermalize_momenta(atoms, TEMPERATURE, rng=np.random.default_rng(0))
    Stationary(atoms)
    return atoms


class Timed(LammpsForces):
    """Adds up the CPU seconds of LAMMPS' calls for forces."""

    seconds = 0.0

    def _called(self, *words: Any) -> None:
        started = time.process_time()
        super()._called(*words)
        self.seconds += time.process_time() - started


class InLammps:
    """Copper that LAMMPS moves."""

    def __init__(self, atoms: Atoms, dtype: str) -> None:
        self.lmp = lmp = lammps("-screen", "none", "-log", "none", "-nocite")
        lx, ly, lz = atoms.cell.lengths().tolist()
        lmp.commands_string(f"""
units metal
atom_modify map yes
region box block 0 {lx!r} 0 {ly!r} 0 {lz!r}
create_box 1 box
mass 1 {float(atoms.get_masses()[0])!r}
pair_style zero 6.0
pair_coeff * *
timestep {TIMESTEP / 1e3}
fix move all nve
""")
        lmp.create_atoms(len(atoms), None, [1] * len(atoms), atoms.positions.ravel().tolist())
        tags = lmp.numpy.extract_atom("id")[: len(atoms)]
        per_ps = 1e3 * units.fs  # LAMMPS counts in Å/ps
        lmp.numpy.extract_atom("v")[: len(atoms)] = atoms.get_velocities()[tags - 1] * per_ps
        self.forces = Timed(lmp, "cu-pbe", ["Cu"], dtype=dtype)
        self.forces.run("run 0")

    def run(self, n_steps: int) -> None:
        """Move on."""
        self.forces.run(f"run {n_steps} pre no post no")

    def total(self) -> float:
        """Return the energy, eV."""
        return self.forces.energy + self.lmp.get_thermo("ke")


class InASE:
    """Copper that ASE moves."""

    def __init__(self, atoms: Atoms, dtype: str) -> None:
        self.atoms = atoms
        atoms.calc = AtomeqCalculator("cu-pbe", dtype=dtype)
        self.dynamics = VelocityVerlet(atoms, TIMESTEP * units.fs)
        self.dynamics.attach(atoms.get_stress)
        self.dynamics.run(0)

    def run(self, n_steps: int) -> None:
        """Move on."""
        self.dynamics.run(n_steps)

    def total(self) -> float:
        """Return the energy, eV."""
        return self.atoms.get_potential_energy() + self.atoms.get_kinetic_energy()


def cpu_seconds(call: Callable[[], None]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def side_by_side(repeat: int, dtype: str, n_rounds: int, n_steps: int) -> dict[str, Any]:
    """Let both take turns of some steps each; times are medians over the rounds, ms of a step."""
    atoms = copper(repeat)
    ours, ase = InLammps(atoms, dtype), InASE(atoms, dtype)
    times: dict[str, list[float]] = {"lammps": [], "callback": [], "ase": []}
    totals = [(ours.total(), ase.total())]
    for k in range(n_rounds):
        for motion in (ours, ase)[:: 1 - 2 * (k % 2)]:
            name, before = ("ase", 0.0) if motion is ase else ("lammps", ours.forces.seconds)
            times[name].append(cpu_seconds(lambda one=motion: one.run(n_steps)))
            if name == "lammps":
                times["callback"].append(ours.forces.seconds - before)
        totals.append((ours.total(), ase.total()))
    ps = 1e-3 * TIMESTEP * n_steps * np.arange(n_rounds + 1)
    per_atom = 1e3 * (np.array(totals) - totals[0]) / len(atoms)  # meV
    slopes = np.polyfit(ps, per_atom, 1)[0]
    pairs = list(zip(*times.values(), strict=True))
    return {
        "atoms": len(atoms),
        "dtype": dtype,
        "ps": float(ps[-1]),
        "drift_lammps": float(slopes[0]),
        "drift_ase": float(slopes[1]),
        **{f"ms_{key}": 1e3 * statistics.median(value) / n_steps for key, value in times.items()},
        "outside_of_callback": statistics.median(a / b - 1 for a, b, _ in pairs),
        "lammps_over_ase": statistics.median(a / c for a, _, c in pairs),
    }


def bars(rows: list[dict[str, Any]]) -> Iterator[Judged]:
    """Judge what was measured."""
    for row in rows:
        what = f"{row['atoms']} atoms, {row['dtype']}"
        apart = abs(row["drift_lammps"] - row["drift_ase"])
        drifts = f"{row['drift_lammps']:+.4f}, {row['drift_ase']:+.4f} meV/atom/ps"
        yield Judged(f"{what}: drift in {row['ps']:g} ps, LAMMPS and ASE", drifts)
        yield Judged.at_most(f"{what}: apart by", apart, 1e-3, "meV/atom/ps")
        step = f"{row['ms_lammps']:.1f}, {row['ms_ase']:.1f} ms"
        yield Judged(f"{what}: a step of LAMMPS, of ASE", step)
        yield Judged(f"{what}: LAMMPS / ASE", f"{row['lammps_over_ase']:.3f}")
        outside = 100 * row["outside_of_callback"]
        yield Judged.at_most(f"{what}: outside of the call for forces", outside, 2.0, "%")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    n = 4 if options.quick else 20
    plan = [(3, "float64", n, 25), (5, "float32", n, 5), (10, "float32", n // 3, 2)]
    rows = [side_by_side(*words) for words in plan]
    if not options.quick:
        write(RESULTS / "lammps_cpu.json", {"machine": machine(), "rows": rows})
    Console(width=110).print(table_of("cu-pbe at constant energy, one CPU thread", bars(rows)))
    return 0
