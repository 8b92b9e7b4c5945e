"""Writes a small data set in OC20's formats, so that its experiments can be tried without one.

``oc20_example.py FOLDER`` makes slabs under CO, OH and CH3 with energies and forces of ASE's EMT, a
potential for demonstrations: total energies with their references as raw S2EF in FOLDER/s2ef_raw,
and the referenced ones as LMDB in FOLDER/s2ef_lmdb_train_ref. Then
``ATOMEQ_FORMATS=FOLDER atomeq fit -c configs/experiment/oc20_s2ef_equiformer_v2.yaml``.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, fcc111, molecule
from ase.calculators.emt import EMT

from atomeq.data.oc20_frame import OC20Frame
from atomeq.data.oc20_write import convert, write_raw

METALS = ("Cu", "Pt", "Ag", "Pd")
ADSORBATES = ("CO", "OH", "CH3")


def main(argv: list[str] | None = None) -> int:
    """Write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="created; must be new")
    parser.add_argument("--frames", type=int, default=24)
    arguments = parser.parse_args(argv)
    raw = arguments.folder / "s2ef_raw"
    raw.mkdir(parents=True)
    write_raw(raw / "0.extxyz.xz", frames(arguments.frames))
    convert(raw, arguments.folder / "s2ef_lmdb_train_ref", file_format="lmdb", energy="referenced")
    print(f"{arguments.frames} frames in {arguments.folder}")
    return 0


def frames(count: int) -> Iterator[OC20Frame]:
    """Return rattled slabs of 12 atoms with an adsorbate, labelled by EMT."""
    for k in range(count):
        metal, adsorbate = METALS[k % len(METALS)], ADSORBATES[k % len(ADSORBATES)]
        slab = fcc111(metal, (2, 2, 3), vacuum=6.0, periodic=True)
        layers = slab.get_tags()
        reference = energy(slab) + energy(molecule(adsorbate))
        add_adsorbate(slab, molecule(adsorbate), 1.9, "ontop")
        n_adsorbed = len(slab) - len(layers)
        slab.rattle(0.08, seed=k)
        total = energy(slab)
        yield OC20Frame(
            numbers=slab.numbers.astype(np.int64),
            positions=slab.positions,
            cell=slab.cell.array,
            tags=np.concatenate([(layers == 1).astype(np.int64), np.full(n_adsorbed, 2)]),
            fixed=np.concatenate([layers > 1, np.zeros(n_adsorbed, dtype=bool)]),
            energy=total,
            forces=slab.get_forces(),
            reference_energy=reference,
            sid=k,
            fid=0,
        )


def energy(atoms: Atoms) -> float:
    """Return the energy of EMT, which stays as the calculator."""
    atoms.calc = EMT()
    return float(atoms.get_potential_energy())


if __name__ == "__main__":
    sys.exit(main())
