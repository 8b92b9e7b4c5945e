"""Matbench Discovery's thermal conductivities: 103 crystals in, its prediction file out.

The protocol is ``phonondb-v1`` of the project's ``phonons/pipeline.py`` (read at commit 0519808):
relax with the space group kept, harmonic phonons, and where none is imaginary and the group is the
same, third derivatives and the conductivity at 300 K by the Wigner equation in the relaxation-time
approximation (Póta et al., arXiv:2408.00755; Simoncelli et al., Nat. Phys. 15, 809, 2019), divided
into modes. The input says for each crystal its supercells and mesh of wave vectors.
Deliberate difference: the harmonic sidecar for the project's website is not written.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import ase.io
import numpy as np
import spglib
from ase import Atoms
from ase.constraints import FixSymmetry
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from numpy.typing import NDArray

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.files import dated, write_gzip
from atomeq.properties.phonons import structure_from_phonopy, structure_to_phonopy
from atomeq.properties.single_points import Report, computed, untold
from atomeq.properties.thermal_conductivity import VOIGT, phono3py_class

ID = "material_id"
_MESHES = ("q_point_mesh", "q_mesh")  # what the mesh was called, newest first
_ASKED = ("fc2_supercell", "fc3_supercell")
_BOUNDARY = 1e6  # µm, as far as nothing; the project gives it
_NOISE = -0.01  # THz, of the acoustic modes at Γ
_DEGENERATE = 1e-4  # THz, modes whose coherence counts as population


@dataclass(frozen=True)
class KappaSettings:
    """The protocol.

    Attributes:
        displacement: Å.
        fmax: eV/Å, of the relaxation as ASE's FrechetCellFilter counts.
        max_steps: Of FIRE.
        symprec: Å, for space groups and displacements.
        relax_symprec: Å, for the operations that the relaxation keeps.
        temperature: K.
    """

    displacement: float = 0.01
    fmax: float = 1e-4
    max_steps: int = 300
    symprec: float = 1e-5
    relax_symprec: float = 0.01
    temperature: float = 300.0


@dataclass(frozen=True)
class KappaPredictions:
    """What a run has come to.

    Attributes:
        done: Crystals that have a record.
        missing: Crystals that other shards compute.
        unstable: Crystals without a conductivity, for imaginary modes or a broken space group.
        failed: Crystals that raised; their reasons stand in the file.
        file: The prediction file; None while crystals are missing.
    """

    done: int
    missing: int
    unstable: int = 0
    failed: int = 0
    file: Path | None = None


def predict_matbench_kappa(
    structures: str | Path,
    calculator: AtomeqCalculator,
    *,
    out: str | Path,
    settings: KappaSettings | None = None,
    shard: tuple[int, int] = (0, 1),
    retry: bool = False,
    report: Report = untold,
) -> KappaPredictions:
    """Compute the conductivities that Matbench Discovery asks for and write its prediction file.

    Each crystal has its record in ``out/kappa`` as soon as it is done; called again, only what has
    none is computed, and the file is the same.

    Args:
        structures: ``*-phononDB-PBE-103-structures.extxyz``, or a part of it.
        calculator: Gives forces and stress; in float64, as differences of forces ask for.
        out: Folder.
        settings: The protocol, by default the project's.
        shard: ``(k, n)``: take every n-th crystal from the k-th; n such runs share the folder.
        retry: Compute crystals again that raised.
        report: Told of progress.

    Raises:
        ImportError: phono3py is not installed.
        ValueError: The file is not what it should be, or the folder holds records of other
            settings, structures or potentials.

    Example:
        >>> predict_matbench_kappa(  # doctest: +SKIP
        ...     "2024-11-09-phononDB-PBE-103-structures.extxyz", calculator, out="mbd"
        ... )
    """
    phono3py_class()  # before anything is computed: it may be missing
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard must be (k, n) with 0 <= k < n, not {shard}")
    chosen = KappaSettings() if settings is None else settings
    crystals = read_crystals(structures)
    folder = Path(out) / "kappa"
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    for number, (identifier, atoms) in enumerate(crystals.items()):
        about = _about(atoms, calculator, chosen)
        path = folder / f"{quote(identifier, safe='-_.')}.json.gz"
        row = _recorded(path, about)
        own = number % shard[1] == shard[0]
        if own and (row is None or (retry and row["errors"])):
            row = kappa_row(atoms, calculator, chosen, report=report)
            with write_gzip(path) as text:
                json.dump({"about": about, "row": row}, text, allow_nan=False)
        if row is not None:
            rows[identifier] = row
    if missing := len(crystals) - len(rows):
        return KappaPredictions(len(rows), missing)
    failed = sum(bool(row["errors"]) for row in rows.values())
    unstable = sum(bool(row.get("conductivity_skipped")) for row in rows.values())
    file = dated(Path(out), "phonons-kappa-103.json.gz")
    with write_gzip(file) as text:
        json.dump(list(rows.values()), text, allow_nan=False)
    return KappaPredictions(len(rows), 0, unstable, failed, file)


def read_crystals(path: str | Path) -> dict[str, Atoms]:
    """Read the project's crystals, by id in the order of the file.

    Raises:
        ValueError: An id is missing or stands twice, or a supercell or mesh is missing.
    """
    found: dict[str, Atoms] = {}
    for number, atoms in enumerate(ase.io.iread(path, index=":", format="extxyz")):
        identifier = str(atoms.info.get(ID, atoms.info.get("mp_id", "")))
        shapes = {name: np.asarray(value).shape for name, value in atoms.info.items()}
        absent = [name for name in _ASKED if shapes.get(name) != (3, 3)]
        if not any(shapes.get(name) == (3,) for name in _MESHES):
            absent.append(_MESHES[0])
        if not identifier or absent:
            raise ValueError(
                f"structure {number} of {path} has no {', '.join(absent) or ID}; give the "
                "project's phononDB-PBE-103-structures.extxyz, or a part of it"
            )
        if identifier in found:
            raise ValueError(f"{path}: {ID} {identifier} stands twice; leave one out")
        found[identifier] = atoms
    return found


def kappa_row(
    atoms: Atoms,
    calculator: AtomeqCalculator,
    settings: KappaSettings,
    *,
    report: Report = untold,
) -> dict[str, Any]:
    """Return the row of a crystal as the project writes it, as plain values without NaN.

    Args:
        atoms: One of :func:`read_crystals`.
        calculator: Gives forces and stress.
        settings: The protocol.
        report: Told of progress.
    """
    identifier = str(atoms.info.get(ID, atoms.info.get("mp_id")))
    name = str(atoms.info.get("name") or atoms.get_chemical_formula())
    row: dict[str, Any] = {ID: identifier, "formula": name, "errors": [], "error_traceback": []}
    stage = "Relax"
    try:
        relaxed, about = _relaxed(atoms, calculator, settings)
        row |= about
        stage = "ForceConstant"
        phonon3 = _displaced(relaxed, atoms.info, settings)
        _harmonic(phonon3, calculator, f"{identifier} harmonic", report)
        frequencies = np.asarray(phonon3.get_phonon_data()[0])
        row["has_imag_ph_modes"] = has_imaginary_modes(frequencies)
        row["ph_freqs"] = frequencies.tolist()
        if row["has_imag_ph_modes"] or row["broken_symmetry"]:
            return row | {"conductivity_skipped": True}
        phonon3.forces = _forces(
            phonon3.supercells_with_displacements, calculator, f"{identifier} cubic", report
        )
        phonon3.produce_fc3()
        phonon3.symmetrize_fc3()
        stage = "Conductivity"
        row |= _conductivity(phonon3, settings.temperature)
    except (ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        row["errors"].append(f"{stage}Error: {type(error).__name__}: {error}")
    return row


def has_imaginary_modes(frequencies: NDArray[np.float64]) -> bool:
    """Tell as the project does whether a mode is imaginary.

    Args:
        frequencies: (n_q, n_modes), THz, Γ first; imaginary ones are negative.
    """
    gamma, others = np.sort(frequencies[0]), frequencies[1:]
    return bool(
        not np.isfinite(frequencies).all()
        or (gamma[3:] < 0).any()
        or (gamma[:3] < _NOISE).any()
        or (others < 0).any()
    )


def _relaxed(
    start: Atoms, calculator: AtomeqCalculator, settings: KappaSettings
) -> tuple[Atoms, dict[str, Any]]:
    """Relax with the space group kept; angles of the cell do not change, as in the project."""
    atoms = Atoms(start.numbers, start.positions, cell=start.cell, pbc=True)
    before = _space_group(atoms, settings.symprec)
    atoms.calc = calculator
    atoms.set_constraint(FixSymmetry(atoms, symprec=settings.relax_symprec))
    target: Any = FrechetCellFilter(atoms, mask=[True] * 3 + [False] * 3)
    with FIRE(target, logfile=os.devnull) as optimizer:
        optimizer.run(fmax=settings.fmax, steps=settings.max_steps)
    stress = np.asarray(atoms.get_stress()).reshape(2, 3).max(axis=1)
    atoms.calc, atoms.constraints = None, []
    after = _space_group(atoms, settings.symprec)
    return atoms, {
        "init_spg_num": before,
        "final_spg_num": after,
        "broken_symmetry": before != after,
        "max_stress": stress.tolist(),
        "reached_max_steps": optimizer.nsteps >= settings.max_steps,
        "n_steps": optimizer.nsteps,
        "redirected_to_symmetry": False,
    }


def _space_group(atoms: Atoms, symprec: float) -> int:
    cell: Any = (atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)
    found = spglib.get_symmetry_dataset(cell, symprec=symprec)
    if found is None:
        raise ValueError(f"spglib finds no space group at {symprec:g} Å")
    return int(found.number)


def _displaced(atoms: Atoms, asked: dict[str, Any], settings: KappaSettings) -> Any:
    harmonic, cubic = (np.asarray(asked[name], dtype=int) for name in _ASKED)
    phonon3 = phono3py_class()(
        structure_to_phonopy(atoms),
        supercell_matrix=cubic,
        phonon_supercell_matrix=harmonic,
        primitive_matrix="auto",
        symprec=settings.symprec,
    )
    mesh = next(asked[name] for name in _MESHES if name in asked)
    phonon3.mesh_numbers = [int(n) for n in mesh]
    phonon3.generate_displacements(distance=settings.displacement)
    return phonon3


def _harmonic(phonon3: Any, calculator: AtomeqCalculator, stage: str, report: Report) -> None:
    phonon3.phonon_forces = _forces(
        phonon3.phonon_supercells_with_displacements, calculator, stage, report
    )
    phonon3.produce_fc2()
    phonon3.symmetrize_fc2()
    phonon3.init_phph_interaction()
    phonon3.run_phonon_solver()


def _forces(
    cells: Sequence[Any], calculator: AtomeqCalculator, stage: str, report: Report
) -> NDArray[np.float64]:
    structures = [structure_from_phonopy(cell) for cell in cells]
    found = computed(structures, calculator, ("forces",), stage=stage, report=report)
    return np.array([one.get_forces() for one in found])


def _conductivity(phonon3: Any, temperature: float) -> dict[str, Any]:
    phonon3.init_phph_interaction()
    phonon3.run_thermal_conductivity(
        temperatures=[temperature],
        is_isotope=True,
        transport_type="SMM19",
        boundary_mfp=_BOUNDARY,
    )
    solved = phonon3.thermal_conductivity
    weights = np.asarray(solved.grid_weights)
    frequencies = np.asarray(solved.frequencies)  # (n_q, n_modes), THz
    pairs = np.asarray(solved.mode_kappa_matrix)[0][..., VOIGT]  # (1, n_q, n, n, 3, 3), W/(m K)
    gaps = np.abs(frequencies[:, :, None] - frequencies[:, None, :])
    population = (gaps < _DEGENERATE)[None, ..., None, None]
    total = pairs.sum(axis=(1, 2, 3)) / weights.sum()
    particles = (pairs * population).sum(axis=(1, 2, 3)) / weights.sum()
    return {
        "kappa_tot_rta": total.tolist(),
        "kappa_p_rta": particles.tolist(),
        "kappa_c": (total - particles).tolist(),
        "mode_kappa_tot_rta": _shared(pairs, np.asarray(solved.mode_heat_capacities)).tolist(),
        "mode_weights": weights.tolist(),
        "q_points": np.asarray(solved.qpoints).tolist(),
        "ph_freqs": frequencies.tolist(),
    }


def _shared(pairs: NDArray[np.float64], capacities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide what two modes conduct together between them, by heat capacity as the project does.

    Args:
        pairs: (1, n_q, n_modes, n_modes, 3, 3).
        capacities: (1, n_q, n_modes).

    Returns:
        (1, n_q, n_modes, 3, 3).
    """
    first, second = capacities[..., :, None], capacities[..., None, :]
    both = first + second
    share = np.divide(2 * first, both, out=np.ones_like(both), where=both > 0)
    return (pairs * share[..., None, None]).sum(axis=2)


def _about(atoms: Atoms, calculator: AtomeqCalculator, settings: KappaSettings) -> dict[str, Any]:
    """Return what decides a row: potential, protocol and a hash of the crystal."""
    names = [name for name in (*_ASKED, *_MESHES) if name in atoms.info]
    asked = [np.asarray(atoms.info[name]).tolist() for name in names]
    crystal = [atoms.numbers.tolist(), atoms.positions.tolist(), atoms.cell.array.tolist(), asked]
    return {
        "potential": calculator.provenance["sha256"],
        "settings": asdict(settings),
        "crystal": hashlib.sha256(json.dumps(crystal).encode()).hexdigest(),
    }


def _recorded(path: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """Return the row of a record, None where there is none.

    Raises:
        ValueError: It is of another potential, protocol or crystal.
    """
    if not path.exists():
        return None
    with gzip.open(path, "rt", encoding="utf-8") as text:
        record = json.load(text)
    different = [key for key, value in about.items() if record["about"].get(key) != value]
    if different:
        raise ValueError(
            f"{path} is of another {' and '.join(different)}; repeat the options, or name another "
            "folder"
        )
    return record["row"]
