"""Runs fairchem-core 1.10.0 for benchmarks/models.py and materials.py, in a Python that has it.

Requests are calls of Peer's methods (serve.py). torch_scatter's one function that matters here is
torch_geometric's of the same name; huggingface_hub, which downloads weights, and a function that
SciPy has dropped are replaced by placeholders.
"""

import importlib
import resource
import sys
import time
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import scipy.special
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.utils import scatter

CLASSES = {
    "escn": ("fairchem.core.models.escn.escn", "eSCN"),
    "equiformer_v2": (
        "fairchem.core.models.equiformer_v2.equiformer_v2_deprecated",
        "EquiformerV2",
    ),
    "hydra": ("fairchem.core.models.base", "HydraModel"),
}
# Where the backbones and heads that hydra names are registered.
PARTS = (
    "fairchem.core.models.equiformer_v2.equiformer_v2",
    "fairchem.core.models.equiformer_v2.heads",
    "fairchem.core.models.esen.esen",
)

LEARNING_RATE = 1e-8  # a step costs what it costs, and the next sees the same weights


class Peer:
    """One model of fairchem-core, the structures it is given and the edges it makes of them."""

    def __init__(self) -> None:
        self.model: Any = None
        self.batch: Any = None
        self.edges: dict[str, np.ndarray] = {}
        self.optimizer: Any = None

    def build(self, *, model: str, config: dict[str, Any], weights: str) -> dict[str, Any]:
        """Build a model with random weights and save them."""
        sys.modules.setdefault("torch_scatter", MagicMock(scatter=scatter))
        sys.modules.setdefault("huggingface_hub", MagicMock())
        if not hasattr(scipy.special, "sph_harm"):
            scipy.special.sph_harm = None
        for part in PARTS if model == "hydra" else ():
            importlib.import_module(part)
        module, name = CLASSES[model]
        torch.manual_seed(0)
        built = getattr(importlib.import_module(module), name)(**config)
        self.model = built.eval().requires_grad_(False)
        self._watch_edges()
        torch.save(dict(self.model.state_dict()), weights)
        return {"parameters": sum(p.numel() for p in self.model.parameters())}

    def take(self, *, structures: str) -> dict[str, Any]:
        """Read structures, one after the other in an .npz file."""
        with np.load(structures, allow_pickle=False) as file:
            ends = np.cumsum(file["natoms"])
            self.batch = Batch.from_data_list(
                [
                    Data(
                        pos=torch.from_numpy(file["pos"][end - n : end]).float(),
                        atomic_numbers=torch.from_numpy(file["numbers"][end - n : end]),
                        cell=torch.from_numpy(cell).float()[None],
                        natoms=torch.tensor([int(n)]),
                    )
                    for n, end, cell in zip(file["natoms"], ends, file["cell"], strict=True)
                ]
            )
        return {}

    def compute(self, *, results: str | None = None, trainable: bool = False) -> dict[str, Any]:
        """Compute energies and forces; return CPU seconds and the peak of this process so far.

        Its forward switches gradients on for any model with forces, so as shipped, with
        ``trainable`` weights, it keeps what they need; with frozen ones it does not.
        """
        self.model.eval().requires_grad_(trainable)
        batch = self.batch.clone()  # models write into it
        start = time.process_time()
        with torch.no_grad():
            outputs = self.model(batch)
        seconds = time.process_time() - start
        if results is not None:
            found = {key: value.detach().numpy() for key, value in outputs.items()}
            np.savez(results, **found, **self.edges)
        return {"cpu_s": seconds, "peak_bytes": peak_bytes()}

    def step(self, *, labels: str) -> dict[str, Any]:
        """Take a training step on energy, forces and stress; return CPU seconds, loss and norm."""
        self.model.train().requires_grad_(True)
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        with np.load(labels, allow_pickle=False) as file:
            wanted = {key: torch.from_numpy(file[key]).float() for key in file.files}
        batch = self.batch.clone()
        start = time.process_time()
        outputs = self.model(batch)
        loss = sum((outputs[k] - v.view_as(outputs[k])).square().mean() for k, v in wanted.items())
        loss.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.process_time() - start
        found = {"loss": float(loss.detach()), "gradient": norm}
        return {"cpu_s": seconds, "peak_bytes": peak_bytes(), **found}

    def _watch_edges(self) -> None:
        """Keep the edges and their frames, whose roll is random, so that ours can be the same."""
        backbone = getattr(self.model, "backbone", self.model)
        if not hasattr(backbone, "_init_edge_rot_mat"):
            return  # results do not depend on the roll
        make_graph, make_frames = backbone.generate_graph, backbone._init_edge_rot_mat

        def graph(*given: Any, **options: Any) -> Any:
            made = make_graph(*given, **options)
            self.edges["edge_index"] = made.edge_index.numpy()
            self.edges["cell_offsets"] = made.cell_offsets.numpy()
            return made

        def frames(*given: Any, **options: Any) -> torch.Tensor:
            made = make_frames(*given, **options)
            self.edges["rotation"] = made.detach().numpy()
            return made

        backbone.generate_graph, backbone._init_edge_rot_mat = graph, frames


def peak_bytes() -> int:
    """Return the largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    from serve import serve  # this folder is where the interpreter looks first

    serve(Peer())
