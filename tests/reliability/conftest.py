"""The working directory and the command of tests/cli."""

from cli.conftest import potential_folder, run, workdir

__all__ = ["potential_folder", "run", "workdir"]
