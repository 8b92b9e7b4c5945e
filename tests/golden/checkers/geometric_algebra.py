"""Golden checks of geometric-algebra attention: single layers and the notebook's potential."""

import re
from typing import Any

import torch
from published.geometric_algebra import GalaPotential, TupleAttention
from torch import nn

from checkers.cases import Case, FileCase, Tensors, compare_all, gradients, probe_loss
from checkers.report import Report

# The reference registers the networks of its attentions a second time.
_TWICE = ("scale_nets.", "score_nets.", "value_nets.")
ROUNDING = 1e-15  # of sums of numbers of order one


def handles(case: Case) -> bool:
    """Say whether a case belongs here."""
    return case.family == "gala"


def check(case: FileCase, report: Report) -> None:
    """Check a case in float64 and float32."""
    single = case.model == "gala_layers"
    for dtype in case.tolerances:
        model = (layer_of if single else GalaPotential)(case.config).to(dtype).eval()
        model.load_state_dict({ours_of(k): w for k, w in weights_of(case, dtype).items()})
        inputs, wanted = case.inputs(dtype), case.expected(dtype)
        sought = [name for name in wanted if name.startswith("grad.in.")]
        leaves = {name: inputs[name.removeprefix("grad.in.")].requires_grad_() for name in sought}
        found = run_layer(model, inputs) if single else run_potential(model, inputs)
        found["out.probe_loss"] = loss = probe_loss(
            found[name] for name in case.document["outputs"] if name in found
        )
        parameters = dict(model.named_parameters())
        names = {n: n.removeprefix("gradparam.") for n in wanted if n.startswith("gradparam.")}
        found |= gradients(loss, leaves)
        own = {name: parameters[ours_of(rest)] for name, rest in names.items()}
        found |= gradients(loss, own) if own else {}
        # A softmax does not see the bias of its scores: both gradients are rounding.
        biases = [name for name in own if re.search(r"score_nets?\.(\d\.)?[23]\.bias", name)]
        compare_all(case, report, found, dtype, without=biases)
        for name in biases:
            report.compare(name, found[name], wanted[name], dtype, noise=ROUNDING)


def weights_of(case: FileCase, dtype: torch.dtype) -> Tensors:
    return {k: w for k, w in case.weights(dtype).items() if not k.startswith(_TWICE)}


def ours_of(name: str) -> str:
    """Return our name of a weight: the first the reference gave it, which has its attention."""
    if found := re.match(r"(score|value)_nets\.(\d)\.(.*)", name):
        kind, number, rest = found.groups()
        attention = ("eqvar", "invar")[int(number) % 2]
        return f"{attention}_att_nets.{int(number) // 2}.{kind}_net.{rest}"
    if found := re.match(r"scale_nets\.(\d)\.(.*)", name):
        return f"eqvar_att_nets.{found[1]}.scale_net.{found[2]}"
    return name.removeprefix("layer.")


def layer_of(config: dict[str, Any]) -> nn.Module:
    kind = config["kind"].removesuffix("Attention")
    layout = "multivector" if kind.startswith("Multivector") else "vector"
    return TupleAttention(
        config["n_dim"],
        layout=layout,
        covariant=config["covariant_mode"] if "2" in kind else None,
        rank=config["rank"],
        reduce=config["reduce"],
        invariant_mode=config["invariant_mode"],
        merge=config.get("merge_fun", "mean"),
        join=config.get("join_fun", "mean"),
    )


def run_layer(model: Any, inputs: Tensors) -> Tensors:
    value, weights = model(inputs["r"], inputs["v"])
    return {"out.value": value, "mid.attention": weights}


def run_potential(model: Any, inputs: Tensors) -> Tensors:
    energy, after = model(inputs["r"], inputs["v"])
    found = {"out.potential": energy}
    for number, (points, features) in enumerate(after):
        found[f"mid.block{number}.equivariant"] = points
        found[f"mid.block{number}.invariant"] = features
    return found
