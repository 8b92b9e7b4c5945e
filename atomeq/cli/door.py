"""What is refused before anything is loaded: absent files, unknown names, outputs nobody can write.

Nothing here imports torch or ase, so that a slip of the keyboard is answered at once.
"""

import os
import re
from pathlib import Path

from atomeq.files import refuse_unwritable
from atomeq.potential.folders import find_potential

#: Formats of structures that are written, by suffix.
FORMATS = {".extxyz": "extxyz", ".xyz": "extxyz", ".traj": "traj"}

_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?")


def existing_file(path: str | Path) -> Path:
    """Return the path of a file that is there.

    Raises:
        FileNotFoundError: No such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    return path


def existing_path(path: str | Path) -> Path:
    """Return the path of a file or folder that is there.

    Raises:
        FileNotFoundError: Neither.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    return path


def checkable(target: str) -> None:
    """Refuse a potential that is not there; of a YAML or module:factory, whoever reads it can say.

    Raises:
        CheckpointError: There is no potential of this name.
    """
    if not target.endswith((".yaml", ".yml")) and (":" not in target or Path(target).exists()):
        find_potential(target)


def data_source(path: str | Path) -> None:
    """Refuse data that is not there; ``${NAME}`` stands for the environment's variable."""
    text = os.path.expanduser(os.path.expandvars(path))
    if "${" not in text:  # of an unset variable, who opens the data says more
        existing_path(text)


def output_format(path: str | Path) -> str:
    """Return ASE's name of the format of an output file, before any work is done.

    Raises:
        ValueError: The suffix is not one that can be written.
        OSError: The file cannot be written.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"cannot write {path}: give it the suffix {', '.join(FORMATS)}")
    refuse_unwritable(path)
    return FORMATS[path.suffix]


def device_name(name: str) -> str:
    """Return a name that can be a device; whether it is there, only torch can tell.

    Raises:
        ValueError: It is not the name of a device.
    """
    if not _DEVICE.fullmatch(name):
        raise ValueError(f"{name!r} is not a device; give 'cpu', 'cuda' or 'cuda:1'")
    return name
