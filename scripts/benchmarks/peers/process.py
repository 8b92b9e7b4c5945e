"""A process that computes with another library, in a Python that has it."""

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any, Self


class PeerProcess:
    """A script of this folder; with it ends as a context.

    Args:
        python: The interpreter.
        name: Of the script, ``fairchem_core`` or ``sevennet``.
    """

    def __init__(self, python: str, name: str) -> None:
        self._name = name
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name(f"{name}.py"))], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """Send a request and wait for the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **values}), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError) as error:
            with suppress(BrokenPipeError):  # what is in it cannot be sent
                self._process.stdin.close()
            self._process.stdin = None
            complaint = self._process.communicate()[1].strip()[-2000:] or "it ended"
            raise SystemExit(f"{self._name} failed at {do!r}:\n{complaint}") from error

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
