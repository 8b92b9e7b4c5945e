"""``atomeq eos``, ``atomeq elastic`` and ``atomeq phonons``: properties of a crystal."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from jsonargparse import Namespace

from atomeq.calculators import phonons as ph
from atomeq.calculators.ase import AtomeqCalculator
from atomeq.calculators.elasticity import fit_elasticity, strained_structures
from atomeq.calculators.equation_of_state import fit_equation_of_state, scaled_volumes
from atomeq.cli.door import kept_path
from atomeq.cli.plots import plot_curve, plot_matrix, plot_phonons
from atomeq.cli.restart import Journal, identity
from atomeq.cli.structures import write_summary
from atomeq.cli.terminal import say, show_table
from atomeq.cli.verbs import evaluated, prepare_crystal, relaxed, settings
from atomeq.files import write_atomically

_FINE = 300  # points of a drawn curve
_VOIGT = ("xx", "yy", "zz", "yz", "xz", "xy")


def eos(options: Namespace) -> int:
    """Fit an equation of state."""
    scaled_volumes(Atoms("H", cell=[1, 1, 1]), options.span, options.volumes)  # refuse early
    calculator, atoms = prepare_crystal("eos", options)
    atoms = _start(atoms, calculator, options)
    structures = scaled_volumes(atoms, options.span, options.volumes)
    structures = _with_atoms_at_rest(structures, calculator, options)
    found = evaluated(
        structures, calculator, ("energy", "forces", "stress"), label="eos", out=options.out
    )
    volumes = [float(structure.get_volume()) for structure in structures]
    energies = [result["energy"] for result in found]
    fit = fit_equation_of_state(volumes, energies)
    results: dict[str, Any] = {
        "formula": atoms.get_chemical_formula(),
        "n_atoms": len(atoms),
        "volume_A3": fit.volume,
        "volume_per_atom_A3": fit.volume / len(atoms),
        "energy_per_atom_eV": fit.energy / len(atoms),
        "bulk_modulus_GPa": fit.bulk_modulus,
        "bulk_modulus_derivative": fit.derivative,
        "fit_residual_meV_per_atom": 1e3 * fit.residual / len(atoms),
        "curve": {"volume_A3": volumes, "energy_eV": energies},
    }
    fine = np.linspace(min(volumes), max(volumes), _FINE)
    n_atoms = len(atoms)
    picture = plot_curve(
        options.out,
        ([v / n_atoms for v in volumes], [e / n_atoms for e in energies]),
        ((fine / n_atoms).tolist(), (fit.energies(fine) / n_atoms).tolist()),
        labels=("volume / Å³ per atom", "energy / eV per atom"),
        title=f"{atoms.get_chemical_formula()}: {fit.bulk_modulus:.1f} GPa",
    )
    return _finish("eos", options, calculator, results, [picture])


def elastic(options: Namespace) -> int:
    """Compute the elastic constants."""
    strained_structures(Atoms("H", cell=[1, 1, 1]), options.strain)  # refuse early
    calculator, atoms = prepare_crystal("elastic", options)
    atoms = _start(atoms, calculator, options)
    structures, strains = strained_structures(atoms, options.strain)
    structures = _with_atoms_at_rest(structures, calculator, options)
    found = evaluated(
        structures, calculator, ("energy", "forces", "stress"), label="elastic", out=options.out
    )
    stresses = [voigt_6_to_full_3x3_stress(result["stress"]) for result in found]
    fit = fit_elasticity(atoms, strains, stresses)
    results = {"formula": atoms.get_chemical_formula(), **_elastic_results(asdict(fit))}
    picture = plot_matrix(
        options.out, fit.stiffness, title=f"{atoms.get_chemical_formula()}: C / GPa"
    )
    rows = [
        [f"C_{name}", *(f"{x:.1f}" for x in row)]
        for name, row in zip(_VOIGT, fit.stiffness, strict=True)
    ]
    show_table(["GPa", *_VOIGT], rows)
    code = _finish("elastic", options, calculator, results, [picture])
    if not fit.stable:
        say("not stable: some strain lowers the energy (Born's criterion)")
    return code if fit.stable else 1


def _elastic_results(fit: dict[str, Any]) -> dict[str, Any]:
    averages = {
        f"{kind}_modulus_{name}_GPa": value
        for kind in ("bulk", "shear")
        for name, value in zip(("voigt", "reuss", "hill"), fit[kind], strict=True)
    }
    return {
        **averages,
        "young_modulus_GPa": fit["young"],
        "poisson_ratio": fit["poisson"],
        "universal_anisotropy": fit["anisotropy"],
        "asymmetry_GPa": fit["asymmetry"],
        "born_stable": fit["stable"],
        "stiffness_GPa": fit["stiffness"].tolist(),
    }


def phonons(options: Namespace) -> int:
    """Compute phonons."""
    calculator, atoms = prepare_crystal("phonons", options)
    journal = Journal(
        kept_path("phonons", options.out),
        identity(options, calculator, free=("path", "mesh", "temperature")),
        restart=options.restart,
    )
    atoms = _start_of(journal, atoms, calculator, options)
    repeats = options.supercell or ph.fitting_supercell(atoms, options.min_length)
    phonon, cells = ph.displaced_supercells(
        atoms, supercell=repeats, displacement=options.displacement
    )
    path = ph.band_path(phonon, options.path)  # before the forces: it may be wrong
    found = evaluated(
        cells,
        calculator,
        ("energy", "forces"),
        label="displacements",
        out=options.out,
        journal=journal,
    )
    ph.set_forces(phonon, [result["forces"] for result in found])
    bands = ph.band_frequencies(phonon, path)
    mesh, weights = ph.mesh_frequencies(phonon, options.mesh)
    dos = ph.density_of_states(phonon)
    lowest = min(float(mesh.min()), *(float(leg.min()) for leg in bands))
    results: dict[str, Any] = {
        "formula": atoms.get_chemical_formula(),
        "primitive_formula": "".join(phonon.primitive.symbols),
        "supercell": [int(n) for n in repeats],
        "n_displacements": len(cells),
        "lowest_frequency_THz": lowest,
        "highest_frequency_THz": max(float(leg.max()) for leg in bands),
        "imaginary_modes": lowest < -ph.IMAGINARY,
        "imaginary_fraction_of_mesh": float(weights @ (mesh < -ph.IMAGINARY).mean(axis=1)),
        "thermal": ph.thermal_properties(phonon, [options.temperature])[0],
        "frequencies_THz": ph.frequencies_at_ends(phonon, path),
    }
    picture = plot_phonons(
        options.out,
        (bands, path.ends),
        ph.lengths(phonon, path),
        dos,
        title=atoms.get_chemical_formula(),
    )
    kept = Path(options.out).with_suffix(".phonopy.yaml")
    with write_atomically(kept) as partial:
        phonon.save(partial, settings={"force_constants": True})
    _show_points(results["frequencies_THz"])
    _finish("phonons", options, calculator, results, [picture, kept])
    journal.remove()
    if results["imaginary_modes"]:
        say(
            f"imaginary modes: down to {lowest:.2f} THz, "
            f"{results['imaginary_fraction_of_mesh']:.1%} of the mesh; the structure is not at a "
            "minimum"
        )
    return 0


def _start(atoms: Atoms, calculator: AtomeqCalculator, options: Namespace) -> Atoms:
    if not options.relax:
        return atoms
    return relaxed(
        [atoms],
        calculator,
        fmax=options.fmax,
        max_steps=options.max_steps,
        cell=True,
        what=options.input,
    )[0]


def _start_of(
    journal: Journal, atoms: Atoms, calculator: AtomeqCalculator, options: Namespace
) -> Atoms:
    """Return the relaxed crystal, which is the first entry of the journal."""
    if not journal.entries:
        relaxed_atoms = _start(atoms, calculator, options)
        journal.append(
            {
                "positions": relaxed_atoms.positions.tolist(),
                "cell": relaxed_atoms.cell.array.tolist(),
            }
        )
    start, entry = atoms.copy(), journal.entries[0]
    start.set_cell(entry["cell"])
    start.positions = entry["positions"]
    return start


def _with_atoms_at_rest(
    structures: list[Atoms], calculator: AtomeqCalculator, options: Namespace
) -> list[Atoms]:
    """Relax the atoms of strained cells, all cells in one batch."""
    if not options.relax:
        return structures
    return relaxed(
        structures,
        calculator,
        fmax=options.fmax,
        max_steps=options.max_steps,
        cell=False,
        what="strained cells",
    )


def _show_points(frequencies: dict[str, list[float]]) -> None:
    rows = [
        [name, " ".join(f"{frequency:.2f}" for frequency in modes)]
        for name, modes in frequencies.items()
    ]
    show_table(["point", "frequencies / THz"], rows)


def _finish(
    verb: str,
    options: Namespace,
    calculator: AtomeqCalculator,
    results: dict[str, Any],
    files: Sequence[Path],
) -> int:
    """Write the summary, show the numbers and name the files."""
    summary = write_summary(
        verb,
        options.out,
        source=options.input,
        calculator=calculator,
        settings=settings(options),
        results=results,
    )
    flat = {**results, **results.get("thermal", {})}
    rows = [[key, _shown(value)] for key, value in flat.items() if not isinstance(value, dict)]
    show_table(["quantity", "value"], [row for row in rows if row[0] != "stiffness_GPa"])
    say(f"wrote {options.out}, {', '.join(map(str, files))} and {summary}")
    return 0


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
