"""``atomeq eos``, ``elastic``, ``phonons`` and ``kappa``: properties of a crystal."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from jsonargparse import Namespace

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.cli.door import kept_path
from atomeq.cli.plots import plot_curve, plot_matrix, plot_phonons
from atomeq.cli.restart import Journal, identity
from atomeq.cli.structures import structure_output
from atomeq.cli.terminal import say, show_table
from atomeq.cli.verbs import finish, prepare, stages
from atomeq.files import write_atomically
from atomeq.properties import phonons as ph
from atomeq.properties.elasticity import elastic_tensor
from atomeq.properties.equation_of_state import equation_of_state
from atomeq.properties.relaxation import relaxed
from atomeq.properties.single_points import refuse_no_crystal
from atomeq.properties.thermal_conductivity import phono3py_class, thermal_conductivity

_FINE = 300  # points of a drawn curve
_VOIGT = ("xx", "yy", "zz", "yz", "xz", "xy")
_PLACES = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))  # of the tensor


def eos(options: Namespace) -> int:
    """Fit an equation of state."""
    calculator, (atoms,) = prepare(options, index="-1:")
    with stages() as report:
        fit, structures = equation_of_state(
            atoms,
            calculator,
            span=options.span,
            count=options.volumes,
            relax=options.relax,
            fmax=options.fmax,
            max_steps=options.max_steps,
            report=report,
        )
    _write(options.out, structures)
    volumes = [float(structure.get_volume()) for structure in structures]
    energies = [structure.get_potential_energy() for structure in structures]
    n_atoms, formula = len(atoms), atoms.get_chemical_formula()
    results: dict[str, Any] = {
        "formula": formula,
        "n_atoms": n_atoms,
        "volume_A3": fit.volume,
        "volume_per_atom_A3": fit.volume / n_atoms,
        "energy_per_atom_eV": fit.energy / n_atoms,
        "bulk_modulus_GPa": fit.bulk_modulus,
        "bulk_modulus_derivative": fit.derivative,
        "fit_residual_meV_per_atom": 1e3 * fit.residual / n_atoms,
        "curve": {"volume_A3": volumes, "energy_eV": energies},
    }
    fine = np.linspace(min(volumes), max(volumes), _FINE)
    picture = plot_curve(
        options.out,
        ([v / n_atoms for v in volumes], [e / n_atoms for e in energies]),
        ((fine / n_atoms).tolist(), (fit.energies(fine) / n_atoms).tolist()),
        labels=("volume / Å³ per atom", "energy / eV per atom"),
        title=f"{formula}: {fit.bulk_modulus:.1f} GPa",
    )
    finish("eos", options, calculator, results, [picture])
    return 0


def elastic(options: Namespace) -> int:
    """Compute the elastic constants."""
    calculator, (atoms,) = prepare(options, index="-1:")
    with stages() as report:
        fit, structures = elastic_tensor(
            atoms,
            calculator,
            strain=options.strain,
            relax=options.relax,
            fmax=options.fmax,
            max_steps=options.max_steps,
            report=report,
        )
    _write(options.out, structures)
    formula = atoms.get_chemical_formula()
    results = {"formula": formula, **_elastic_results(asdict(fit))}
    picture = plot_matrix(options.out, fit.stiffness, title=f"{formula}: C / GPa")
    rows = [
        [f"C_{name}", *(f"{x:.1f}" for x in row)]
        for name, row in zip(_VOIGT, fit.stiffness, strict=True)
    ]
    show_table(["GPa", *_VOIGT], rows)
    finish("elastic", options, calculator, results, [picture])
    if not fit.stable:
        say("not stable: some strain lowers the energy (Born's criterion)")
    return 0 if fit.stable else 1


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
    calculator, (atoms,) = prepare(options, index="-1:")
    refuse_no_crystal(atoms, calculator, "phonons")
    free = ("path", "mesh", "temperature")
    journal, atoms = _taken_up("phonons", atoms, calculator, options, free=free)
    with stages() as report:
        found = ph.phonons(
            atoms,
            calculator,
            supercell=options.supercell or options.min_length,
            displacement=options.displacement,
            path=options.path,
            mesh=options.mesh,
            temperatures=[options.temperature],
            results=_Results(journal),
            report=report,
        )
    _write(options.out, found.supercells)
    formula, phonon = atoms.get_chemical_formula(), found.phonon
    results: dict[str, Any] = {
        "formula": formula,
        "primitive_formula": "".join(phonon.primitive.symbols),
        "supercell": np.diag(phonon.supercell_matrix).tolist(),
        "n_displacements": len(found.supercells),
        "lowest_frequency_THz": found.lowest,
        "highest_frequency_THz": found.highest,
        "imaginary_modes": found.lowest < -ph.IMAGINARY,
        "imaginary_fraction_of_mesh": found.imaginary_fraction,
        "thermal": found.thermal[0],
        "frequencies_THz": ph.frequencies_at_ends(phonon, found.path),
    }
    picture = plot_phonons(
        options.out,
        (found.bands, found.path.ends),
        ph.lengths(phonon, found.path),
        found.dos,
        title=formula,
    )
    kept = Path(options.out).with_suffix(".phonopy.yaml")
    with write_atomically(kept) as partial:
        phonon.save(partial, settings={"force_constants": True})
    _show_points(results["frequencies_THz"])
    finish("phonons", options, calculator, results, [picture, kept])
    journal.remove()
    if results["imaginary_modes"]:
        say(
            f"imaginary modes: down to {found.lowest:.2f} THz, {found.imaginary_fraction:.1%} of "
            "the mesh; the structure is not at a minimum"
        )
    return 0


def kappa(options: Namespace) -> int:
    """Compute the lattice thermal conductivity."""
    phono3py_class()  # before anything is computed: it may be missing
    calculator, (atoms,) = prepare(options, index="-1:")
    refuse_no_crystal(atoms, calculator, "thermal conductivity")
    free = ("mesh", "temperatures", "isotopes")
    journal, atoms = _taken_up("kappa", atoms, calculator, options, free=free)
    with stages() as report:
        found = thermal_conductivity(
            atoms,
            calculator,
            supercell=options.supercell or options.min_length,
            displacement=options.displacement,
            mesh=options.mesh,
            temperatures=options.temperatures,
            isotopes=options.isotopes,
            results=_Results(journal),
            report=report,
        )
    _write(options.out, found.supercells)
    formula = atoms.get_chemical_formula()
    temperatures, average = found.temperatures.tolist(), found.average.tolist()
    results: dict[str, Any] = {
        "formula": formula,
        "supercell": np.diag(found.phonon3.supercell_matrix).tolist(),
        "n_displacements": len(found.supercells),
        "mesh": list(found.mesh),
        "conductivity": {
            "temperature_K": temperatures,
            "average_W_per_m_K": average,
            "tensor_W_per_m_K": found.kappa.tolist(),
        },
    }
    picture = plot_curve(
        options.out,
        (temperatures, average),
        (temperatures, average),
        labels=("temperature / K", "thermal conductivity / W/(m K)"),
        title=formula,
    )
    kept = Path(options.out).with_suffix(".phono3py.yaml")
    with write_atomically(kept) as partial:
        found.phonon3.save(partial, settings={"force_sets": True})
    rows = [
        [f"{temperature:g}", *(f"{tensor[i, j]:.4g}" for i, j in _PLACES)]
        for temperature, tensor in zip(temperatures, found.kappa, strict=True)
    ]
    show_table(["K", *(f"{name} / W/(m K)" for name in _VOIGT)], rows)
    finish("kappa", options, calculator, results, [picture, kept])
    journal.remove()
    return 0


def _taken_up(
    verb: str,
    atoms: Atoms,
    calculator: AtomeqCalculator,
    options: Namespace,
    *,
    free: tuple[str, ...],
) -> tuple[Journal, Atoms]:
    """Return the journal of a run and its relaxed crystal; ``free`` options may have changed."""
    journal = Journal(
        kept_path(verb, options.out),
        identity(options, calculator, free=free),
        restart=options.restart,
    )
    return journal, _start_of(journal, atoms, calculator, options)


class _Results(list[dict[str, Any]]):
    """Results that a journal holds behind its first entry, and keeps as they come."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(
            {name: np.array(values) for name, values in entry["results"].items()}
            for entry in journal.entries[1:]
        )
        self._journal = journal

    def append(self, result: dict[str, Any]) -> None:
        """Keep a result, on disk first."""
        values = {name: np.asarray(value).tolist() for name, value in result.items()}
        self._journal.append({"results": values})
        super().append(result)


def _start_of(
    journal: Journal, atoms: Atoms, calculator: AtomeqCalculator, options: Namespace
) -> Atoms:
    """Return the relaxed crystal, which is the first entry of the journal."""
    if not journal.entries:
        start = atoms
        if options.relax:
            budget = {"fmax": options.fmax, "max_steps": options.max_steps}
            with stages() as report:
                (start,) = relaxed(
                    [atoms], calculator, cell=True, what="crystal", report=report, **budget
                )
        journal.append({"positions": start.positions.tolist(), "cell": start.cell.array.tolist()})
    start, entry = atoms.copy(), journal.entries[0]
    start.set_cell(entry["cell"])
    start.positions = entry["positions"]
    return start


def _write(out: str, structures: Sequence[Atoms]) -> None:
    with structure_output(out) as output:
        for atoms in structures:
            output.write(atoms)


def _show_points(frequencies: dict[str, list[float]]) -> None:
    rows = [
        [name, " ".join(f"{frequency:.2f}" for frequency in modes)]
        for name, modes in frequencies.items()
    ]
    show_table(["point", "frequencies / THz"], rows)
