"""Runs SevenNet's own code for `benchmark.py potentials`, in a Python that has it; see there.

Requests are calls of Peer's methods (serve.py).
"""

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


if __name__ == "__main__":
    from serve import serve  # this folder is where the interpreter looks first

    serve(Peer())
