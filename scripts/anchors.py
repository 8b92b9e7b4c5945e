r"""Write structures that no training set of a solid holds, with energies that are known of them.

An atom alone, dimers from the core to dissociation, and the perfect crystal from compressed to
torn apart: a network that has seen them decays to free atoms and does not collapse.

    python scripts/anchors.py Cu --out configs/data/cu_anchors.extxyz
    python scripts/anchors.py Si --out configs/data/mlearn/Si_anchors.extxyz \
        --divide mlearn/Si_train.extxyz.gz --split configs/data/mlearn/Si_split.json
    python scripts/anchors.py Nb Mo Ta W --out configs/data/nbmotaw_anchors.extxyz \
        --divide mvl_snap/NbMoTaW.extxyz.gz --split configs/data/nbmotaw_split.json --test-tag _Test

Of several elements pairs of unlike atoms collide as well. With --divide, also which structures of a
file train, anchors included, and which choose the weights: 6 % of each kind, whole groups of
symmetry copies, none with a copy in the test set.

Crystals lie on the universal binding curve (Rose, Smith, Guinea and Ferrante, Phys. Rev. B 29, 2963
(1984)) through lattice constant, cohesive energy and bulk modulus of PBE (the cohesive energies of
Nb, Ta and W are measured ones: Kittel, Introduction to Solid State Physics); dimers, where they are
known, on Morse's curve through bond length, frequency and dissociation energy of Huber and Herzberg
(1979), and at distances of collisions on the repulsion of nuclei alone. Labels of this kind are
good to tenths of an eV and get a small weight.
"""

import argparse
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator

from atomeq.data.ase_files import read_structures
from atomeq.data.copies import copies_among
from atomeq.graph.builders import RadiusGraph
from atomeq.potential.repulsion import ZBL

_STRETCHES = (0.82, 0.86, 1.1, 1.15, 1.2, 1.27, 1.35, 1.45, 1.55, 1.7)  # of the lattice constant
_BONDS = (0.8, 0.9, 1.0, 1.08, 1.17, 1.3, 1.45, 1.65, 1.85, 2.1)  # dimers, in bond lengths
_COLLISIONS = (0.5, 0.7, 0.9, 1.1)  # Å
_CUTOFF, _BOX = 6.0, 20.0
_VALIDATED = 0.06


@dataclass(frozen=True)
class Known:
    """What is known of an element.

    Attributes:
        lattice: Its crystal, as ``ase.build.bulk`` calls it.
        a: Lattice constant, Å.
        energy: Of an atom of the crystal in the labels of the data, eV.
        cohesive: Energy, eV per atom.
        bulk_modulus: GPa.
        bond: Length of the dimer, Å; 0 where it is not known.
        frequency: Of its vibration, 1/cm.
        dissociation: Energy of the dimer, eV.
    """

    lattice: str
    a: float
    energy: float
    cohesive: float
    bulk_modulus: float
    bond: float = 0.0
    frequency: float = 0.0
    dissociation: float = 0.0


KNOWN = {
    "Cu": Known("fcc", 3.635, -4.1013, 3.48, 138.0, 2.2197, 264.55, 2.03),
    "Li": Known("bcc", 3.435, -1.8990, 1.61, 13.9, 2.6729, 351.43, 1.06),
    "Mo": Known("bcc", 3.165, -10.8502, 6.21, 258.0, 1.938, 477.1, 4.2),
    "Si": Known("diamond", 5.469, -5.4253, 4.55, 88.6, 2.246, 510.98, 3.24),
    "Ge": Known("diamond", 5.763, -4.4925, 3.72, 58.0, 2.368, 287.9, 2.75),
    "Nb": Known("bcc", 3.3226, -10.0950, 7.57, 174.0),
    "Ta": Known("bcc", 3.3223, -11.8529, 8.10, 196.0),
    "W": Known("bcc", 3.190, -12.9603, 8.90, 305.0),
}


def rose(known: Known, volume: float) -> float:
    """Return the energy of an atom in the crystal at a volume per atom, Å³, over the free one."""
    at_rest = bulk("Cu", known.lattice, a=known.a)
    radius, rest = (
        (3 * v / (4 * math.pi)) ** (1 / 3) for v in (volume, at_rest.get_volume() / len(at_rest))
    )
    length = math.sqrt(known.cohesive / (12 * math.pi * known.bulk_modulus * units.GPa * rest))
    x = (radius - rest) / length
    return -known.cohesive * (1 + x + 0.05 * x**3) * math.exp(-x)


def morse(known: Known, symbol: str, distance: float) -> float:
    """Return the energy of a dimer over that of its atoms, eV."""
    mass = Atoms(symbol).get_masses()[0] / 2 * units._amu
    stiffness = mass * (2 * math.pi * units._c * 100 * known.frequency) ** 2  # N/m
    stiffness *= units.J / units.m**2
    width = math.sqrt(stiffness / (2 * known.dissociation))
    return known.dissociation * ((1 - math.exp(-width * (distance - known.bond))) ** 2 - 1)


def anchors(symbol: str) -> list[Atoms]:
    """Return the structures of an element with their energies."""
    known = KNOWN[symbol]
    free = known.energy + known.cohesive
    found = [labelled(boxed(symbol, 0.0), free)]
    for stretch in _STRETCHES:
        cell = bulk(symbol, known.lattice, a=stretch * known.a)
        energy = free + rose(known, cell.get_volume() / len(cell))
        found.append(labelled(cell, len(cell) * energy))
    for length in _BONDS if known.bond else ():
        distance = length * known.bond
        energy = 2 * free + morse(known, symbol, distance)
        found.append(labelled(boxed(2 * [symbol], distance), energy))
    return found + collisions([symbol, symbol])


def collisions(pair: list[str]) -> list[Atoms]:
    """Return two atoms so close that their nuclei alone speak."""
    free, found = sum(KNOWN[one].energy + KNOWN[one].cohesive for one in pair), []
    for distance in _COLLISIONS:
        atoms = boxed(pair, distance)
        nuclei = float(ZBL()(RadiusGraph(_CUTOFF)(atoms)).sum())
        found.append(labelled(atoms, free + nuclei))
    return found


def boxed(symbols: str | list[str], distance: float) -> Atoms:
    """Return atoms on a line in a large cell, for a loss of stresses wants a volume."""
    positions = [[0.0, 0.0, k * distance] for k in range(1 if isinstance(symbols, str) else 2)]
    return Atoms(symbols, positions, cell=[_BOX] * 3, pbc=True)


def labelled(atoms: Atoms, energy: float) -> Atoms:
    atoms.calc = SinglePointCalculator(atoms, energy=energy)
    atoms.info["tag"] = "anchor"
    return atoms


def division(
    file: str, n_anchors: int, test: list[int], test_tag: str | None = None
) -> dict[str, list[int]]:
    """Return indices to train on, to validate on and to test on."""
    structures = list(read_structures(f"${{ATOMEQ_DATA}}/{file}"))
    if test_tag is not None:
        test = [k for k, a in enumerate(structures) if a.info["tag"].endswith(test_tag)]
    groups = np.array(copies_among(structures))
    tags = np.array([atoms.info["tag"] for atoms in structures])
    random, val = np.random.RandomState(0), []
    for tag in sorted(set(tags), key=lambda tag: -(tags == tag).sum()):
        free = sorted(set(groups[tags == tag]) - set(groups[test]))
        found: list[int] = []
        for group in random.permutation(free):
            if len(found) < round(_VALIDATED * (tags == tag).sum()):
                found += np.flatnonzero(groups == group).tolist()
        val += found
    everything = range(len(structures) + n_anchors)
    train = sorted(set(everything) - {*val, *test})
    return {"train": train, "val": sorted(val), "test": test}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("elements", nargs="+", choices=KNOWN)
    parser.add_argument("--out", required=True)
    parser.add_argument("--divide", help="file of labelled structures under ATOMEQ_DATA")
    parser.add_argument("--split", type=Path, help="where the indices go")
    parser.add_argument("--test", type=int, nargs="*", default=[], help="indices of the test set")
    parser.add_argument("--test-tag", help="or those whose tag ends so")
    options = parser.parse_args()
    made = [one for element in options.elements for one in anchors(element)]
    for pair in itertools.combinations(options.elements, 2):
        made += collisions(list(pair))
    ase.io.write(options.out, made, format="extxyz")
    if options.divide:
        found = division(options.divide, len(made), options.test, options.test_tag)
        options.split.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
