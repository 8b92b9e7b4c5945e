"""Measure everything the model card of cu-pbe states, and write it to metrics.json.

``ATOMEQ_DATA=FOLDER .venv/bin/python scripts/measure_cu_pbe.py`` takes about two minutes. The
held-out structures are those of configs/data/cu.yaml, which training never saw.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from ase import Atoms, units
from ase.build import bulk, fcc100, fcc110, fcc111
from ase.calculators.calculator import Calculator
from ase.eos import EquationOfState
from ase.filters import FrechetCellFilter
from ase.io import read
from ase.optimize import BFGS

from atomeq import AtomeqCalculator, load_potential
from atomeq.data.ase_files import resolve_data_path
from atomeq.data.splits import Split, split_indices
from atomeq.training.metrics import PotentialErrors

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "potentials" / "cu-pbe"
GPA_PER_EV_A3 = 1 / units.GPa


def held_out() -> list[Atoms]:
    """Return the test structures of the training's own data configuration."""
    init = yaml.safe_load((ROOT / "configs" / "data" / "cu.yaml").read_text())["init_args"]
    structures = read(resolve_data_path(init["train"]), index=":")
    chosen = split_indices(len(structures), Split(**init["split"]))["test"]
    return [structures[index] for index in chosen]


def errors(folder: Path, structures: list[Atoms]) -> dict[str, dict[str, float]]:
    """Return the errors on all structures and on each kind of configuration among them."""
    potential = load_potential(folder)
    kinds: dict[str, PotentialErrors] = {}
    offsets: list[np.ndarray] = []
    for atoms in structures:
        graph = potential.build_graph(atoms)
        prediction = potential(graph, ("energy", "forces", "stress"))
        offsets.append((graph.stress - prediction["stress"])[0].diagonal().numpy())
        for kind in ("all", kind_of(atoms)):
            kinds.setdefault(kind, PotentialErrors()).update(prediction, graph)
    table = {kind: rounded(metric.compute()) for kind, metric in sorted(kinds.items())}
    counts = {kind: sum(kind_of(atoms) == kind for atoms in structures) for kind in kinds}
    for kind, row in table.items():
        row["structures"] = counts[kind] if kind != "all" else len(structures)
    table["all"]["stress_label_minus_model_diagonal_GPa"] = round(
        float(np.mean(offsets)) * GPA_PER_EV_A3, 2
    )
    return table


def kind_of(atoms: Atoms) -> str:
    """Return AIMD, Elastic, Surface or Vacancy; the file says ``tag= set=AIMD``, a word to ASE."""
    return atoms.info["tag"].removeprefix("set=")


def rounded(values: dict[str, torch.Tensor]) -> dict[str, float]:
    return {key: round(float(value), 3) for key, value in values.items()}


def relaxed_lattice(calculator: Calculator, structure: str) -> Atoms:
    """Return the primitive cell at zero pressure."""
    guess = {"fcc": 3.63, "bcc": 2.89, "hcp": 2.57}[structure]
    options = {"c": guess * np.sqrt(8 / 3)} if structure == "hcp" else {}
    cell = bulk("Cu", structure, a=guess, **options)
    cell.calc = calculator
    with BFGS(FrechetCellFilter(cell), logfile=None) as optimizer:
        optimizer.run(fmax=1e-4, steps=200)
    return cell


def bulk_modulus(calculator: Calculator, a0: float) -> float:
    """Return B in GPa from a Birch-Murnaghan fit within 3 % of the lattice constant."""
    volumes, energies = [], []
    for a in a0 * np.linspace(0.97, 1.03, 9):
        cell = bulk("Cu", "fcc", a=a)
        cell.calc = calculator
        volumes.append(cell.get_volume())
        energies.append(cell.get_potential_energy())
    _, _, modulus = EquationOfState(volumes, energies, eos="birchmurnaghan").fit()
    return modulus * GPA_PER_EV_A3


def elastic_constants(calculator: Calculator, a0: float) -> dict[str, float]:
    """Return C11, C12 and C44 in GPa from stresses at strains of 0.2 %."""
    step = 2e-3

    def stress(strain: np.ndarray) -> np.ndarray:
        cell = bulk("Cu", "fcc", a=a0, cubic=True)
        cell.set_cell(cell.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        cell.calc = calculator
        return cell.get_stress(voigt=False) * GPA_PER_EV_A3

    def slope(strain: np.ndarray) -> np.ndarray:
        return (stress(step * strain) - stress(-step * strain)) / (2 * step)

    axial = slope(np.diag([1.0, 0.0, 0.0]))
    shear = slope(np.array([[0.0, 0.5, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    return {"C11": axial[0, 0], "C12": axial[1, 1], "C44": shear[0, 1]}


def vacancy_energy(calculator: Calculator, cell: Atoms, a0: float) -> float:
    """Return the relaxed formation energy in a cell of 107 atoms, eV."""
    atoms = bulk("Cu", "fcc", a=a0, cubic=True).repeat(3)
    del atoms[0]
    atoms.calc = calculator
    with BFGS(atoms, logfile=None) as optimizer:
        optimizer.run(fmax=0.005, steps=200)
    return atoms.get_potential_energy() - len(atoms) * cell.get_potential_energy()


def surface_energies(calculator: Calculator, cell: Atoms, a0: float) -> dict[str, float]:
    """Return the relaxed energies of the low-index surfaces, J/m²."""
    makers: dict[str, Callable[..., Atoms]] = {"111": fcc111, "100": fcc100, "110": fcc110}
    found = {}
    for name, make in makers.items():
        slab = make("Cu", (1, 1, 11), a=a0, vacuum=8.0, periodic=True)
        slab.calc = calculator
        with BFGS(slab, logfile=None) as optimizer:
            optimizer.run(fmax=0.005, steps=200)
        area = np.linalg.norm(np.cross(slab.cell[0], slab.cell[1]))
        excess = slab.get_potential_energy() - len(slab) * cell.get_potential_energy()
        found[name] = excess / (2 * area) * units.m**2 / units.J
    return found


def properties(folder: Path) -> dict[str, float]:
    """Return the properties of copper the card lists, in float64."""
    calculator = AtomeqCalculator(folder, dtype="float64")
    fcc = relaxed_lattice(calculator, "fcc")
    a0 = float((4 * fcc.get_volume()) ** (1 / 3))
    energy = fcc.get_potential_energy()
    found = {
        "lattice_constant_A": a0,
        "bulk_modulus_GPa": bulk_modulus(calculator, a0),
        **{f"{k}_GPa": v for k, v in elastic_constants(calculator, a0).items()},
        "vacancy_formation_energy_eV": vacancy_energy(calculator, fcc, a0),
        **{
            f"surface_energy_{k}_J_per_m2": v
            for k, v in surface_energies(calculator, fcc, a0).items()
        },
    }
    for other in ("hcp", "bcc"):
        cell = relaxed_lattice(calculator, other)
        difference = cell.get_potential_energy() / len(cell) - energy
        found[f"{other}_minus_fcc_meV_per_atom"] = 1e3 * difference
    return {key: round(float(value), 4) for key, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--potential", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, default=FOLDER / "metrics.json")
    options = parser.parse_args()
    metrics = {
        "held_out": errors(options.potential, held_out()),
        "properties": properties(options.potential),
    }
    options.out.write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
