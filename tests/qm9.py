"""A QM9 of four molecules with arbitrary labels, in exactly the form of its published files."""

import io
import tarfile
from pathlib import Path

import numpy as np
from ase.build import molecule

NAMES = ["CH4", "NH3", "H2O", "C2H2"]
EXCLUDED = 3  # the number of the water, from 1
#: A, B, C and the twelve targets, as the files have them.
VALUES = np.round(np.random.RandomState(0).normal(size=(len(NAMES), 15)), 6)


def raw_text(k: int, *, number: int | None = None) -> str:
    """Return the raw file of a molecule."""
    atoms = molecule(NAMES[k])
    lines = [str(len(atoms)), f"gdb {number or k + 1}\t" + "\t".join(f"{x:.6f}" for x in VALUES[k])]
    for symbol, position in zip(atoms.symbols, atoms.positions, strict=True):
        lines.append("\t".join([symbol, *(f"{x:.10f}" for x in position), "0.1"]))
    return "\n".join([*lines, "100.0\t200.0", "C\tC", "InChI=1S\tInChI=1S"]) + "\n"


def write_excluded(folder: Path) -> None:
    """Write uncharacterized.txt, with its header and its last line."""
    header = [f"header line {k}" for k in range(9)]
    row = f"   {EXCLUDED}   O   O   O   1.0"
    folder.joinpath("uncharacterized.txt").write_text("\n".join([*header, row, "1 compounds", ""]))


def write_archive(folder: Path, *, repeats: int = 1) -> Path:
    """Write the archive of the molecules, as often as asked, and the list of those to leave out."""
    path = folder / "dsgdb9nsd.xyz.tar.bz2"
    with tarfile.open(path, "w:bz2") as packed:
        for number in range(repeats * len(NAMES)):
            info = tarfile.TarInfo(f"dsgdb9nsd_{number + 1:06d}.xyz")
            content = raw_text(number % len(NAMES), number=number + 1).encode()
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    write_excluded(folder)
    return path
