"""Structures from files: any format that ASE reads, one error for whatever its readers raise."""

import os
from pathlib import Path

import ase.io
from ase import Atoms


def read_structures(path: str | os.PathLike[str], *, index: str = ":") -> list[Atoms]:
    """Read structures from any file ASE knows.

    Args:
        path: The file.
        index: ASE's index of frames, ``":"`` for all, ``"-1:"`` for the last.

    Returns:
        At least one structure, without calculators: results in a file are not the potential's.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is not readable, truncated, or holds no such structure.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        frames = ase.io.read(path, index=index)
    except Exception as error:  # readers of ASE raise anything from IndexError to XMLSyntaxError
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"cannot read structures from {path} ({reason}); is it complete, and its suffix right?"
        ) from error
    structures = frames if isinstance(frames, list) else [frames]
    if not structures:
        raise ValueError(f"{path} holds no structure {index}".replace(" :", ""))
    for atoms in structures:
        atoms.calc = None
    return structures
