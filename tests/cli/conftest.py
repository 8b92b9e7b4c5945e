"""A working directory with structure files and a small potential, and the command to run in it."""

from collections.abc import Callable
from pathlib import Path

import ase.io
import pytest
from ase.build import bulk
from small_potential import small_potential

from atomeq.cli import main
from atomeq.potential.checkpoint import save_potential


@pytest.fixture(scope="session")
def potential_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_potential(small_potential(), tmp_path_factory.mktemp("potentials") / "small")


@pytest.fixture
def workdir(tmp_path: Path, potential_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    crystal = bulk("Cu", cubic=True).repeat((2, 2, 1))
    crystal.rattle(0.1, seed=0)
    slightly = crystal.copy()
    slightly.rattle(0.02, seed=1)
    ase.io.write(tmp_path / "cu.extxyz", [crystal, slightly])
    ase.io.write(tmp_path / "atom.extxyz", crystal[:1])
    (tmp_path / "small").symlink_to(potential_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(workdir: Path) -> Callable[..., int]:
    """Run ``atomeq`` in this process on words or a line; return the exit code."""

    def command(line: str) -> int:
        try:
            main(line.split())
        except SystemExit as exit_:
            return int(exit_.code or 0)
        return 0

    return command
