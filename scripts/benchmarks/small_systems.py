"""What a small structure pays for: operations that are sent, one by one, for energy and forces."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from ase.build import bulk
from torch.utils._python_dispatch import TorchDispatchMode

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


def bars(quick: bool) -> list[Judged]:
    """Judge the default models that something is asked of."""
    return [
        Judged.at_most(f"{model} default: operations per energy and forces", n, most)
        for model, most in MOST.items()
        for n in [operations_of(model)]
    ]
