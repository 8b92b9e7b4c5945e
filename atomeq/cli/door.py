"""What is refused before anything is loaded: absent files, unknown names, outputs nobody can write.

Nothing here imports torch or ase, so that a slip of the keyboard is answered at once.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from jsonargparse import Namespace

from atomeq.files import refuse_existing, refuse_unwritable
from atomeq.potential.folders import CONFIG_FILE, find_potential

#: Formats of structures that are written, by suffix.
FORMATS = {".extxyz": "extxyz", ".xyz": "extxyz", ".traj": "traj"}

#: What verbs keep beside their output, from which ``--restart`` goes on.
_KEPT = {
    "md": ".restart",
    "relax": ".relax",
    "neb": ".band.traj",
    "phonons": ".forces.jsonl",
    "kappa": ".forces.jsonl",
}

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


def ignorable(text: str) -> list[str]:
    """Return what ``--ignore`` names: charge, spin or both, with a comma.

    Raises:
        ValueError: There is no such thing to ignore.
    """
    names = [word.strip() for word in text.split(",") if word.strip()]
    if wrong := [name for name in names if name not in ("charge", "spin")]:
        raise ValueError(f"--ignore is charge, spin or both with a comma, not {wrong[0]!r}")
    return names


def summary_path(out: str | Path) -> Path:
    """Return the summary's path: ``cu.extxyz`` has ``cu.summary.json`` beside it."""
    return Path(out).with_suffix(".summary.json")


def kept_path(verb: str, out: str | Path) -> Path:
    """Return what a verb keeps for ``--restart``: ``md.extxyz`` has ``md.restart`` beside it."""
    return Path(out).with_suffix(_KEPT[verb])


def refuse_old_output(verb: str) -> Callable[[Namespace], None]:
    """Return the check that no run of a verb replaces what is there, or what it could go on from.

    It raises FileExistsError; a verb that has ``--restart`` may go on instead.
    """

    def check(options: Namespace) -> None:
        kept = kept_path(verb, options.out) if verb in _KEPT else None
        restart = kept is not None and options.restart
        if kept is not None and restart and kept.exists():
            return
        way = "there is nothing that --restart could go on from; " if restart else ""
        outputs = options.out, summary_path(options.out)
        refuse_existing(*outputs, overwrite=options.overwrite, way=way)
        if kept is not None:
            way = "go on from it with --restart, "
            refuse_existing(kept, overwrite=options.overwrite, way=way)

    return check


def refuse_old_files(*names: str) -> Callable[[Namespace], None]:
    """Return the check that the files that options name are not there; FileExistsError if so."""

    def check(options: Namespace) -> None:
        given = [options[name] for name in names if options[name]]
        refuse_existing(*given, overwrite=options.overwrite or options.get("resume", False))

    return check


def refuse_old_potential(options: Namespace) -> None:
    """Refuse to write a potential into the folder of another.

    Raises:
        FileExistsError: There is one.
    """
    refuse_existing(options.out / CONFIG_FILE, overwrite=options.overwrite)
