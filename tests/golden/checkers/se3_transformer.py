"""Golden checks of the SE(3)-Transformer: the n-body, QM9 and iterative networks."""

from typing import Any

import torch
from published.se3_transformer import MoleculeSE3Transformer, in_our_layout, our_name
from torch import Tensor, nn

from atomeq.models.se3_transformer import IterativeSE3Transformer, SE3TransformerPropagator
from checkers.cases import Case, FileCase, Tensors, compare_all, gradients, probe_loss
from checkers.report import Report

UNSEEN = "blocks.0.0.GMAB.k.kernel_unary.(0,0).rp.net.6.bias"
ROUNDING = 1e-15  # of sums of numbers of order one


def handles(case: Case) -> bool:
    """Say whether a case belongs here."""
    return case.family == "se3"


def check(case: FileCase, report: Report) -> None:
    """Check a case in float64 and float32."""
    kind = case.model.removeprefix("se3_transformer_")
    build, run = {
        "nbody": (build_nbody, run_nbody),
        "qm9": (build_qm9, run_qm9),
        "iterative": (build_iterative, run_iterative),
    }[kind]
    last = 2 * case.config["num_layers"]
    couplings = {k: q for k, q in case.inputs(torch.float64).items() if k.startswith("Q.")}
    for dtype in case.tolerances:
        model = build(case.config).to(dtype).eval()
        weights = case.weights(dtype).items()
        model.load_state_dict(
            {our_name(k, last): in_our_layout(k, w, couplings) for k, w in weights}
        )
        inputs, wanted = case.inputs(dtype), case.expected(dtype)
        leaves = {
            name: inputs[name.removeprefix("grad.in.")].requires_grad_()
            for name in wanted
            if name.startswith("grad.in.")
        }
        found = run(model, inputs)
        found["out.probe_loss"] = loss = probe_loss(
            found[name] for name in case.document["outputs"] if name in found
        )
        parameters = dict(model.named_parameters())
        names = {n: n.removeprefix("gradparam.") for n in wanted if n.startswith("gradparam.")}
        found |= gradients(loss, leaves)
        own = {name: parameters[our_name(rest, last)] for name, rest in names.items()}
        for name, gradient in gradients(loss, own).items() if own else ():
            # The change of layout is its own inverse but for an axis.
            given = gradient[None] if "self" in name else gradient
            theirs = in_our_layout(names[name], given, couplings)
            found[name] = theirs.reshape(wanted[name].shape)
        # Points that are all alike give keys one bias, which a softmax does not see: both gradients
        # are rounding.
        unseen = [name for name in own if kind == "iterative" and UNSEEN in name]
        compare_all(case, report, found, dtype, without=unseen)
        for name in unseen:
            report.compare(name, found[name], wanted[name], dtype, noise=ROUNDING)


def common(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "lmax": config["num_degrees"] - 1,
        "num_layers": config["num_layers"],
        "div": config["div"],
        "num_heads": config["n_heads"],
    }


def interactions(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_channels": config["num_channels"],
        "self_interaction": config["si_m"],
        "last_self_interaction": config["si_e"],
        "x_ij": config["x_ij"],
        "chiral": True,
    }


def build_nbody(config: dict[str, Any]) -> nn.Module:
    return SE3TransformerPropagator(0, 1, **common(config), **interactions(config))


def build_iterative(config: dict[str, Any]) -> nn.Module:
    n = config["num_iter"]
    return IterativeSE3Transformer(num_iterations=n, **common(config), **interactions(config))


def build_qm9(config: dict[str, Any]) -> nn.Module:
    n_inputs, n_edge_features = config["atom_feature_size"], config["edge_dim"]
    return MoleculeSE3Transformer(
        n_inputs, n_edge_features, channels=config["num_channels"], **common(config)
    )


def record(module: nn.Module, name: str, found: Tensors) -> None:
    """Keep the features by degree that a module returns."""

    def hook(_module: nn.Module, _inputs: Any, output: dict[int, Tensor]) -> None:
        for l, x in output.items():
            found[f"{name}.deg{l}"] = x.mT

    module.register_forward_hook(hook)


def record_trunk(model: Any, found: Tensors, nonlinearity: str) -> None:
    pairs = zip(model.trunk.attentions, model.trunk.nonlinearities, strict=True)
    number = 0
    for attention, activation in pairs:
        record(attention, f"mid.block{number}.GSE3Res", found)
        record(activation, f"mid.block{number + 1}.{nonlinearity}", found)
        number += 2


def run_nbody(model: Any, inputs: Tensors) -> Tensors:
    found: Tensors = {}
    record_trunk(model, found, "GNormBias")
    number = 2 * len(model.trunk.attentions)
    record(model.last, f"mid.block{number}.GSE3Res", found)
    source, target = inputs["edge_index"]
    charges = inputs["charges"]
    products = charges[target] * charges[source]
    model(inputs["pos"], inputs["vel"], charges, products, inputs["edge_index"])
    return found | {"out.vectors": found[f"mid.block{number}.GSE3Res.deg1"]}


def run_qm9(model: Any, inputs: Tensors) -> Tensors:
    found: Tensors = {}
    record_trunk(model, found, "GNormSE3")
    number = 2 * len(model.trunk.attentions)
    record(model.last, f"mid.block{number}.GConvSE3", found)
    arguments = (inputs[name] for name in ("features", "pos", "edge_index", "bond"))
    prediction = model(*arguments)
    scalars = found[f"mid.block{number}.GConvSE3.deg0"][:, :, 0]
    pooled = f"mid.block{number + 1}.GMaxPooling"
    return found | {"out.prediction": prediction, pooled: scalars.amax(dim=0, keepdim=True)}


def run_iterative(model: Any, inputs: Tensors) -> Tensors:
    """Run on the double well of the toy problem, whose depth of each pair is given."""

    def potential(lengths: Tensor) -> Tensor:
        x = lengths - inputs["potential_parameters"] - 1
        return x**4 - x**2 + 0.1 * x + 0.321919

    def lengths(pos: Tensor) -> Tensor:
        source, target = inputs["edge_index"]
        return (pos[target] - pos[source]).norm(dim=1, keepdim=True)

    pos = inputs["pos"]
    places = model(pos, inputs["edge_index"], potential)
    found = {"mid.initial_w": potential(lengths(pos))[:, :, None], "out.pos": places[-1]}
    for number, (before, after) in enumerate(zip([pos, *places], places, strict=False)):
        found[f"mid.update_norm_{number}"] = (after - before).norm(dim=1)[:, None, None]
    return found | {"out.potential": potential(lengths(places[-1]))[:, :, None]}
