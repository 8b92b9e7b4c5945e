r"""Elastic constants of a cubic crystal from labelled stresses, for a potential to be held to.

    python scripts/elastic_labels.py mlearn/Si_train.extxyz.gz --tag Elastic --a 5.469 \
        --stress-order "xx yy zz xz yz xy"

Second Piola-Kirchhoff stresses of strained crystals are fitted by least squares in Lagrangian
strain, with constants of second and third order (Brugger, Phys. Rev. 133, A1611 (1964)) and a
pressure on the diagonal. What the energies say of that pressure, by the same constants, is another
number where the stress has a Pulay part, no derivative of the energies: the difference is the
``stress_offset`` of a training.
"""

import argparse

import numpy as np
import torch
from ase import Atoms, units

from atomeq.data.ase_files import LabelKeys, read_structures

#: Crystals strained along one axis, or sheared in one plane, do not tell C123 and C456.
_NAMES = ("C11", "C12", "C44", "C111", "C112", "C144", "C155")
_VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))


def energies(e: torch.Tensor) -> torch.Tensor:
    """Return the energy density of each constant of a cubic crystal at 1, by strains (6,)."""
    x, y, z, a, b, c = e
    return torch.stack(
        [
            (x**2 + y**2 + z**2) / 2,
            x * y + y * z + z * x,
            (a**2 + b**2 + c**2) / 2,
            (x**3 + y**3 + z**3) / 6,
            (x**2 * (y + z) + y**2 * (x + z) + z**2 * (x + y)) / 2,
            (x * a**2 + y * b**2 + z * c**2) / 2,
            (x * (b**2 + c**2) + y * (a**2 + c**2) + z * (a**2 + b**2)) / 2,
        ]
    )


def strain_and_stress(atoms: Atoms, a: float) -> tuple[np.ndarray, np.ndarray]:
    """Return Lagrangian strain (6,) and second Piola-Kirchhoff stress (6,), GPa."""
    repeats = np.round(atoms.cell.lengths() / a)
    gradient = np.linalg.solve(np.diag(repeats * a), atoms.cell.array).T  # x = F X
    strain = (gradient.T @ gradient - np.eye(3)) / 2
    inverse = np.linalg.inv(gradient)
    cauchy = atoms.get_stress(voigt=False) / units.GPa
    stress = np.linalg.det(gradient) * inverse @ cauchy @ inverse.T
    factors = (1, 1, 1, 2, 2, 2)
    return (
        np.array([f * strain[ij] for f, ij in zip(factors, _VOIGT, strict=True)]),
        np.array([stress[ij] for ij in _VOIGT]),
    )


def fit(structures: list[Atoms], a: float, most: float) -> tuple[dict[str, float], float, int]:
    """Return the constants, GPa, the rms of what they leave and the number of structures."""
    rows, values, used, strains = [], [], [], []
    for atoms in structures:
        strain, stress = strain_and_stress(atoms, a)
        if np.abs(strain).max() > most:
            continue
        basis = torch.autograd.functional.jacobian(energies, torch.tensor(strain)).numpy()
        pressure = np.array([1.0, 1, 1, 0, 0, 0])
        rows.append(np.column_stack([basis.T, pressure]))
        values.append(stress)
        used.append(atoms)
        strains.append(strain)
    design, target = np.concatenate(rows), np.concatenate(values)
    found, *_ = np.linalg.lstsq(design, target, rcond=None)
    rms = float(np.sqrt(((design @ found - target) ** 2).mean()))
    constants = dict(zip((*_NAMES, "pressure"), map(float, found), strict=True))
    constants["offset"] = constants["pressure"] - pressure_of(
        used, np.array(strains), a, found[:-1]
    )
    return constants, rms, len(used)


def pressure_of(
    structures: list[Atoms], strains: np.ndarray, a: float, constants: np.ndarray
) -> float:
    """Return the pressure, GPa, in the energies of the cells of the commonest size.

    Others have other meshes of k-points, whose energies are not to be compared.
    """
    sizes = np.array([len(atoms) for atoms in structures])
    common = sizes == np.bincount(sizes).argmax()
    density = np.array([atoms.get_potential_energy() for atoms in structures])[common]
    cells = np.array([np.round(atoms.cell.lengths() / a).prod() for atoms in structures])[common]
    elastic = energies(torch.tensor(strains[common]).T).T.numpy() @ constants
    trace = strains[common, :3].sum(axis=1)
    design = np.column_stack([np.ones_like(trace), trace])
    found, *_ = np.linalg.lstsq(design, density / (cells * a**3) / units.GPa - elastic)
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="labelled structures under ATOMEQ_DATA")
    parser.add_argument("--tag", required=True, help="those whose tag ends so")
    parser.add_argument("--a", type=float, required=True, help="cubic lattice constant, Å")
    parser.add_argument("--most", type=float, default=0.05, help="largest strain")
    parser.add_argument("--stress-order", default=LabelKeys.stress_order, help="as of LabelKeys")
    options = parser.parse_args()
    labels = LabelKeys(stress_order=options.stress_order)
    every = read_structures(f"${{ATOMEQ_DATA}}/{options.file}", labels=labels)
    chosen = [atoms for atoms in every if str(atoms.info.get("tag")).endswith(options.tag)]
    found, rms, n_used = fit(chosen, options.a, options.most)
    found["B"] = (found["C11"] + 2 * found["C12"]) / 3
    print(f"{n_used} structures, rms {rms:.3f} GPa")
    print("  ".join(f"{name} {value:.1f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
