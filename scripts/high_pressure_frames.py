"""Divide MatterSim's benchmarks into what a fine-tuning at high temperature and pressure reads.

``.venv/bin/python scripts/high_pressure_frames.py ${ATOMEQ_DATA}/mattersim_benchmarks
${ATOMEQ_DATA}/high_pressure`` writes, in half a minute,

* ``train.extxyz``, ``val.extxyz``, ``test.extxyz``: frames at high temperature and pressure, with
  copies of a structure in one part, and for training the smaller ones of MPtrj's highest stresses;
* ``replay.extxyz``: smaller frames of MPtrj and all of Alexandria, to be labelled by the potential;
* ``test_mptrj.extxyz`` and ``test_highest_stress.extxyz``, every tenth frame of these, and
  ``test_mptrj_large.extxyz``: those of MPtrj that were too large to be replayed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ase import Atoms
from ase.io import write

from atomeq.data.ase_files import read_structures
from atomeq.data.copies import copies_among
from atomeq.data.splits import Split, split_indices
from atomeq.files import write_atomically

NEW = ("mpf-TP", "mpf-alkali-TP", "random-TP")
#: Atoms of a frame that trains: large ones cost most and are few.
MOST_OF_MPTRJ, MOST_OF_HIGH_STRESS = 48, 36
HELD_OUT = 10  # one in so many


def divided(frames: Sequence[Atoms], split: Split) -> dict[str, list[Atoms]]:
    """Return the parts of some frames, copies of a structure together."""
    parts = split_indices(len(frames), split, groups=copies_among(frames))
    return {part: [frames[k] for k in chosen] for part, chosen in parts.items()}


def others(frames: Sequence[Atoms], most: int) -> list[Atoms]:
    """Return the frames that are not held out and have not too many atoms."""
    return [a for k, a in enumerate(frames) if k % HELD_OUT and len(a) <= most]


def main() -> None:
    """Read the six files that are used, write seven others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="the folder mattersim_benchmarks")
    parser.add_argument("target", type=Path, help="a new folder")
    options = parser.parse_args()
    if options.target.exists():
        parser.error(f"{options.target} exists: name a new folder, or remove it")

    def read(name: str) -> list[Atoms]:
        return list(read_structures(options.source / f"{name}.extxyz.gz"))

    new = divided([atoms for name in NEW for atoms in read(name)], Split(val=80, test=0.15))
    mptrj, stressed = read("mptrj-random-1k"), read("mptrj-highest-stress-1k")
    files = {
        "train": new["train"] + others(stressed, MOST_OF_HIGH_STRESS),
        "val": new["val"],
        "test": new["test"],
        "replay": others(mptrj, MOST_OF_MPTRJ) + read("alexandria-random-1k"),
        "test_mptrj": mptrj[::HELD_OUT],
        "test_mptrj_large": [
            a for k, a in enumerate(mptrj) if k % HELD_OUT and len(a) > MOST_OF_MPTRJ
        ],
        "test_highest_stress": stressed[::HELD_OUT],
    }
    options.target.mkdir(parents=True)
    for name, frames in files.items():
        with write_atomically(options.target / f"{name}.extxyz") as partial:
            write(partial, frames, format="extxyz")
        print(f"{len(frames)} structures in {options.target / name}.extxyz")


if __name__ == "__main__":
    main()
