"""One run of molecular dynamics with ASE's integrators: trajectory, log and averages.

Degrees of freedom are counted as each integrator treats them: velocity Verlet and the Bussi
thermostat conserve the momentum of a structure, so its centre of mass is held and not counted;
Langevin dynamics shakes it, so it is.
"""

import csv
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixCom
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.md import MolecularDynamics
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet

from atomeq.calculators.ase import has_volume
from atomeq.cli.report import TrajectoryReport
from atomeq.cli.structures import structure_output
from atomeq.cli.terminal import Meter
from atomeq.files import write_atomically
from atomeq.graph.convert import StructureError
from atomeq.units import GPA

Ensemble = Literal["nve", "nvt", "npt"]
Thermostat = Literal["bussi", "langevin"]

_COLUMNS: tuple[str, ...] = (
    "step",
    "time_fs",
    "potential_energy_eV",
    "kinetic_energy_eV",
    "total_energy_eV",
    "temperature_K",
)
_CELL_COLUMNS = ("volume_A3", "pressure_GPa")


class MolecularDynamicsRun:
    """Molecular dynamics of one structure.

    Args:
        atoms: The structure with its calculator; moved in place.
        ensemble: ``nve``, ``nvt`` or ``npt``.
        temperature: Of velocities that are drawn, and of the thermostat, K.
        timestep: fs.
        thermostat: Of ``nvt``.
        thermostat_time: Relaxation time of the temperature, fs.
        pressure: Of ``npt``, GPa.
        isotropic: Of ``npt``: the cell keeps its shape.
        barostat_time: Relaxation time of the cell, fs.
        new_velocities: Draw velocities even where the structure has some.
        seed: Of velocities and noise.

    Raises:
        ValueError: The structure has a single atom, or no volume for ``npt``, or constraints that
            the integrator does not respect.
    """

    def __init__(
        self,
        atoms: Atoms,
        *,
        ensemble: Ensemble,
        temperature: float,
        timestep: float,
        thermostat: Thermostat = "bussi",
        thermostat_time: float = 100.0,
        pressure: float = 0.0,
        isotropic: bool = True,
        barostat_time: float = 1000.0,
        new_velocities: bool = False,
        seed: int = 0,
    ) -> None:
        self.atoms, self.ensemble, self.temperature = atoms, ensemble, temperature
        self.timestep = timestep
        self._refuse()
        random = np.random.default_rng(seed)
        self.user_constraints = list(atoms.constraints)
        conserves_momentum = ensemble == "nve" or (ensemble == "nvt" and thermostat == "bussi")
        if conserves_momentum and not self.user_constraints:
            atoms.set_constraint(FixCom())
        self.drawn = new_velocities or not np.any(atoms.get_momenta())
        if self.drawn:
            thermalize_momenta(atoms, temperature, exact_temperature=True, rng=random)
        self.dynamics = self._integrator(
            thermostat, thermostat_time, pressure, isotropic, barostat_time, random
        )

    def run(self, steps: int, *, out: str | Path, interval: int) -> dict[str, Any]:
        """Integrate, writing the trajectory, the log and the report.

        Args:
            steps: Number of steps.
            out: The trajectory; the log gets the suffix ``.log.csv``.
            interval: Steps between frames and between lines of the log.

        Returns:
            Averages over the run and the speed, ready for JSON.

        Raises:
            ValueError: The structure flew apart.
        """
        log_path = Path(out).with_suffix(".log.csv")
        keep = (KeyboardInterrupt,)
        meter = Meter(f"md {self.ensemble}", steps, unit="steps")
        lines: list[dict[str, float]] = []
        report = TrajectoryReport()
        started = time.perf_counter()
        with (
            structure_output(out, keep_on=keep) as output,
            write_atomically(log_path, keep_on=keep) as partial,
            partial.open("w", encoding="utf-8", newline="") as stream,
            meter.running(),
        ):
            log = self._open_log(stream)
            for _ in self._stepping(steps):
                step = self.dynamics.nsteps
                if step % interval == 0 or step == steps:
                    lines.append(self._line())
                    log.writerow(lines[-1])
                    stream.flush()
                    output.write(self._frame())
                    report.add(self.atoms)
                if step:
                    meter.advance(note=f"{self.atoms.get_temperature():.0f} K")
        seconds = time.perf_counter() - started
        return {
            "log": str(log_path),
            "report": [str(path) for path in report.write(out, lines)],
            "steps": steps,
            "steps_per_second": steps / seconds,
            "velocities": "drawn" if self.drawn else "from the file",
            **self._averages(lines),
        }

    @staticmethod
    def table(results: dict[str, Any]) -> list[list[str]]:
        """Return the rows of the table a user sees after the run."""
        shown = {
            "steps": "steps",
            "steps_per_second": "steps per second",
            "mean_temperature_K": "mean temperature / K",
            "mean_potential_energy_eV": "mean potential energy / eV",
            "drift_meV_per_atom_per_ps": "drift of the total energy / meV/atom/ps",
            "mean_volume_A3": "mean volume / Å³",
            "mean_pressure_GPa": "mean pressure / GPa",
        }
        return [[label, f"{results[key]:.6g}"] for key, label in shown.items() if key in results]

    def _refuse(self) -> None:
        if len(self.atoms) < 2:
            raise ValueError(
                "molecular dynamics needs at least two atoms: one alone feels no force and, with "
                "its centre of mass at rest, has no temperature"
            )
        if self.ensemble != "npt":
            return
        if not has_volume(self.atoms):
            raise ValueError(
                f"npt needs a cell that is periodic in three directions, this one has pbc "
                f"{self.atoms.pbc.tolist()}; use nvt"
            )
        if self.atoms.constraints:
            raise ValueError("npt does not respect fixed atoms; use nvt, or free them")

    def _integrator(
        self,
        thermostat: Thermostat,
        thermostat_time: float,
        pressure: float,
        isotropic: bool,
        barostat_time: float,
        random: np.random.Generator,
    ) -> MolecularDynamics:
        atoms, step = self.atoms, self.timestep * units.fs
        if self.ensemble == "nve":
            return VelocityVerlet(atoms, timestep=step)
        if self.ensemble == "npt":
            with warnings.catch_warnings():
                # It announces the cell's mass, which follows from its relaxation time.
                warnings.filterwarnings("ignore", message="Using heuristic P_mass")
                return LangevinBAOAB(
                    atoms,
                    step,
                    temperature_K=self.temperature,
                    externalstress=-pressure * GPA,
                    hydrostatic=isotropic,
                    T_tau=thermostat_time * units.fs,
                    P_tau=barostat_time * units.fs,
                    rng=random,
                )
        relaxation = thermostat_time * units.fs
        if thermostat == "bussi":
            return Bussi(atoms, step, temperature_K=self.temperature, taut=relaxation, rng=random)
        return Langevin(
            atoms,
            step,
            temperature_K=self.temperature,
            friction=1 / relaxation,
            fixcm=False,  # ASE's own option for it does not sample the ensemble
            rng=random,
        )

    def _stepping(self, steps: int) -> Iterator[bool]:
        """Yield after every step, saying where a structure that flies apart did so."""
        try:
            yield from self.dynamics.irun(steps)
        except StructureError as error:
            raise ValueError(
                f"the run broke down at step {self.dynamics.nsteps}: {error}; start from a relaxed "
                "structure or take a smaller --timestep"
            ) from error

    def _open_log(self, stream: TextIO) -> csv.DictWriter:
        columns = _COLUMNS + (_CELL_COLUMNS if self.ensemble == "npt" else ())
        log = csv.DictWriter(stream, columns)
        log.writeheader()
        return log

    def _line(self) -> dict[str, float]:
        atoms, step = self.atoms, self.dynamics.nsteps
        potential, kinetic = atoms.get_potential_energy(), atoms.get_kinetic_energy()
        values = [step, step * self.timestep, potential, kinetic, potential + kinetic]
        values.append(atoms.get_temperature())
        line = {key: float(value) for key, value in zip(_COLUMNS, values, strict=True)}
        if self.ensemble == "npt":
            stress = atoms.get_stress(voigt=False, include_ideal_gas=True)
            line["volume_A3"] = float(atoms.get_volume())
            line["pressure_GPa"] = -float(np.trace(stress)) / 3 / GPA
        return line

    def _frame(self) -> Atoms:
        """Return the structure as it is written: with the constraints of the user only."""
        frame = self.atoms.copy()
        frame.set_constraint(self.user_constraints)
        frame.info["step"] = self.dynamics.nsteps
        frame.info["time_fs"] = self.dynamics.nsteps * self.timestep
        frame.calc = SinglePointCalculator(
            frame,
            energy=self.atoms.get_potential_energy(),
            forces=self.atoms.get_forces(apply_constraint=False),
        )
        return frame

    def _averages(self, lines: list[dict[str, float]]) -> dict[str, Any]:
        columns = {key: np.array([line[key] for line in lines]) for key in lines[0]}
        averages: dict[str, Any] = {
            "mean_temperature_K": float(columns["temperature_K"].mean()),
            "std_temperature_K": float(columns["temperature_K"].std()),
            "mean_potential_energy_eV": float(columns["potential_energy_eV"].mean()),
            "final_total_energy_eV": float(columns["total_energy_eV"][-1]),
        }
        if self.ensemble == "nve" and len(lines) > 2:
            slope = np.polyfit(columns["time_fs"], columns["total_energy_eV"], 1)[0]
            averages["drift_meV_per_atom_per_ps"] = 1e6 * float(slope) / len(self.atoms)
        if self.ensemble == "npt":
            averages["mean_volume_A3"] = float(columns["volume_A3"].mean())
            averages["mean_pressure_GPa"] = float(columns["pressure_GPa"].mean())
        return averages
