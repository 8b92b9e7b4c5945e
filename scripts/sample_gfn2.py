"""Sample a molecule by molecular dynamics with GFN2-xTB: frames to pretrain a potential on.

``.venv/bin/python scripts/sample_gfn2.py ${ATOMEQ_DATA}/acac/train_300K.extxyz.gz
${ATOMEQ_DATA}/gfn2_acac.extxyz`` takes some 15 minutes of one core; it needs ``pip install
tblite==0.4.0``. Method: Bannwarth, Ehlert and Grimme, J. Chem. Theory Comput. 15, 1652 (2019).
"""

import argparse
import contextlib
import io
from collections.abc import Iterator

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta

from atomeq.files import write_atomically


def trajectory(start: Atoms, kelvin: float, frames: int, every: int, seed: int) -> Iterator[Atoms]:
    """Yield frames with energies (eV) and forces (eV/Å), ``every`` steps of 0.5 fs apart."""
    from tblite.ase import TBLite

    atoms, random = Atoms(start.numbers, start.positions), np.random.default_rng(seed)
    atoms.calc = TBLite(method="GFN2-xTB", verbosity=0)
    thermalize_momenta(atoms, kelvin, rng=random)
    dynamics = Langevin(
        atoms,
        0.5 * units.fs,
        temperature_K=kelvin,
        friction=0.02 / units.fs,
        fixcm=False,
        rng=random,
    )
    for _ in range(frames):
        with contextlib.redirect_stdout(io.StringIO()):  # version 0.4.0 prints its dictionaries
            dynamics.run(every)
            energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        frame = Atoms(atoms.numbers, atoms.positions, info={"temperature": kelvin})
        frame.calc = SinglePointCalculator(frame, energy=energy, forces=forces)
        yield frame


def main() -> None:
    """Sample a file's first molecules, one after the other, at each temperature."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="any file that ASE reads, of one molecule")
    parser.add_argument("target", help="OUT.extxyz")
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=[300.0, 600.0, 900.0, 1200.0], help="K"
    )
    parser.add_argument(
        "--starts", type=int, default=10, help="trajectories at each, of as many structures"
    )
    parser.add_argument("--frames", type=int, default=100, help="of each trajectory")
    parser.add_argument("--every", type=int, default=20, help="steps of 0.5 fs between frames")
    options = parser.parse_args()
    known = read(options.source, index=":")
    starts = known[:: max(1, len(known) // options.starts)][: options.starts]
    sampled: list[Atoms] = []
    for kelvin in options.temperatures:
        for number, start in enumerate(starts):
            seed = round(kelvin) * len(starts) + number
            sampled += trajectory(start, kelvin, options.frames, options.every, seed)
    with write_atomically(options.target) as partial:
        write(partial, sampled, format="extxyz")
    print(f"{len(sampled)} structures in {options.target}")


if __name__ == "__main__":
    main()
