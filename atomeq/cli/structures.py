"""Structures in, structures and a summary out: the files around every simulation verb."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import ase.io
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.extxyz import write_extxyz
from ase.io.trajectory import TrajectoryWriter

from atomeq.calculators.ase import AtomeqCalculator, has_volume
from atomeq.cli.door import output_format
from atomeq.files import write_atomically

#: Packages whose version a result depends on.
PACKAGES = ("atomeq", "torch", "torch_geometric", "numpy", "ase", "vesin")


class Origin(Protocol):
    """What a result was computed with: a calculator, or a propagator that was loaded."""

    @property
    def provenance(self) -> dict[str, str | None]:
        """Name, folder and hash of the weights."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computed."""
        ...


class StructureWriter:
    """Writes frames one by one, so that what a killed run leaves can be read.

    Args:
        path: The file to write.
        file_format: ``extxyz`` or ``traj``.
        begin: An earlier file whose first frames come first, and its :attr:`extent` then.
    """

    def __init__(self, path: Path, file_format: str, begin: tuple[Path, int] | None = None) -> None:
        self.path = path
        self._n_frames = 0
        self._stream = self._trajectory = None
        if file_format == "extxyz":
            if begin is not None:
                copy_beginning(*begin, path)
            self._stream = path.open("w" if begin is None else "a", encoding="utf-8")
            return
        self._trajectory = TrajectoryWriter(path, "w")
        if begin is not None:
            for atoms in ase.io.iread(begin[0], index=f":{begin[1]}", format="traj"):
                self.write(atoms)

    @property
    def extent(self) -> int:
        """How much there is by now: bytes of text, frames of a trajectory."""
        return self._n_frames if self._stream is None else self._stream.tell()

    def write(self, atoms: Atoms) -> None:
        """Append a structure with the results its calculator has for it."""
        self._n_frames += 1
        if self._stream is not None:
            write_extxyz(self._stream, [atoms])
            self._stream.flush()
        if self._trajectory is not None:
            self._trajectory.write(atoms)

    def close(self) -> None:
        """Close the file."""
        for file in (self._stream, self._trajectory):
            if file is not None:
                file.close()


@contextmanager
def structure_output(
    path: str | Path,
    *,
    keep_on: tuple[type[BaseException], ...] = (),
    begin: tuple[Path, int] | None = None,
) -> Iterator[StructureWriter]:
    """Open a file for structures that appears under its name when the block ends well.

    Args:
        path: The file.
        keep_on: See :func:`~atomeq.files.write_atomically`.
        begin: See :class:`StructureWriter`.
    """
    file_format = output_format(path)
    with write_atomically(path, keep_on=keep_on) as partial:
        writer = StructureWriter(partial, file_format, begin)
        try:
            yield writer
        finally:
            writer.close()


def copy_beginning(source: Path, n_bytes: int, path: Path) -> None:
    """Copy the first bytes of a file.

    Raises:
        ValueError: There are not as many.
    """
    content = source.read_bytes()[:n_bytes] if source.exists() else b""
    if len(content) < n_bytes:
        raise ValueError(
            f"{source}, what the interrupted run wrote, is missing or too short; start afresh "
            "without --restart"
        )
    path.write_bytes(content)


def with_results(atoms: Atoms, calculator: AtomeqCalculator) -> Atoms:
    """Return a copy of a structure with energy, forces and, where there is one, stress."""
    names = ["energy", "free_energy", "forces"]
    if has_volume(atoms) and "stress" in calculator.implemented_properties:
        names.insert(0, "stress")  # the rest comes along
    results = {name: calculator.get_property(name, atoms) for name in names}
    frozen = atoms.copy()
    frozen.calc = SinglePointCalculator(frozen, **results)
    return frozen


def summary_path(out: str | Path) -> Path:
    """Return the summary's path: ``cu.extxyz`` has ``cu.summary.json`` beside it."""
    return Path(out).with_suffix(".summary.json")


def write_summary(
    verb: str,
    out: str | Path,
    *,
    source: str,
    calculator: Origin,
    settings: dict[str, Any],
    results: dict[str, Any],
    role: str = "potential",
) -> Path:
    """Write what was done, with what, and what came out, as JSON beside the output.

    Args:
        verb: The subcommand.
        out: The output file.
        source: The input file as it was given.
        calculator: Names the potential, dtype and device.
        settings: Every option of the run.
        results: What the verb found.
        role: What the weights are.

    Returns:
        The path of the summary.
    """
    path = summary_path(out)
    document = {
        "command": verb,
        "input": source,
        "output": str(out),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        role: calculator.provenance,
        "dtype": str(calculator.dtype).removeprefix("torch."),
        "device": str(calculator.device),
        "versions": versions(),
        "settings": settings,
        **results,
    }
    with write_atomically(path) as partial:
        partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path


def versions() -> dict[str, str]:
    """Return versions of Python and of the packages results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from the source tree
            found[name] = "not installed"
    if threads := os.environ.get("OMP_NUM_THREADS"):
        found["OMP_NUM_THREADS"] = threads
    return found
