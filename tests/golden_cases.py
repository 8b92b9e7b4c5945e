"""Cases of tests/golden that several tests use: the published model, and the reference's graph."""

from pathlib import Path
from typing import Any

import torch

from atomeq.graph.atom_graph import AtomGraph
from atomeq.models.base import AtomisticModel
from checkers import oc20
from checkers.cases import Case, FolderCase

GOLDEN = Path(__file__).parent / "golden"
SLAB = GOLDEN / "oc20_models" / "eqv2_p2_slab_L4M2_oc20style"


def folder_case(folder: Path) -> FolderCase:
    case = Case.read(folder / "case.json")
    assert isinstance(case, FolderCase)
    return case


def case_model(folder: Path, **changes: Any) -> AtomisticModel:
    return oc20.case_model(folder_case(folder), **changes)


def case_graph(folder: Path) -> AtomGraph:
    return folder_case(folder).graph()


def published_checkpoint(folder: Path) -> dict[str, Any]:
    """A case's model as the Open Catalyst Project's files hold theirs, for torch.save."""
    case = folder_case(folder)
    return {
        "state_dict": {f"module.module.{name}": value for name, value in case.weights().items()},
        "normalizers": {
            "target": {"mean": torch.tensor(-0.75), "std": torch.tensor(2.9)},
            "grad_target": {"mean": torch.tensor(0.0), "std": torch.tensor(2.9)},
        },
        "config": {"model": case.model, "model_attributes": case.config},
    }
