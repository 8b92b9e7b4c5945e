"""``atomeq single-point`` and ``atomeq relax``: structures in, results out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from jsonargparse import Namespace

from atomeq.calculators.ase import AtomeqCalculator, has_volume
from atomeq.cli.door import kept_path
from atomeq.cli.relaxation import draw_relaxation, relaxed_in
from atomeq.cli.restart import RunFolder, identity
from atomeq.cli.structures import structure_output, with_results, write_summary
from atomeq.cli.terminal import Meter, say, show_table
from atomeq.cli.verbs import prepare, settings
from atomeq.graph.convert import StructureError
from atomeq.potential.committee import NotFiniteError
from atomeq.units import GPA


def single_point(options: Namespace) -> int:
    """Compute every structure of a file."""
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
    calculator, structures = prepare(options, index=":")
    if options.cell:
        _refuse_cells_without_volume(options.input, structures)
    about = identity(options, calculator, free=("checkpoint_interval",))
    folder = RunFolder(kept_path("relax", options.out), about, restart=options.restart)
    rows: list[dict[str, Any]] = []
    outcomes = relaxed_in(folder, structures, calculator, options)
    with structure_output(options.out) as output:
        for atoms, outcome in zip(structures, outcomes, strict=True):
            if outcome.graph is not None:
                atoms.set_cell(outcome.graph.cell[0].cpu().numpy())
                atoms.arrays["positions"][:] = outcome.graph.pos.cpu().numpy()
            frozen, row = _frozen(atoms, calculator)
            output.write(frozen)
            row |= {"steps": outcome.n_steps, "converged": outcome.converged}
            row |= {"status": outcome.status}
            rows.append(row if outcome.converged else {**row, "reason": outcome.reason})
    picture = draw_relaxation(options.out, folder, len(structures))
    folder.remove()
    _finish("relax", options, calculator, rows, picture)
    return _say_what_failed(rows, options)


def _frozen(atoms: Atoms, calculator: AtomeqCalculator) -> tuple[Atoms, dict[str, Any]]:
    """Return a structure with its results, and its row; without, where it has none."""
    try:
        frozen = with_results(atoms, calculator)
    except (StructureError, NotFiniteError):  # it was refused; the row says why
        return atoms, {"formula": atoms.get_chemical_formula(), "n_atoms": len(atoms)}
    return frozen, _row(frozen)


def _say_what_failed(rows: list[dict[str, Any]], options: Namespace) -> int:
    late = [str(k) for k, row in enumerate(rows) if row["status"] == "not_converged"]
    if late:
        say(f"not converged in {options.max_steps} steps: structures {', '.join(late)}")
    for k, row in enumerate(rows):
        if row["status"] not in ("converged", "not_converged"):
            say(f"structure {k} {row['status']}: {row['reason']}")
    return 0 if all(row["converged"] for row in rows) else 1


def _refuse_cells_without_volume(source: str, structures: list[Atoms]) -> None:
    for number, atoms in enumerate(structures):
        if not has_volume(atoms):
            raise ValueError(
                f"{source}[{number}] is not periodic in three directions (pbc "
                f"{atoms.pbc.tolist()}), so it has no stress; relax it without --cell"
            )


def _row(atoms: Atoms) -> dict[str, Any]:
    """Return the numbers of a computed structure that a summary tells."""
    row: dict[str, Any] = {
        "formula": atoms.get_chemical_formula(),
        "n_atoms": len(atoms),
        "energy_eV": float(atoms.get_potential_energy()),
        "energy_per_atom_eV": float(atoms.get_potential_energy()) / len(atoms),
        "max_force_eV_per_A": float(np.linalg.norm(atoms.get_forces(), axis=1).max()),
    }
    if "energy_uncertainty" in atoms.info:
        row["energy_uncertainty_eV"] = atoms.info["energy_uncertainty"]
        row["max_force_uncertainty_eV_per_A"] = float(atoms.arrays["forces_uncertainty"].max())
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
    "energy_uncertainty_eV": ("± energy / eV", lambda x: f"{x:.4f}"),
    "max_force_uncertainty_eV_per_A": ("± force / eV/Å", lambda x: f"{x:.3f}"),
    "volume_A3": ("volume / Å³", lambda x: f"{x:.4f}"),
    "pressure_GPa": ("pressure / GPa", lambda x: f"{x:.4f}"),
    "steps": ("steps", str),
    "converged": ("converged", lambda x: "yes" if x else "NO"),
}


def _finish(
    verb: str,
    options: Namespace,
    calculator: AtomeqCalculator,
    rows: list[dict[str, Any]],
    *pictures: Path,
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
    say(f"wrote {', '.join(map(str, [options.out, *pictures]))} and {summary}")
