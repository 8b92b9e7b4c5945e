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

import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.extxyz import write_extxyz
from ase.io.trajectory import TrajectoryWriter

from atomeq.calculators.ase import AtomeqCalculator, has_volume
from atomeq.cli.door import output_format, summary_path
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
    """

    def __init__(self, path: Path, file_format: str) -> None:
        self._stream = self._trajectory = None
        if file_format == "extxyz":
            self._stream = path.open("w", encoding="utf-8")
        else:
            self._trajectory = TrajectoryWriter(path, "w")

    def write(self, atoms: Atoms) -> None:
        """Append a structure with the results its calculator has for it."""
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
def structure_output(path: str | Path) -> Iterator[StructureWriter]:
    """Open a file for structures that appears under its name when the block ends well."""
    file_format = output_format(path)
    with write_atomically(path) as partial:
        writer = StructureWriter(partial, file_format)
        try:
            yield writer
        finally:
            writer.close()


def with_results(atoms: Atoms, calculator: AtomeqCalculator) -> Atoms:
    """Return a copy of a structure with energy, forces and, where there are, stress and σ."""
    names = ["energy", "free_energy", "forces"]
    if has_volume(atoms) and "stress" in calculator.implemented_properties:
        names.insert(0, "stress")  # the rest comes along
    results = {name: calculator.get_property(name, atoms) for name in names}
    frozen = atoms.copy()
    frozen.calc = SinglePointCalculator(frozen, **results)
    if "energy_uncertainty" in calculator.implemented_properties:
        frozen.info["energy_uncertainty"] = calculator.get_property("energy_uncertainty", atoms)
        of_forces = calculator.get_property("forces_uncertainty", atoms)
        frozen.set_array("forces_uncertainty", of_forces)
    return frozen


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
