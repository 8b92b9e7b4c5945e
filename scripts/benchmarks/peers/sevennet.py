"""Runs SevenNet's own code for `benchmark.py potentials`, in a Python that has it; see there.

It reads one request as JSON from each line of standard input and answers with one line on standard
output.
"""

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from ase.io import read


class Peer:
    """One published potential and one structure."""

    def take(self, *, checkpoint: str, structure: str) -> dict[str, Any]:
        """Load a potential by the name its own code has for it, and a structure from a file."""
        from sevenn.calculator import SevenNetCalculator  # takes seconds

        self.calculator = SevenNetCalculator(checkpoint, device="cpu")
        self.atoms = read(structure)
        return {"sevenn": version("sevenn"), "e3nn": version("e3nn"), "torch": torch.__version__}

    def compute(self) -> dict[str, Any]:
        """Compute energy, forces and stress, the neighbour list included; return CPU seconds."""
        start = time.process_time()
        self.calculator.calculate(self.atoms)
        seconds = time.process_time() - start
        results = self.calculator.results
        return {
            "cpu_s": seconds,
            "energy": float(results["energy"]),
            "forces": results["forces"].tolist(),
            "stress": results["stress"].tolist(),
        }


def main() -> None:
    """Answer requests until there are no more."""
    answers, sys.stdout = sys.stdout, sys.stderr  # the package prints
    torch.set_num_threads(1)
    peer = Peer()
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(peer, request.pop("do"))(**request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
