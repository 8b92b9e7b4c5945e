"""What a run that is killed leaves behind, so that ``--restart`` goes on from there.

A verb keeps a file or folder beside its output while it computes. It says which run it belongs to,
and another run does not go on from it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.dynamics.trajectory import CHECKPOINT_FILE
from atomeq.files import write_atomically
from atomeq.potential.checkpoint import sha256

_ABOUT = "run.jsonl"


def identity(
    options: Namespace, calculator: AtomeqCalculator, *, free: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what decides the results of a run.

    Args:
        options: Of the verb.
        calculator: Its weights count, not where they lie.
        free: Options that may change when a run goes on.
    """
    kept = {
        key: value
        for key, value in options.as_dict().items()
        if key not in ("input", "out", "potential", "restart", "overwrite", *free)
    }
    weights = calculator.provenance["sha256"]
    return json.loads(
        json.dumps({"input": sha256(Path(options.input)), "weights": weights, **kept})
    )


def refuse_other_run(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse to go on from another run's file.

    Raises:
        ValueError: Something that decides the results differs.
    """
    for key in sorted({*found, *expected}):
        if found.get(key) != expected.get(key):
            raise ValueError(
                f"{path} is of another run: {key} was {found.get(key)!r} and is now "
                f"{expected.get(key)!r}; repeat its options, or start afresh without --restart"
            )


class RunFolder:
    """What a run of :mod:`atomeq.dynamics` keeps beside its output, with what the run is.

    Args:
        path: The folder; made anew unless the run goes on.
        about: The run, see :func:`identity`.
        restart: Keep what is there.

    Raises:
        ValueError: What is there is of another run.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], *, restart: bool) -> None:
        self.path = path
        if not restart:
            self.remove()
        Journal(path / _ABOUT, about, restart=restart)

    def frames(self, index: int) -> Path:
        """Return the file of a structure's frames."""
        return self.path / f"{index:06d}.extxyz"

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Say after Ctrl-C how the run goes on."""
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"and what was computed is in {self.path}; go on with the same options and "
                "--restart"
            ) from None

    def remove(self) -> None:
        """Remove what a restart would need, and nothing else that is in the folder."""
        if not self.path.exists():
            return
        for pattern in ("[0-9]" * 6 + ".*", CHECKPOINT_FILE, _ABOUT):
            for path in self.path.glob(pattern):
                path.unlink()
        if not any(self.path.iterdir()):
            self.path.rmdir()


class Journal:
    """Results that are complete, one a line, on disk as soon as they are known.

    Args:
        path: The file; its folder is made if missing.
        about: The run, see :func:`identity`.
        restart: Keep what is there.

    Attributes:
        entries: The results so far. A line that a kill cut off is not among them.

    Raises:
        ValueError: The file is of another run.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], *, restart: bool) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        if restart and lines:
            header, *rest = (json.loads(line) for line in lines)
            refuse_other_run(path, header, about)
            self.entries = rest
        with write_atomically(path) as partial:
            text = "".join(json.dumps(entry) + "\n" for entry in (dict(about), *self.entries))
            partial.write_text(text, encoding="utf-8")

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add a result."""
        self.entries.append(dict(entry))
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")

    def remove(self) -> None:
        """Remove the file: the run has ended."""
        self.path.unlink(missing_ok=True)
