"""``atomeq single-point``, ``atomeq relax`` and ``atomeq md``: structures in, results out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS, FIRE, LBFGS
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt

from atomeq.calculators.ase import AtomeqCalculator, has_volume
from atomeq.cli.dynamics import Ensemble, MolecularDynamicsRun, Thermostat
from atomeq.cli.restart import RESTART_HELP, Checkpoint, identity
from atomeq.cli.structures import (
    output_format,
    structure_output,
    with_results,
    write_summary,
)
from atomeq.cli.terminal import Meter, Parser, say, show_table
from atomeq.cli.verbs import prepare, settings, simulation_parser
from atomeq.graph.convert import StructureError
from atomeq.units import GPA

_OPTIMIZERS = {"fire": FIRE, "lbfgs": LBFGS, "bfgs": BFGS}

_DESCRIPTIONS = {
    "single-point": """\
Compute energy, forces and, where the cell has a volume, stress of every structure in a file.

example:
  atomeq single-point cu.cif --potential cu-pbe --out cu.extxyz
""",
    "relax": """\
Move the atoms of every structure in a file until the largest force is below --fmax; with --cell
also the lattice, until the stress vanishes. Exit code 1 says that some structure did not converge.

example:
  atomeq relax cu.cif --potential cu-pbe --out relaxed.extxyz --fmax 0.01 --cell
""",
    "md": """\
Run molecular dynamics from the last structure of a file. Velocities are those of the file, or
drawn for --temperature. Beside the trajectory OUT.extxyz stand OUT.log.csv (energies, temperature),
OUT.report.json and OUT.png (temperature, total energy, radial distribution, mean squared
displacement) and OUT.summary.json. A run that is interrupted leaves OUT.part-<process>.extxyz and
OUT.checkpoint.json, from which --restart goes on, whatever the thermostat, to the very trajectory
of an uninterrupted run (on a GPU up to rounding).

nve  velocity Verlet: constant energy
nvt  --thermostat bussi (stochastic velocity rescaling) or langevin
npt  Langevin thermostat and barostat (BAOAB); --barostat isotropic keeps the shape of the cell

example:
  atomeq md cu.cif --potential cu-pbe --ensemble nvt --temperature 300 --timestep 2 --steps 1000 \\
      --out md.extxyz
""",
}


def main(argv: Sequence[str]) -> int:
    """Run one of the simulation verbs.

    Args:
        argv: The verb and its options.

    Returns:
        0, or 1 where a relaxation did not converge.
    """
    verb, *words = argv
    parser = build_parser(verb)
    return {"single-point": single_point, "relax": relax, "md": md}[verb](parser.parse_args(words))


def build_parser(verb: str) -> Parser:
    """Return the parser of a simulation verb."""
    parser = simulation_parser(verb, _DESCRIPTIONS[verb])
    if verb == "relax":
        _add_relax_options(parser)
    if verb == "md":
        _add_md_options(parser)
    return parser


def _add_relax_options(parser: Parser) -> None:
    parser.add_argument("--fmax", type=PositiveFloat, default=0.01, help="largest force left, eV/Å")
    parser.add_argument("--cell", action="store_true", help="relax the lattice as well")
    parser.add_argument("--pressure", type=float, default=0.0, help="with --cell, in GPa")
    parser.add_argument(
        "--optimizer", type=Literal["fire", "lbfgs", "bfgs"], default="lbfgs", help="ASE optimizer"
    )
    parser.add_argument(
        "--max-steps", type=PositiveInt, default=500, help="give up on a structure after"
    )


def _add_md_options(parser: Parser) -> None:
    parser.add_argument("--ensemble", type=Ensemble, default="nvt", help="nve, nvt or npt")
    parser.add_argument("--temperature", type=PositiveFloat, default=300.0, help="K")
    parser.add_argument("--timestep", type=PositiveFloat, default=1.0, help="fs")
    parser.add_argument("--steps", type=PositiveInt, default=1000, help="number of steps")
    parser.add_argument("--thermostat", type=Thermostat, default="bussi", help="of nvt")
    parser.add_argument(
        "--thermostat-time", type=PositiveFloat, default=100.0, help="its relaxation time, fs"
    )
    parser.add_argument("--pressure", type=float, default=0.0, help="of npt, GPa")
    parser.add_argument(
        "--barostat", type=Literal["isotropic", "anisotropic"], default="isotropic", help="of npt"
    )
    parser.add_argument(
        "--barostat-time", type=PositiveFloat, default=1000.0, help="its relaxation time, fs"
    )
    parser.add_argument(
        "--interval", type=PositiveInt, default=10, help="steps between frames and log lines"
    )
    parser.add_argument(
        "--checkpoint-interval", type=PositiveInt, default=100, help="steps between checkpoints"
    )
    parser.add_argument("--restart", action="store_true", help=RESTART_HELP)
    parser.add_argument("--new-velocities", action="store_true", help="ignore those of the file")
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of velocities and noise")


def single_point(options: Namespace) -> int:
    """Compute every structure of a file."""
    output_format(options.out)
    calculator, structures = prepare(options, index=":")
    rows: list[dict[str, Any]] = []
    meter = Meter("single-point", len(structures), unit="structures")
    with structure_output(options.out) as output, meter.running():
        for atoms in structures:
            frozen = with_results(atoms, calculator)
            output.write(frozen)
            rows.append(_row(frozen))
            meter.advance()
    _finish("single-point", options, calculator, rows)
    return 0


def relax(options: Namespace) -> int:
    """Relax every structure of a file."""
    output_format(options.out)
    calculator, structures = prepare(options, index=":")
    if options.cell:
        _refuse_cells_without_volume(options.input, structures)
    rows: list[dict[str, Any]] = []
    meter = Meter("relax", len(structures), unit="structures")
    with structure_output(options.out) as output, meter.running():
        for number, atoms in enumerate(structures):
            try:
                steps, converged = _relax_one(atoms, calculator, options, meter)
            except StructureError as error:
                raise ValueError(
                    f"relaxing {options.input}[{number}] went astray: {error}; the potential may "
                    "not know such structures"
                ) from error
            frozen = with_results(atoms, calculator)
            output.write(frozen)
            rows.append({**_row(frozen), "steps": steps, "converged": converged})
            meter.advance()
    _finish("relax", options, calculator, rows)
    failed = [index for index, row in enumerate(rows) if not row["converged"]]
    if failed:
        say(f"not converged in {options.max_steps} steps: structures {', '.join(map(str, failed))}")
    return 1 if failed else 0


def md(options: Namespace) -> int:
    """Run molecular dynamics from the last structure of a file."""
    output_format(options.out)
    calculator, structures = prepare(options, index="-1:")
    atoms = structures[-1]
    atoms.calc = calculator
    run = MolecularDynamicsRun(
        atoms,
        ensemble=options.ensemble,
        temperature=options.temperature,
        timestep=options.timestep,
        thermostat=options.thermostat,
        thermostat_time=options.thermostat_time,
        pressure=options.pressure,
        isotropic=options.barostat == "isotropic",
        barostat_time=options.barostat_time,
        new_velocities=options.new_velocities,
        seed=options.seed,
    )
    results = run.run(
        options.steps,
        out=options.out,
        interval=options.interval,
        checkpoint=Checkpoint(
            Path(options.out).with_suffix(".checkpoint.json"),
            identity(options, calculator, free=("steps", "checkpoint_interval")),
        ),
        checkpoint_interval=options.checkpoint_interval,
        restart=options.restart,
    )
    summary = write_summary(
        "md",
        options.out,
        source=options.input,
        calculator=calculator,
        settings=settings(options),
        results=results,
    )
    show_table(["quantity", "value"], run.table(results))
    say(f"wrote {', '.join([options.out, results['log'], *results['report']])} and {summary}")
    return 0


def _refuse_cells_without_volume(source: str, structures: list[Atoms]) -> None:
    for number, atoms in enumerate(structures):
        if not has_volume(atoms):
            raise ValueError(
                f"{source}[{number}] is not periodic in three directions (pbc "
                f"{atoms.pbc.tolist()}), so it has no stress; relax it without --cell"
            )


def _relax_one(
    atoms: Atoms, calculator: Calculator, options: Namespace, meter: Meter
) -> tuple[int, bool]:
    """Relax a structure in place; return the number of steps and whether it converged."""
    atoms.calc = calculator
    target = atoms
    if options.cell:
        target = FrechetCellFilter(atoms, scalar_pressure=options.pressure * GPA)
    optimizer = _OPTIMIZERS[options.optimizer](target, logfile=None)
    converged = False
    for state in optimizer.irun(fmax=options.fmax, steps=options.max_steps):
        converged = bool(state)
        meter.advance(0, note=f"step {optimizer.nsteps}")
    return optimizer.nsteps, converged


def _row(atoms: Atoms) -> dict[str, Any]:
    """Return the numbers of a computed structure that a summary tells."""
    row: dict[str, Any] = {
        "formula": atoms.get_chemical_formula(),
        "n_atoms": len(atoms),
        "energy_eV": float(atoms.get_potential_energy()),
        "energy_per_atom_eV": float(atoms.get_potential_energy()) / len(atoms),
        "max_force_eV_per_A": float(np.linalg.norm(atoms.get_forces(), axis=1).max()),
    }
    if atoms.calc is not None and "stress" in atoms.calc.results:
        row["volume_A3"] = float(atoms.get_volume())
        row["pressure_GPa"] = -float(np.trace(atoms.get_stress(voigt=False))) / 3 / GPA
    return row


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "formula": ("structure", str),
    "n_atoms": ("atoms", str),
    "energy_eV": ("energy / eV", lambda x: f"{x:.6f}"),
    "energy_per_atom_eV": ("per atom / eV", lambda x: f"{x:.6f}"),
    "max_force_eV_per_A": ("max force / eV/Å", lambda x: f"{x:.5f}"),
    "volume_A3": ("volume / Å³", lambda x: f"{x:.4f}"),
    "pressure_GPa": ("pressure / GPa", lambda x: f"{x:.4f}"),
    "steps": ("steps", str),
    "converged": ("converged", lambda x: "yes" if x else "NO"),
}


def _finish(
    verb: str, options: Namespace, calculator: AtomeqCalculator, rows: list[dict[str, Any]]
) -> None:
    """Write the summary and show the table."""
    summary = write_summary(
        verb,
        options.out,
        source=options.input,
        calculator=calculator,
        settings=settings(options),
        results={"n_structures": len(rows), "structures": rows},
    )
    keys = [key for key in _COLUMNS if any(key in row for row in rows)]
    show_table(
        [_COLUMNS[key][0] for key in keys],
        [[_COLUMNS[key][1](row[key]) if key in row else "-" for key in keys] for row in rows],
    )
    say(f"wrote {options.out} and {summary}")
