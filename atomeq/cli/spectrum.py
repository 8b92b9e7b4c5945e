"""``atomeq spectrum``: the infrared spectrum of a molecule, harmonic or from dynamics."""

from typing import Any

import numpy as np
from ase import Atoms
from jsonargparse import Namespace
from numpy.typing import NDArray

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli.plots import Panel, plot_lines
from atomeq.cli.structures import structure_output
from atomeq.cli.terminal import show_table
from atomeq.cli.verbs import finish, load, prepare, stages
from atomeq.properties.relaxation import relaxed
from atomeq.properties.spectrum import infrared_modes, infrared_spectrum

_SHOWN = 0.1  # km/mol; weaker lines are in the summary alone
_FINE = 2000  # points of a drawn spectrum


def spectrum(options: Namespace) -> int:
    """Compute the spectrum of a molecule, or that of a trajectory."""
    calculator, structures = prepare(options, index="-1:" if options.interval is None else ":")
    dipoles = calculator if options.dipole is None else load(options.dipole, options)
    if "dipole" not in dipoles.implemented_properties:
        raise ValueError(
            f"{options.dipole or options.potential} gives no dipoles; name a potential that does, "
            "of an Electric model, in --dipole"
        )
    if options.interval is not None:
        return _of_trajectory(options, dipoles, structures)
    return _of_molecule(options, calculator, dipoles, structures[0])


def _of_molecule(
    options: Namespace, calculator: AtomeqCalculator, dipoles: AtomeqCalculator, atoms: Atoms
) -> int:
    if options.relax:
        budget = {"fmax": options.fmax, "max_steps": options.max_steps}
        with stages() as report:
            (atoms,) = relaxed(
                [atoms], calculator, cell=False, what="molecule", report=report, **budget
            )
    modes = infrared_modes(atoms, calculator, dipoles)
    wavenumbers, intensities = modes.wavenumbers.tolist(), modes.intensities.tolist()
    _write(options.out, [atoms], [dipoles.get_property("dipole", atoms)])
    grid = np.linspace(0, max(1.1 * max(wavenumbers, default=0), 100.0), _FINE)
    curve = modes.broadened(grid, options.width)
    picture = _draw(options.out, grid, curve)
    rows = [
        [f"{nu:.1f}", f"{strength:.2f}"]
        for nu, strength in zip(wavenumbers, intensities, strict=True)
        if strength > _SHOWN or nu < 0
    ]
    show_table(["cm⁻¹", "km/mol"], rows)
    results: dict[str, Any] = {
        "formula": atoms.get_chemical_formula(),
        "n_modes": len(wavenumbers),
        "imaginary_modes": sum(nu < 0 for nu in wavenumbers),
        "lines": {"wavenumber_per_cm": wavenumbers, "intensity_km_per_mol": intensities},
    }
    finish("spectrum", options, dipoles, results, [picture])
    return 0


def _of_trajectory(options: Namespace, dipoles: AtomeqCalculator, frames: list[Atoms]) -> int:
    found = [one["dipole"] for one in dipoles.evaluate(frames, ["dipole"])]
    result = infrared_spectrum(
        found, interval=options.interval, temperature=options.temperature, width=options.width
    )
    _write(options.out, frames, found)
    picture = _draw(options.out, result.wavenumbers, result.absorption)
    strongest = int(np.argmax(result.absorption))
    results: dict[str, Any] = {
        "formula": frames[0].get_chemical_formula(),
        "n_frames": len(frames),
        "strongest_line_per_cm": float(result.wavenumbers[strongest]),
        "spectrum": {
            "wavenumber_per_cm": result.wavenumbers.tolist(),
            "absorption_km_per_mol_cm": result.absorption.tolist(),
        },
    }
    finish("spectrum", options, dipoles, results, [picture])
    return 0


def _draw(out: str, wavenumbers: np.ndarray, absorption: np.ndarray) -> Any:
    seen = wavenumbers < 5000
    line = wavenumbers[seen].tolist(), absorption[seen].tolist()
    labels = "wavenumber / cm⁻¹", "absorption / km/mol per cm⁻¹"
    return plot_lines(out, [Panel(*labels, [line], ends=False)])


def _write(out: str, structures: list[Atoms], dipoles: list[NDArray[np.float64]]) -> None:
    """Write structures with their dipoles, e·Å, in their info."""
    with structure_output(out) as output:
        for atoms, dipole in zip(structures, dipoles, strict=True):
            kept = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
            kept.info["dipole"] = dipole
            output.write(kept)
