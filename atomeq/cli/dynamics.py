"""One run of molecular dynamics with ASE's integrators: trajectory, log, averages and restart.

Degrees of freedom are counted as each integrator treats them: velocity Verlet and the Bussi
thermostat conserve the momentum of a structure, so its centre of mass is held and not counted;
Langevin dynamics shakes it, so it is.

A checkpoint holds what the next steps depend on, to the last bit: positions, momenta, cell, the
state of the random numbers and what the integrator keeps. So every ensemble and thermostat goes on
as if nothing had happened, on a CPU bit for bit.
"""

import csv
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
from atomeq.cli.restart import Checkpoint
from atomeq.cli.structures import StructureWriter, copy_beginning, structure_output
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
# What ASE's integrators carry from step to step beside the atoms and the random numbers.
_CARRIED = ("p_eps", "force_eps", "accel", "transferred_energy")


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
        self._random = random = np.random.default_rng(seed)
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

    def run(
        self,
        steps: int,
        *,
        out: str | Path,
        interval: int,
        checkpoint: Checkpoint | None = None,
        checkpoint_interval: int = 100,
        restart: bool = False,
    ) -> dict[str, Any]:
        """Integrate, writing the trajectory, the log and the report.

        Args:
            steps: Number of steps, those before a restart among them.
            out: The trajectory; the log gets the suffix ``.log.csv``.
            interval: Steps between frames and between lines of the log.
            checkpoint: Where the state is kept meanwhile; nowhere by default.
            checkpoint_interval: Steps between checkpoints.
            restart: Go on from the checkpoint, if there is one.

        Returns:
            Averages over the run and the speed, ready for JSON.

        Raises:
            ValueError: The structure flew apart, or the checkpoint is of another run.
        """
        saved = checkpoint.load() if checkpoint is not None and restart else None
        record = _Record(self, saved)
        begun = 0 if saved is None else self._restore(saved)
        meter = Meter(f"md {self.ensemble}", steps, unit="steps", done=begun)
        started = time.perf_counter()
        with record.writing(out), meter.running():
            if checkpoint is not None and saved is not None:
                self._save(checkpoint, record)  # before what the killed run wrote may go
                record.discard(saved)
            for _ in self._stepping(steps - begun, checkpoint):
                step = self.dynamics.nsteps
                if saved is not None and step == begun:
                    continue  # is on record
                if step % interval == 0 or step == steps:
                    record.add(self._line(), self._frame())
                if step:
                    meter.advance(note=f"{self.atoms.get_temperature():.0f} K")
                if checkpoint is not None and step % checkpoint_interval == 0 and 0 < step < steps:
                    self._save(checkpoint, record)
        if checkpoint is not None:
            checkpoint.remove()
        seconds = time.perf_counter() - started
        return {
            "log": str(record.log_path(out)),
            "report": [str(path) for path in record.report.write(out, record.lines)],
            "steps": steps,
            **({"restarted_at_step": begun} if saved is not None else {}),
            "steps_per_second": (steps - begun) / seconds,
            "velocities": "drawn" if self.drawn else "from the file",
            **self._averages(record.lines),
        }

    def _save(self, checkpoint: Checkpoint, record: "_Record") -> None:
        atoms, carried = self.atoms, vars(self.dynamics)
        checkpoint.save(
            {
                "step": self.dynamics.nsteps,
                "positions": atoms.positions.tolist(),
                "momenta": atoms.get_momenta().tolist(),
                "cell": atoms.cell.array.tolist(),
                "random": self._random.bit_generator.state,
                "carried": {
                    name: np.asarray(carried[name]).tolist() for name in _CARRIED if name in carried
                },
                "drawn": self.drawn,
                **record.state(),
            }
        )

    def _restore(self, saved: dict[str, Any]) -> int:
        """Take up the state of a checkpoint; return its step."""
        atoms = self.atoms
        # Not by set_positions and set_momenta, where constraints would have their say.
        atoms.arrays["positions"][:] = saved["positions"]
        atoms.arrays["momenta"][:] = saved["momenta"]
        atoms.set_cell(saved["cell"])
        self._random.bit_generator.state = saved["random"]
        for name, value in saved["carried"].items():
            setattr(self.dynamics, name, np.array(value) if isinstance(value, list) else value)
        self.drawn = saved["drawn"]
        self.dynamics.nsteps = saved["step"]
        return saved["step"]

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

    def _stepping(self, steps: int, checkpoint: Checkpoint | None) -> Iterator[bool]:
        """Yield after every step, saying where a structure that flies apart did so."""
        try:
            yield from self.dynamics.irun(steps)
        except StructureError as error:
            if checkpoint is not None:
                checkpoint.remove()  # it would only fly apart again
            raise ValueError(
                f"the run broke down at step {self.dynamics.nsteps}: {error}; start from a relaxed "
                "structure or take a smaller --timestep"
            ) from error

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


class _Record:
    """The trajectory, the log and the report of a run, which a restart takes up.

    Args:
        run: Whose record it is.
        saved: A checkpoint that holds an earlier record's state.
    """

    def __init__(self, run: MolecularDynamicsRun, saved: dict[str, Any] | None) -> None:
        self._atoms = run.atoms
        self._columns = _COLUMNS + (_CELL_COLUMNS if run.ensemble == "npt" else ())
        self._saved = saved
        self.lines: list[dict[str, float]] = []
        self.report = TrajectoryReport()
        if saved is not None:
            self.report = TrajectoryReport.restored(saved["report"], run.atoms)
        self._output: StructureWriter
        self._log: csv.DictWriter
        self._stream: TextIO

    @staticmethod
    def log_path(out: str | Path) -> Path:
        """Return where the log is."""
        return Path(out).with_suffix(".log.csv")

    @contextmanager
    def writing(self, out: str | Path) -> Iterator[None]:
        """Open the files, which get their names when the block ends well."""
        keep, begin = (KeyboardInterrupt,), None
        if self._saved is not None:
            begin = Path(self._saved["trajectory"][0]), self._saved["trajectory"][1]
        with (
            structure_output(out, keep_on=keep, begin=begin) as self._output,
            write_atomically(self.log_path(out), keep_on=keep) as partial,
        ):
            if self._saved is not None:
                copy_beginning(Path(self._saved["log"][0]), self._saved["log"][1], partial)
                with partial.open(encoding="utf-8", newline="") as stream:
                    self.lines = [
                        {key: float(value) for key, value in line.items()}
                        for line in csv.DictReader(stream)
                    ]
            with partial.open("a", encoding="utf-8", newline="") as self._stream:
                self._log = csv.DictWriter(self._stream, self._columns)
                if self._saved is None:
                    self._log.writeheader()
                yield

    def add(self, line: dict[str, float], frame: Atoms) -> None:
        """Take up a moment."""
        self.lines.append(line)
        self._log.writerow(line)
        self._stream.flush()
        self._output.write(frame)
        self.report.add(self._atoms)

    def state(self) -> dict[str, Any]:
        """Return what a restart needs: how far the files go, and the report."""
        return {
            "trajectory": [str(self._output.path.resolve()), self._output.extent],
            "log": [str(Path(self._stream.name).resolve()), self._stream.tell()],
            "report": self.report.state(),
        }

    @staticmethod
    def discard(saved: dict[str, Any]) -> None:
        """Remove the files of the interrupted run, whose content has been taken over."""
        for path, _ in (saved["trajectory"], saved["log"]):
            Path(path).unlink(missing_ok=True)
