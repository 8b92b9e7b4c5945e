"""Golden checks of models in parts, backbone and heads: EquiformerV2 with a stress, DeNS, eSCN."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from atomeq.nn.stress import Rank2Stress, symmetric_basis
from atomeq.potential.official_names import build_official, official_weights
from atomeq.potential.official_oc20 import EQUIFORMER_V2, ESCN
from checkers import oc20
from checkers.cases import Case, FolderCase, Tensors, compare_all
from checkers.report import Report

PERCEPTRONS = {"trace": "scalar_MLP", "traceless": "irrep2_MLP", "tensor": "r2tensor_MLP"}


def handles(case: Case) -> bool:
    """Say whether a case belongs here."""
    if case.model != "hydra":
        return False
    backbone = str(case.config["backbone"]["model"]).rpartition(".")[2]
    return backbone in EQUIFORMER_V2.names | ESCN.names


def check(case: FolderCase, report: Report) -> None:
    """Check a case in float64 and float32, and the edges that our builder finds."""
    model: Any = build_official(case.model, case.config)
    model.double()  # before the weights: what is folded into some is no float32 number
    model.load_state_dict(official_weights(model, case.weights()))
    model.eval().requires_grad_(False)
    graph = case.graph()
    for dtype in case.tolerances:
        theirs = case.expected(dtype)
        rotation = theirs.get("in.edge_rot_mat", case.inputs["edge_rot_mat"])
        with watch_stress(model.to(dtype)) as found:
            ours = oc20.compute(model, graph, rotation.to(dtype))
        ours |= {
            name: tensor.reshape(theirs[name].shape)  # nine numbers in place of 3 x 3
            for name, tensor in found.items()
            if name in theirs and tensor.numel() == theirs[name].numel()
        }
        if (wigner := theirs.get("mid.wigner_first4edges")) is not None:
            ours["mid.wigner_first4edges"] = oc20.full_wigner(
                model, graph, rotation, wigner.shape[-1]
            )
        compare_all(case, report, ours, dtype)
    if case.config["backbone"].get("use_pbc", True):
        report.notes.append(oc20.compare_edges(model, graph))


@contextmanager
def watch_stress(model: Any) -> Iterator[Tensors]:
    """Collect the stress and what its published head makes on the way."""
    found: Tensors = {}
    hooks = []

    def keep(module: torch.nn.Module, name: str, rows: int | None = None) -> None:
        hooks.append(
            module.register_forward_hook(
                lambda _module, _given, result: found.__setitem__(name, result[:rows])
            )
        )

    head = getattr(model, "stress", None)
    if isinstance(head, Rank2Stress):
        keep(head, "out.stress")
        keep(head.harmonics_norm, "mid.rank2.sphharm_norm_out", oc20.FIRST_EDGES)
        keep(head.edge_norm, "mid.rank2.x_edge", oc20.FIRST_EDGES)
        for ours, theirs in PERCEPTRONS.items():
            if (network := getattr(head, ours)) is not None:
                keep(network, f"mid.rank2.{theirs}_out")
    yield found
    for hook in hooks:
        hook.remove()
    if isinstance(head, Rank2Stress) and head.decompose:
        stress = found["out.stress"]
        basis = symmetric_basis().to(stress.dtype)
        parts = torch.einsum("gab,kab->gk", stress, basis)
        found["out.stress_isotropic"], found["out.stress_anisotropic"] = parts[:, :1], parts[:, 1:]
