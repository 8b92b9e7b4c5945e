"""Who a structure is: the hash of its content, for a further copy of that and its place."""

import hashlib
import re

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms

from atomeq.graph.electrons import electrons_text

_DECIMALS = 6  # Å; the digits that text formats keep
# What is written as one, and what looks as if it had been.
_SURROGATE = re.compile(r"[\ud800-\udfff]|\\u")
_DIGITS = 32  # 128 bits: a million structures collide with a chance of 1e-27


def content_hash(atoms: Atoms) -> str:
    """Return the hash of elements, positions, cell, periodicity, fixed atoms, charge and spin.

    Positions and cell count to 1e-6 Å. Labels, names and velocities do not count. Structures that
    differ in the order of their atoms or the choice of their cell have different hashes; whether
    they are the same is for the matcher of dedupe.py to say.
    """
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms):
            fixed[constraint.get_indices()] = True
    digest = hashlib.sha256()
    for array in (atoms.numbers.astype("<i8"), atoms.pbc, fixed):
        digest.update(array.tobytes())
    for array in (atoms.positions, atoms.cell.array):
        rounded = np.round(array, _DECIMALS) + 0.0  # no negative zeros
        digest.update(np.ascontiguousarray(rounded, dtype="<f8").tobytes())
    digest.update(electrons_text(atoms).encode())
    return digest.hexdigest()[:_DIGITS]


def place_hash(content: str, locator: str) -> str:
    """Return the identity of what stands at a place: of a copy, or of what cannot be read."""
    return text_hash(f"{content}|{locator}")


def text_hash(text: str) -> str:
    """Return the hash of a text, as long as that of a structure; of any text, Unicode or not."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]


def printable(text: str) -> str:
    r"""Return a text that files, databases and terminals take: surrogates are written out.

    Names of files that are not UTF-8 come with surrogates. Two texts never become the same one.

    Example:
        >>> printable("copper-\udce9.cif")
        'copper-\\udce9.cif'
    """
    if not _SURROGATE.search(text):
        return text
    return text.replace("\\", "\\\\").encode("utf-8", "backslashreplace").decode()


def shard_of(content: str, n_shards: int) -> int:
    """Return which of n shards a hash belongs to."""
    return int(content[:15], 16) % n_shards
