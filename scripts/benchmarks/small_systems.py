"""What a small structure pays for: operations that are sent, one by one, for energy and forces.

And how much of a calculator's call is spared where they are replayed, in CPU seconds of one thread,
in turns.
"""

import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.build import bulk
from torch.utils._python_dispatch import TorchDispatchMode

from atomeq.calculators.ase import AtomeqCalculator
from atomeq.potential.checkpoint import untrained_potential
from benchmarks.judged import Judged

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
MOST = {"escn": 200}


class Sent(TorchDispatchMode):
    """Counts operations; views, which compute nothing, are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count it."""
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def operations_of(model: str) -> int:
    """Count what one evaluation of a loaded potential sends; the first one makes its tables."""
    potential = untrained_potential(CONFIGS / f"{model}.yaml", dtype=torch.float32)
    potential = potential.requires_grad_(False).eval()
    graph = potential.build_graph([bulk("Cu", cubic=True)])
    potential(graph, ("energy", "forces"))
    with Sent() as sent:
        potential(graph, ("energy", "forces"))
    return sent.counts.total()


def replayed(n_calls: int) -> float:
    """Return by how much a call of a calculator that replays is faster, 4 moving atoms, cu-pbe."""
    torch.set_num_threads(1)
    random, ratios = np.random.default_rng(0), []
    both = [bulk("Cu", cubic=True) for _ in range(2)]
    for atoms, capture in zip(both, (False, True), strict=True):
        atoms.calc = AtomeqCalculator("cu-pbe", capture=capture)
    for _ in range(n_calls):
        step, spent = random.normal(scale=0.01, size=(4, 3)), []
        for atoms in both:
            atoms.positions += step
            started = time.process_time()
            atoms.get_forces()
            spent.append(time.process_time() - started)
        ratios.append(spent[0] / spent[1])
    return statistics.median(ratios[n_calls // 3 :])  # before, it is recorded and proved


def bars(quick: bool) -> list[Judged]:
    """Judge the default models that something is asked of."""
    ratio = replayed(60 if quick else 300)
    found = [Judged("cu-pbe, 4 atoms: call evaluated anew / replayed", f"{ratio:.2f} x")]
    for model, most in MOST.items():
        what = f"{model} default: operations per energy and forces"
        found.append(Judged.at_most(what, operations_of(model), most))
    return found
