"""Golden checks of CGENN: the n-body network, and single layers in Cl(3, 0)."""

import re
from typing import Any

import torch
from torch import Tensor, nn

from atomeq.models.clifford import CGENNPropagator
from atomeq.nn.clifford import (
    GradeSiLU,
    MultivectorNorm,
    SteerableProduct,
    grade_squares,
    rooted,
)
from atomeq.ops.clifford.algebra import reversal_signs
from atomeq.ops.clifford.operations import geometric_product
from atomeq.ops.tables import table_like
from checkers.cases import Case, FileCase, Tensors, compare_all, gradients, probe_loss
from checkers.report import Report

CL3 = (3, 0)
_BLOCK = {0: "linear", 1: "gate", 2: "product", 3: "norm"}  # the reference's layers by number


def handles(case: Case) -> bool:
    """Say whether a case belongs here."""
    return case.family == "cgenn"


def check(case: FileCase, report: Report) -> None:
    """Check a case in float64 and float32."""
    single = case.model == "cgenn_layers"
    build, run = (layers_of, run_layers) if single else (network_of, run_nbody)
    for dtype in case.tolerances:
        model = build(case.config).to(dtype).eval()
        model.load_state_dict({ours_of(k): ours(k, w) for k, w in case.weights(dtype).items()})
        inputs, wanted = case.inputs(dtype), case.expected(dtype)
        sought = [name for name in wanted if name.startswith("grad.in.")]
        leaves = {name: inputs[name.removeprefix("grad.in.")].requires_grad_() for name in sought}
        found = run(model, inputs)
        found["out.probe_loss"] = loss = probe_loss(
            found[name] for name in case.document["outputs"] if name in found
        )
        parameters = dict(model.named_parameters())
        names = [name for name in wanted if name.startswith("gradparam.")]
        weights = {name: parameters[ours_of(name.removeprefix("gradparam."))] for name in names}
        found |= gradients(loss, leaves)
        for name, gradient in gradients(loss, weights).items() if weights else ():
            found[name] = theirs(name, gradient, wanted[name].shape)
        compare_all(case, report, found, dtype)


def ours_of(name: str) -> str:
    """Return our name of a weight of the reference."""
    if found := re.match(r"(layers\.\d+)\.(edge|node)_model\.layers\.(\d)\.(\d)\.(.*)", name):
        layer, part, block, kind, rest = found.groups()
        if (part, block, kind) == ("edge", "0", "0"):
            return f"{layer}.first.{rest}"
        ours = "message" if part == "edge" else "update"
        return f"{layer}.{ours}.{block}.{_BLOCK[int(kind)]}.{rest}"
    return name.replace("projection.0.", "projection.")


def ours(name: str, weight: Tensor) -> Tensor:
    """Return a weight in our layout: grades or paths are the first axis, channels out the last."""
    if name.endswith("bias"):
        return weight.flatten()
    if is_linear(name):
        return weight.view(*weight.shape[:2], -1).permute(2, 1, 0)
    weight = weight[0] if weight.shape[0] == 1 else weight  # gates have an axis for the atoms
    return weight.movedim(-1, 0) if weight.ndim > 1 else weight


def theirs(name: str, gradient: Tensor, shape: torch.Size) -> Tensor:
    """Return the gradient by a weight in the reference's layout."""
    if is_linear(name) and gradient.ndim > 1:
        gradient = gradient.permute(2, 1, 0)
    elif gradient.ndim > 1:
        gradient = gradient.movedim(0, -1)
    return gradient.reshape(shape)


def is_linear(name: str) -> bool:
    """Say whether a weight of the reference belongs to a linear map."""
    return bool(re.search(r"linear_|embedding|projection|layers\.\d\.0\.", name))


def network_of(config: dict[str, Any]) -> nn.Module:
    return CGENNPropagator(
        config["in_features"] - 2,
        config["edge_features_in"],
        hidden_channels=config["hidden_features"],
        num_layers=config["n_layers"],
        centred=True,
    )


def run_nbody(model: Any, inputs: Tensors) -> Tensors:
    """Run in the house's order of edges: the reference has the receiver in row 0."""
    found: Tensors = {}
    pos, velocities, edges = inputs["pos"], inputs["vel"], inputs["edge_index"].flip(0)

    def keep(module: nn.Module, name: str, *, inputs: bool = False) -> None:
        def hook(_module: nn.Module, given: Any, output: Tensor) -> None:
            found[name] = (given[0] if inputs else output).mT

        module.register_forward_hook(hook)

    keep(model.embedding, "mid.input", inputs=True)
    keep(model.embedding, "mid.embedding")
    block = model.layers[0].message[0]
    keep(block.gate, "mid.layer0.edge.0.linear", inputs=True)
    for name in ("gate", "product", "norm"):
        label = {"gate": "silu"}.get(name, name)
        keep(getattr(block, name), f"mid.layer0.edge.0.{label}")
    for number in range(len(model.layers)):
        after = model.layers[number + 1] if number + 1 < len(model.layers) else model.projection
        keep(after, f"mid.layer{number}.h", inputs=True)
    h = model.multivectors(pos, velocities, inputs["charges"], inputs["edge_attr"], edges)
    found |= {"out.multivector": h.mT, "out.pos": pos + h[:, 1:4, 0]}
    for name in ("linear", "silu", "product", "norm"):
        found[f"mid.layer0.edge.0.{name}"] = found[f"mid.layer0.edge.0.{name}"][:6]
    return found


def layers_of(config: dict[str, Any]) -> nn.Module:
    n = config["in_features"]
    return nn.ModuleDict(
        {
            "fc": SteerableProduct(CL3, n, config["out_features"]),
            "gp": SteerableProduct(CL3, n),
            "silu": GradeSiLU(CL3, n),
            "silu_norm": GradeSiLU(CL3, n, invariant="norm"),
            "ln": MultivectorNorm(CL3, n),
        }
    )


def run_layers(model: Any, inputs: Tensors) -> Tensors:
    x, y = inputs["x"].mT.contiguous(), inputs["y"].mT.contiguous()
    found = {
        "out.geometric_product": geometric_product(x, y),
        "out.fc": model["fc"](x),
        "out.gp": model["gp"](x),
        "out.silu": model["silu"](x),
        "out.silu_norm": model["silu_norm"](x),
        "out.layer_norm": model["ln"](x),
        "out.q": (form := grade_squares(x, CL3).sum(dim=1, keepdim=True)),
        "out.norm": rooted(form, 1e-16),
        "out.beta": x * table_like(reversal_signs, 3, like=x)[:, None],
    }
    return {name: tensor.mT for name, tensor in found.items()}
