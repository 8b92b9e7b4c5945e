"""Cases of tests/golden: the published model with its weights, and the reference's own graph."""

import json
import runpy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import AtomisticModel
from atomeq.potential.official_names import build_official, official_weights

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
SLAB = GOLDEN / "oc20_models" / "eqv2_p2_slab_L4M2_oc20style"


def script() -> dict[str, Any]:
    """Return the functions of scripts/golden.py."""
    return runpy.run_path(str(ROOT / "scripts" / "golden.py"), run_name="golden")


def case_model(folder: Path, **changes: Any) -> AtomisticModel:
    case = json.loads((folder / "case.json").read_text())
    model = build_official(case["model"], {**case["config"], **changes})
    model.load_state_dict(official_weights(model, load_file(folder / "weights.safetensors")))
    return model.eval().requires_grad_(False)


def published_checkpoint(folder: Path) -> dict[str, Any]:
    """A case's model as the Open Catalyst Project's files hold theirs, for torch.save."""
    case = json.loads((folder / "case.json").read_text())
    weights = load_file(folder / "weights.safetensors")
    return {
        "state_dict": {f"module.module.{name}": tensor for name, tensor in weights.items()},
        "normalizers": {
            "target": {"mean": torch.tensor(-0.75), "std": torch.tensor(2.9)},
            "grad_target": {"mean": torch.tensor(0.0), "std": torch.tensor(2.9)},
        },
        "config": {"model": case["model"], "model_attributes": case["config"]},
    }


def case_graph(folder: Path) -> AtomGraph:
    return script()["graph_of"](load_file(folder / "inputs.safetensors"))
