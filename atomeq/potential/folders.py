"""Where saved predictors lie: their files, shipped and installed ones, a folder found by its name.

Nothing here needs torch, so that a command line finds a wrong name before it waits for it.
"""

import difflib
import os
from pathlib import Path

CONFIG_FILE = "model.yaml"
WEIGHTS_FILE = "weights.safetensors"
ABOUT_FILE = "about.md"  # of a card, what was written by hand
METRICS_FILE = "metrics.json"  # what was measured
EXAMPLE_FILE = "example.extxyz"  # a structure that it is made for, where a crystal is not
COMMITTEE_FILE = "committee.yaml"  # of a folder whose subfolders are potentials


class CheckpointError(ValueError):
    """A potential folder is missing, damaged, or of a version this package cannot read."""


def split_head(name_or_path: str | Path) -> tuple[str | Path, str | None]:
    """Return the name of a potential and of the head that is chosen by ``NAME@HEAD``."""
    name, at, head = str(name_or_path).rpartition("@")
    return (name, head) if at and not Path(name_or_path).exists() else (name_or_path, None)


def find_potential(name_or_path: str | Path) -> Path:
    """Return the folder of a potential or committee given by path or by the name of a known one.

    Args:
        name_or_path: ``NAME@HEAD`` chooses a head, which is in the same folder.

    Raises:
        CheckpointError: There is no such folder; the message lists the known names.
    """
    path = Path(split_head(name_or_path)[0])
    roots = (*_shipped_roots(), user_root()) if len(path.parts) == 1 else ()
    candidates = [path, *(root / path for root in roots)]
    for candidate in candidates:
        if (candidate / CONFIG_FILE).is_file() or (candidate / COMMITTEE_FILE).is_file():
            return candidate
    if path.suffix == ".pt2" and path.is_file():
        raise CheckpointError(
            f"{path} is a compiled potential, a program that is run by loading it; if you trust "
            "where it comes from, load it with atomeq.load_compiled()"
        )
    names = [*shipped_potentials(), *installed_potentials()]
    close = difflib.get_close_matches(str(name_or_path), names, n=1)
    raise CheckpointError(
        f"no potential at {str(name_or_path)!r}: neither a folder with {CONFIG_FILE} nor the name "
        f"of a known potential ({', '.join(names) or 'none'})"
        + (f"; did you mean {close[0]!r}?" if close else "")
        + "; `atomeq potentials list` shows what can be installed"
    )


def find_single_potential(name_or_path: str | Path) -> Path:
    """Return the folder of a potential, for who can use no committee.

    Raises:
        CheckpointError: There is no such folder, or it is a committee's.
    """
    folder = find_potential(name_or_path)
    if (folder / COMMITTEE_FILE).is_file():
        raise CheckpointError(
            f"{folder} is a committee, and one potential is needed; name a member, one of the "
            f"folders in it"
        )
    return folder


def find_propagator(path: str | Path) -> Path:
    """Return the folder of a saved propagator.

    Raises:
        CheckpointError: There is no such folder.
    """
    if not (Path(path) / CONFIG_FILE).is_file():
        raise CheckpointError(f"no propagator at {str(path)!r}: no folder with {CONFIG_FILE}")
    return Path(path)


def shipped_potentials() -> list[str]:
    """Return the names of the potentials that come with the package."""
    found = {p.parent.name for root in _shipped_roots() for p in root.glob(f"*/{CONFIG_FILE}")}
    return sorted(found)


def installed_potentials() -> list[str]:
    """Return the names of the potentials that the user has installed."""
    return sorted(path.parent.name for path in user_root().glob(f"*/{CONFIG_FILE}"))


def user_root() -> Path:
    """Return where installed potentials lie: ATOMEQ_POTENTIALS, or the user's data folder."""
    if named := os.environ.get("ATOMEQ_POTENTIALS"):
        return Path(named).expanduser()
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "atomeq" / "potentials"


def _shipped_roots() -> tuple[Path, Path]:
    package = Path(__file__).resolve().parent.parent
    return package / "_potentials", package.parent / "potentials"  # installed wheel, source tree
