"""``atomeq md``: molecular dynamics of one structure or many, by :mod:`atomeq.dynamics`.

The run is kept in a folder beside the output. Log, report and averages are made of its frames when
it ends, so nothing but the state of the engine has to be saved for a restart.
"""

import csv
import os
import shutil
import time
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from jsonargparse import Namespace

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli.door import kept_path
from atomeq.cli.report import Run, TrajectoryReport, draw_runs
from atomeq.cli.restart import RunFolder, identity
from atomeq.cli.structures import structure_output, write_summary
from atomeq.cli.terminal import Meter, say, show_table
from atomeq.cli.verbs import prepare, settings
from atomeq.dynamics.barostat import LangevinNPT
from atomeq.dynamics.evaluator import Evaluator
from atomeq.dynamics.in_flight import Outcome
from atomeq.dynamics.integrators import (
    Bussi,
    Integrator,
    Langevin,
    MDState,
    NoseHoover,
    Ramp,
    VelocityVerlet,
)
from atomeq.dynamics.kinetics import degrees_of_freedom
from atomeq.dynamics.run import simulate
from atomeq.files import refuse_existing, write_atomically
from atomeq.graph.convert import StructureError
from atomeq.units import BOLTZMANN, GPA

_COLUMNS = (
    "step",
    "time_fs",
    "potential_energy_eV",
    "kinetic_energy_eV",
    "total_energy_eV",
    "temperature_K",
)
_SHOWN = {
    "steps": "steps",
    "steps_per_second": "steps per second",
    "mean_temperature_K": "mean temperature / K",
    "mean_potential_energy_eV": "mean potential energy / eV",
    "drift_meV_per_atom_per_ps": "drift of the total energy / meV/atom/ps",
    "mean_volume_A3": "mean volume / Å³",
    "mean_pressure_GPa": "mean pressure / GPa",
}


def md(options: Namespace) -> int:
    """Run molecular dynamics."""
    kept = kept_path("md", options.out)
    integrator = integrator_of(options)
    calculator, structures = prepare(options, index=options.index)
    outs = _outputs(Path(options.out), len(structures))
    if not (options.restart and kept.exists()):
        refuse_existing(*outs, overwrite=options.overwrite)
    drawn = [options.new_velocities or not atoms.get_momenta().any() for atoms in structures]
    for atoms, fresh in zip(structures, drawn, strict=True):
        if fresh:
            atoms.arrays.pop("momenta", None)
    _refuse(structures, calculator, integrator, options)
    lasting = ("steps",) if options.temperature_end is None else ()  # a ramp lasts over all steps
    about = identity(options, calculator, free=("checkpoint_interval", *lasting))
    folder = RunFolder(kept, about, restart=options.restart)
    _put_back(folder, outs)
    outcomes, told = _simulated(folder, structures, calculator, integrator, options)
    runs, rows = [], []
    for out, outcome, fresh in zip(outs, outcomes, drawn, strict=True):
        run, row = _recorded(folder.frames(outcome.index), out, outcome, integrator)
        runs.append(run)
        rows.append({**row, "velocities": "drawn" if fresh else "from the file"})
    picture = draw_runs(options.out, [run for run in runs if run is not None])
    return _finish(options, calculator, told, rows, picture)


def integrator_of(options: Namespace) -> Integrator:
    """Return the integrator that the options ask for.

    Raises:
        ValueError: A ramp of the temperature without a thermostat.
    """
    step, relaxation = options.timestep, options.thermostat_time
    temperature: float | Ramp = options.temperature
    if options.temperature_end is not None:
        if options.ensemble == "nve":
            raise ValueError("--temperature-end needs a thermostat; take --ensemble nvt or npt")
        temperature = Ramp(options.temperature, options.temperature_end, options.steps)
    if options.ensemble == "nve":
        return VelocityVerlet(step, temperature)
    if options.ensemble == "npt":
        return LangevinNPT(
            step,
            temperature,
            friction_time=relaxation,
            pressure=options.pressure * GPA,
            barostat="isotropic" if options.barostat == "isotropic" else "full",
            barostat_time=options.barostat_time,
        )
    if options.thermostat == "langevin":
        return Langevin(step, temperature, friction_time=relaxation)
    kind = Bussi if options.thermostat == "bussi" else NoseHoover
    return kind(step, temperature, relaxation_time=relaxation)


def _refuse(
    structures: list[Atoms],
    calculator: AtomeqCalculator,
    integrator: Integrator,
    options: Namespace,
) -> None:
    """Refuse what cannot be integrated before anything is computed."""
    evaluate = Evaluator(calculator.potential, max_uncertainty=options.max_uncertainty)
    for k, atoms in enumerate(structures):
        try:
            integrator.check(evaluate.prepare(atoms))
        except StructureError as error:
            raise ValueError(
                f"{options.input}[{k}] ({atoms.symbols}) cannot run as {options.ensemble}: {error}"
            ) from error


def _outputs(out: Path, n_structures: int) -> list[Path]:
    if n_structures == 1:
        return [out]
    width = len(str(n_structures - 1))
    return [out.with_stem(f"{out.stem}-{k:0{width}d}") for k in range(n_structures)]


def _put_back(folder: RunFolder, outs: list[Path]) -> None:
    """Return the frames of a run that had ended to its folder, for what is appended now."""
    for k, out in enumerate(outs):
        frames = folder.frames(k)
        if out.suffix != ".traj" and out.exists() and not frames.exists():
            with write_atomically(frames) as partial:
                shutil.copyfile(out, partial)


def _simulated(
    folder: RunFolder,
    structures: list[Atoms],
    calculator: AtomeqCalculator,
    integrator: Integrator,
    options: Namespace,
) -> tuple[list[Outcome], dict[str, Any]]:
    """Run; return the outcomes in order, and what a summary tells of the run as a whole."""
    unit, begun, n_new = "steps", {}, 0
    meter = Meter(f"md {options.ensemble}", options.steps * len(structures), unit=unit)

    def observe(state: MDState, indices: list[int]) -> None:
        nonlocal n_new
        for k, n_steps in zip(indices, state.n_steps.tolist(), strict=True):
            if k not in begun:  # the first step of this run
                begun[k] = max(n_steps - 1, 0)
                meter.skip(begun[k])
        n_new += len(indices)
        meter.advance(len(indices), note=f"{float(state.temperature().mean()):.0f} K")

    outcomes: dict[int, Outcome] = {}
    started = time.perf_counter()
    with folder.kept(), meter.running():
        for outcome in simulate(
            structures,
            Evaluator(calculator.potential, max_uncertainty=options.max_uncertainty),
            integrator,
            n_steps=options.steps,
            seed=options.seed,
            folder=folder.path,
            interval=options.interval,
            checkpoint_interval=options.checkpoint_interval,
            restart=True,  # the folder is what is left of the run, if anything
            observe=observe,
        ):
            outcomes[outcome.index] = outcome
            if outcome.index not in begun:
                begun[outcome.index] = outcome.n_steps
    told: dict[str, Any] = {"steps_per_second": n_new / (time.perf_counter() - started)}
    if any(begun.values()):
        told["restarted_at_step"] = min(begun.values())
    return [outcomes[k] for k in range(len(structures))], told


def _recorded(
    frames: Path, out: Path, outcome: Outcome, integrator: Integrator
) -> tuple[Run | None, dict[str, Any]]:
    """Write the trajectory, log and report of a structure; return its run and its row."""
    row: dict[str, Any] = {"steps": outcome.n_steps, "status": outcome.status}
    if outcome.reason:
        row["reason"] = outcome.reason
    if outcome.graph is None or not frames.exists():
        return None, row
    degrees = int(degrees_of_freedom(outcome.graph, held=integrator.holds_drift))
    with_cell = isinstance(integrator, LangevinNPT)
    run = Run([], TrajectoryReport(), outcome.graph.n_atoms)
    for atoms in ase.io.iread(frames, index=":"):
        run.lines.append(_line(atoms, degrees, with_cell=with_cell))
        run.report.add(atoms)
    log = out.with_suffix(".log.csv")
    with write_atomically(log) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, run.lines[0])
        writer.writeheader()
        writer.writerows(run.lines)
    row |= {"output": str(out), "log": str(log), "report": str(run.write(out))}
    if out.suffix == ".traj":  # its frames stay in the folder as well, from where a run is extended
        with structure_output(out) as output:
            for atoms in ase.io.iread(frames, index=":"):
                output.write(atoms)
    else:
        os.replace(frames, out)
    return run, row | _averages(run, with_drift=type(integrator) is VelocityVerlet)


def _line(atoms: Atoms, degrees: int, *, with_cell: bool) -> dict[str, float]:
    potential, kinetic = atoms.get_potential_energy(), atoms.get_kinetic_energy()
    values = [atoms.info["step"], atoms.info["time_fs"], potential, kinetic, potential + kinetic]
    values.append(2 * kinetic / (BOLTZMANN * degrees))
    line = {key: float(value) for key, value in zip(_COLUMNS, values, strict=True)}
    if with_cell:
        stress = atoms.get_stress(voigt=False, include_ideal_gas=True)
        line["volume_A3"] = float(atoms.get_volume())
        line["pressure_GPa"] = -float(np.trace(stress)) / 3 / GPA
    return line


def _averages(run: Run, *, with_drift: bool) -> dict[str, float]:
    temperatures, energies = run.column("temperature_K"), run.column("total_energy_eV")
    averages = {
        "mean_temperature_K": float(np.mean(temperatures)),
        "std_temperature_K": float(np.std(temperatures)),
        "mean_potential_energy_eV": float(np.mean(run.column("potential_energy_eV"))),
        "final_total_energy_eV": energies[-1],
    }
    if with_drift and len(energies) > 2:
        slope = np.polyfit(run.column("time_fs"), energies, 1)[0]
        averages["drift_meV_per_atom_per_ps"] = 1e6 * float(slope) / run.n_atoms
    if "volume_A3" in run.lines[0]:
        averages["mean_volume_A3"] = float(np.mean(run.column("volume_A3")))
        averages["mean_pressure_GPa"] = float(np.mean(run.column("pressure_GPa")))
    return averages


def _finish(
    options: Namespace,
    calculator: AtomeqCalculator,
    told: dict[str, Any],
    rows: list[dict[str, Any]],
    picture: Path,
) -> int:
    """Write the summary, show the table and say what broke down; return the exit code."""
    several = len(rows) > 1
    results = {**told, "picture": str(picture)}
    results |= {"n_structures": len(rows), "structures": rows} if several else rows[0]
    summary = write_summary(
        "md",
        options.out,
        source=options.input,
        calculator=calculator,
        settings=settings(options),
        results=results,
    )
    full = [{**told, **row} for row in rows]
    keys = [key for key in _SHOWN if any(key in row for row in full)]
    cells = [[f"{row[key]:.6g}" if key in row else "-" for key in keys] for row in full]
    if several:
        columns = ["structure", *(_SHOWN[key] for key in keys)]
        show_table(columns, [[str(k), *row] for k, row in enumerate(cells)])
    else:
        show_table(
            ["quantity", "value"], [[_SHOWN[k], x] for k, x in zip(keys, cells[0], strict=True)]
        )
    say(f"began with structure{'s' if several else ''} {options.index} of {options.input}")
    for k, row in enumerate(rows):
        if row["status"] != "completed":
            say(
                f"structure {k} broke down after step {row['steps']}: {row['reason']}; its frames "
                f"until then are kept. Take a smaller --timestep than {options.timestep:g} fs, or "
                "start from a relaxed structure"
            )
    if told["steps_per_second"] == 0:
        say(f"nothing was left to do of {options.steps} steps; larger --steps extend the run")
    files = [row[name] for row in rows[:1] for name in ("output", "log", "report") if name in row]
    more = f" and those of {len(rows) - 1} more" if several else ""
    say(f"wrote {', '.join([*files, str(picture)])}{more} and {summary}")
    return 0 if all(row["status"] == "completed" for row in rows) else 1
